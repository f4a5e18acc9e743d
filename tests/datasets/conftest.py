"""Small tables, and the real samples where they are at hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

REPOSITORY = Path(__file__).parents[2]

SCHEMA = """\
labels: {click: clicked, conversion: bought}
categorical: [color, size]
numerical: {weight: {normalize: log}, price: {}}
drop: [note]
group: user
split: {valid: 0.2, test: 0.2, seed: 0}
"""


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def frame() -> pd.DataFrame:
    """300 rows of 60 users that keep SCHEMA."""
    generator = np.random.default_rng(0)
    clicked = generator.integers(0, 2, 300)
    return pd.DataFrame(
        {
            "user": generator.integers(0, 60, 300),
            "color": generator.choice(["red", "blue", "dark, green", 'the "last"'], 300),
            "size": generator.integers(36, 48, 300),
            "weight": generator.normal(size=300).round(3),
            "price": generator.integers(1, 10_000, 300) / 100,
            "note": "n",
            "clicked": clicked,
            "bought": clicked * generator.integers(0, 2, 300),
        }
    )


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[pd.DataFrame, str], Path]:
    def write(rows: pd.DataFrame, name: str = "rows.csv") -> Path:
        path = tmp_path / name
        rows.to_csv(path, index=False)
        return path

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the real samples are not at {path}; they are not part of the repository")
    return path
