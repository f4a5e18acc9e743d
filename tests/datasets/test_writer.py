from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.filesystem import locate
from datasets.writer import PartsWriter, encoded_table


def test_parts_have_bounded_row_groups_and_keep_the_order(tmp_path: Path) -> None:
    with PartsWriter(locate(tmp_path), "train", part_rows=131_072) as writer:
        for start in range(0, 200_000, 30_000):
            stop = min(start + 30_000, 200_000)
            writer.write(pa.table({"n": pa.array(np.arange(start, stop))}))
    assert writer.parts == ["train/part-00000.parquet", "train/part-00001.parquet"]
    files = [pq.ParquetFile(tmp_path / part) for part in writer.parts]
    groups = [
        [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for file in files
    ]
    assert groups == [[65_536, 65_536], [65_536, 3_392]]
    numbers = np.concatenate([file.read()["n"].to_numpy() for file in files])
    assert (numbers == np.arange(200_000)).all()


def test_no_rows_make_no_part(tmp_path: Path) -> None:
    with PartsWriter(locate(tmp_path), "train") as writer:
        writer.write(pa.table({"n": pa.array([], pa.int64())}))
    assert writer.parts == []
    assert not (tmp_path / "train").exists()


def test_failure_leaves_pending_rows_unwritten(tmp_path: Path) -> None:
    writer = PartsWriter(locate(tmp_path), "train")
    with pytest.raises(RuntimeError, match="stop"), writer:
        writer.write(pa.table({"n": pa.array([1])}))
        raise RuntimeError("stop")
    assert writer.parts == []


def test_rows_are_the_fields_in_order_then_the_labels() -> None:
    one = np.ones(2, np.uint8)
    table = encoded_table(
        {"color": np.int8([1, 2])}, {"weight": np.float32([1, 2])}, click_N=one, conversion_N=one
    )
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("color", "int8"),
        ("weight", "float"),
        ("click", "uint8"),
        ("conversion", "uint8"),
    ]
