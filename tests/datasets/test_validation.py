from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from datasets import Dataset, DatasetError, open_dataset, prepare_table, validate
from tuner.cli.data import data_app


@pytest.fixture
def dataset(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> Dataset:
    prepare_table(input=write_csv(frame), schema=schema_file, out=tmp_path / "rows")
    return open_dataset(str(tmp_path / "rows"))


def part_of(dataset: Dataset, split: str = "train") -> Path:
    return Path(dataset.uri) / split / "part-00000.parquet"


def change(part: Path, column: str, row: int, value: float) -> None:
    table = pq.read_table(part)
    cells = table[column].to_numpy().copy()
    cells[row] = value
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array(cells)), part)


def test_dataset_as_prepared_is_valid(dataset: Dataset) -> None:
    assert validate(dataset) == []
    shown = CliRunner().invoke(data_app, ["validate", dataset.uri])
    assert shown.exit_code == 0
    assert shown.stdout == f"valid {dataset.uri}: digest {dataset.digest[:12]}\n"


def test_truncated_changed_and_missing_files_are_named(dataset: Dataset) -> None:
    train, valid, test = (part_of(dataset, split) for split in ("train", "valid", "test"))
    content = train.read_bytes()
    train.write_bytes(content[:-7])
    changed = bytearray(valid.read_bytes())
    changed[100] ^= 1
    valid.write_bytes(changed)
    test.unlink()
    faults = validate(dataset)
    name = "part-00000.parquet"
    size = len(content)
    assert f"train/{name}: truncated, {size - 7} bytes instead of {size}" in faults
    assert f"valid/{name}: changed, its SHA-256 is not the manifest's" in faults
    assert f"test/{name}: missing" in faults
    assert any(fault.startswith(f"train/{name}: not readable (") for fault in faults)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("color", 99, "field 'color' has an id outside 0 to 4 (1 such rows)"),
        ("color", -1, "field 'color' has an id outside 0 to 4 (1 such rows)"),
        ("click", 2, "the click label is not 0 or 1 (1 such rows)"),
        ("conversion", 3, "the conversion label is not 0 or 1 (1 such rows)"),
        ("price", np.inf, "field 'price' is not finite (1 such rows)"),
    ],
)
def test_cells_out_of_range_are_named(
    dataset: Dataset, column: str, value: float, message: str
) -> None:
    change(part_of(dataset), column, 6, value)
    assert f"train/part-00000.parquet: row 7: {message}" in validate(dataset)


def test_rows_and_vocabularies_that_are_not_the_manifests_are_named(dataset: Dataset) -> None:
    part = part_of(dataset, "test")
    pq.write_table(pq.read_table(part)[:-1], part)
    assert any(fault.startswith("test: holds ") for fault in validate(dataset))
    (Path(dataset.uri) / "vocabularies.parquet").unlink()
    faults = validate(dataset)
    assert "vocabularies.parquet: missing" in faults


def test_content_of_a_dataset_without_file_sums_is_held_by_the_digest(dataset: Dataset) -> None:
    bare = Dataset(dataset.uri, dataset.manifest.model_copy(update={"files": {}}))
    assert validate(bare) == []
    change(part_of(dataset), "price", 3, 12.5)
    (fault,) = validate(bare)
    assert fault.startswith("manifest.json: the content's digest is ")


def test_command_names_every_fault(dataset: Dataset) -> None:
    part_of(dataset).unlink()
    shown = CliRunner().invoke(data_app, ["validate", dataset.uri])
    assert isinstance(shown.exception, DatasetError)
    assert f"pwiser: {dataset.uri}: train/part-00000.parquet: missing\n" in shown.stderr
