"""Fixtures of the tuner tests."""

from pathlib import Path

import pytest

from datasets import Dataset, open_dataset, synthesize


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """4,000 synthetic impressions; nobody writes to them."""
    out: Path = tmp_path_factory.mktemp("prepared") / "tiny"
    synthesize(out=out, impressions=4_000, seed=0)
    return open_dataset(str(out))
