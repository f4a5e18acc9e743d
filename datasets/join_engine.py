"""DuckDB as the out-of-core engine of the raw sources' joins (docs/data.md says why this one).

A connection keeps its tables in a file of the working directory and may use a bounded share of
memory; what does not fit is spilled there.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from datasets.errors import DatasetError, one_line
from datasets.pipeline import num_threads
from datasets.progress import ProgressReport, ReportProgress
from datasets.table_reader import RawBatch, RowSource, open_table

__all__ = ["JoinedRows", "connect", "execute", "quoted"]

MEMORY_LIMIT = "700MB"
ROW_GROUP_ROWS = 61_440
_REPORT_EVERY_S = 0.5


@contextlib.contextmanager
def connect(work: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an engine whose files lie in ``work``."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": num_threads(),
        "temp_directory": str(work / "spill"),
    }
    with duckdb.connect(str(work / "engine.duckdb"), config=settings) as connection:
        connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
        # DuckDB guesses that a CSV file has 42 rows. With the impressions as the smaller side it
        # would hold them in memory, and give them in any order.
        connection.execute("SET disabled_optimizers = 'build_side_probe_side'")
        yield connection


def execute(
    connection: duckdb.DuckDBPyConnection, sql: str, *, phase: str, report: ReportProgress
) -> None:
    """Run a statement that may take long, and report its progress in per cent.

    Raises:
        DatasetError: Memory or disk do not suffice.
        duckdb.Error: The statement fails otherwise.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_REPORT_EVERY_S):
            percent = int(connection.query_progress())
            if 0 <= percent <= 100:
                report(ProgressReport(phase, percent, 100, "%"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        connection.execute(sql)
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        reason = one_line(error)
        if isinstance(error, duckdb.IOException) and "space" not in reason:
            raise
        raise DatasetError(
            f"{phase}: memory or disk do not suffice ({reason}); make room beside --out"
        ) from error
    finally:
        ended.set()
        watcher.join()


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
