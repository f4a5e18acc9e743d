"""Fixtures of the tuner tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets import Dataset, open_dataset, synthesize


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """4,000 synthetic impressions; nobody writes to them."""
    out: Path = tmp_path_factory.mktemp("prepared") / "tiny"
    synthesize(out=out, impressions=4_000, seed=0)
    return open_dataset(str(out))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo what a test, or a library that it imports, does to the environment variables."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
