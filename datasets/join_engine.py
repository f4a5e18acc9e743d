"""DuckDB as the out-of-core engine of the raw sources' joins (docs/data.md says why this one).

A connection keeps its tables in a file of the working directory and may use a bounded share of
memory; what does not fit is spilled there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from datasets.pipeline import num_threads
from datasets.table_reader import RawBatch, RowSource, open_table

__all__ = ["JoinedRows", "connect", "quoted"]

MEMORY_LIMIT = "700MB"
ROW_GROUP_ROWS = 61_440


@contextlib.contextmanager
def connect(work: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an engine whose files lie in ``work``."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": num_threads(),
        "temp_directory": str(work / "spill"),
    }
    with duckdb.connect(str(work / "engine.duckdb"), config=settings) as connection:
        yield connection


def quoted(path: Path) -> str:
    """Return a path as an SQL literal."""
    return "'" + str(path).replace("'", "''") + "'"


class JoinedRows:
    """The joined rows of a split, staged as Parquet, under the name of the file they come from.

    Args:
        name: What messages call the rows.
        path: The staged file.
        checks: Columns that served to check the join and are no part of the table.
    """

    def __init__(self, name: str, path: Path, *, checks: Sequence[str]) -> None:
        self._table: RowSource = open_table(path)
        self.name = name
        self.columns: Sequence[str] = [c for c in self._table.columns if c not in checks]
        self.num_rows: int = pq.read_metadata(path).num_rows

    def batches(self) -> Iterator[RawBatch]:
        """Read all rows from the start, in order."""
        return self._table.batches()
