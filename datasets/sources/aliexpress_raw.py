"""The AliExpress search logs as Tianchi publishes them, joined into the processed form.

``<country>_user_<split>.csv`` has 33 columns and a row per search, ``<country>_item_<split>.csv``
49 columns and a row per impression; neither has a header, column 1 of both is the search. The last
item column is the label: 0 nothing, 1 a click, 2 a click and a conversion. The processed names
number the user's columns first, then the item's, each in the file's order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb

from datasets.errors import TableError, one_line
from datasets.join_engine import ROW_GROUP_ROWS, JoinedRows, connect, execute, quoted
from datasets.progress import ReportProgress
from datasets.raw_files import RawFile, find_raw_file

__all__ = ["COUNTRIES", "join_aliexpress"]

COUNTRIES = ("nl", "fr", "us", "es", "ru")

USER_COLUMNS, ITEM_COLUMNS = 33, 49
USER_CATEGORICALS = (*range(2, 9), 32, 33)
USER_NUMERICALS = tuple(range(9, 32))
ITEM_CATEGORICALS = (19, 34, 35, 36, 40, 41, 42)
ITEM_NUMERICALS = tuple(i for i in range(2, 49) if i not in ITEM_CATEGORICALS)
_LABELS = (b"0", b"1", b"2")


def join_aliexpress(
    directory: Path, country: str, *, work: Path, report: ReportProgress
) -> dict[str, JoinedRows]:
    """Join the four files of a country; the rows keep the order of the item file.

    Args:
        directory: Holds the files, plain, gz, zst, or in zip archives.
        country: One of ``COUNTRIES``.
        work: Where intermediate files go.
        report: Told which file is being joined.

    Raises:
        TableError: A file is missing or damaged, a line has other than 33 or 49 cells, a cell is
            of a wrong kind, a search is there twice among the users' rows or not at all, or a
            label is not 0, 1 or 2.
    """
    joined = {}
    for split in ("train", "test"):
        user = find_raw_file(directory, f"{country}_user_{split}", work=work)
        item = find_raw_file(directory, f"{country}_item_{split}", work=work)
        with connect(work) as connection:
            run = _Statements(connection, f"joining {split}", report)
            _load_searches(run, user)
            joined[split] = _join(run, user, item, work / f"{split}.parquet")
        for file in (user, item):
            if file.path.parent == work:  # unpacked from an archive: room for the next
                file.path.unlink()
        (work / "engine.duckdb").unlink()
    return joined


def _scan(file: RawFile, num_columns: int, texts: tuple[int, ...]) -> str:
    """Return the table function that reads a raw file, column i as ``c<i>``."""
    types = ", ".join(
        f"'c{i}': '{'VARCHAR' if i in texts else 'DOUBLE'}'" for i in range(1, num_columns + 1)
    )
    return (
        f"read_csv({quoted(file.path)}, header=false, delim=',', quote='', escape='', "
        f"auto_detect=false, null_padding=false, compression='{file.compression or 'none'}', "
        f"columns={{{types}}})"
    )


def _load_searches(run: "_Statements", user: RawFile) -> None:
    texts = (1, *USER_CATEGORICALS)
    numbers = ", ".join(f"TRY_CAST(c{i} AS FLOAT) AS c{i}" for i in USER_NUMERICALS)
    run.read(
        f"CREATE TABLE searches AS SELECT * REPLACE ({numbers}) "
        f"FROM {_scan(user, USER_COLUMNS, texts)}",
        user,
        USER_COLUMNS,
        texts,
    )
    twice = run.connection.execute(
        "SELECT count(*), min(c1) FROM (SELECT c1 FROM searches GROUP BY c1 HAVING count(*) > 1)"
    ).fetchone()
    if twice and twice[0]:
        rows = [str(row) for row, line in _numbered(user) if _cell(line, 1) == str(twice[1])]
        noun = "search has" if twice[0] == 1 else "searches have"
        raise TableError(
            f"{user.name}: {twice[0]} {noun} more than one row (search {twice[1]!r} in rows "
            f"{', '.join(rows[:5])}); leave one row per search"
        )


def _join(run: "_Statements", user: RawFile, item: RawFile, out: Path) -> JoinedRows:
    categorical = [f"s.c{i}" for i in USER_CATEGORICALS] + [f"i.c{i}" for i in ITEM_CATEGORICALS]
    numerical = [f"s.c{i}" for i in USER_NUMERICALS]
    numerical += [f"TRY_CAST(i.c{i} AS FLOAT)" for i in ITEM_NUMERICALS]
    columns = ["i.c1 AS search_id"]
    columns += [f"{column} AS categorical_{k}" for k, column in enumerate(categorical, 1)]
    columns += [f"{column} AS numerical_{k}" for k, column in enumerate(numerical, 1)]
    columns.append("(i.c49 IN ('1', '2'))::UTINYINT AS click")
    columns.append("(i.c49 = '2')::UTINYINT AS conversion")
    # checked below: what is wrong is seldom, so it costs two narrow columns and no second join
    columns.append("(s.c1 IS NULL)::UTINYINT AS lone")
    columns.append("coalesce(i.c49 NOT IN ('0', '1', '2'), true)::UTINYINT AS odd")
    texts = (1, *ITEM_CATEGORICALS, 49)
    run.read(
        f"COPY (SELECT {', '.join(columns)} FROM {_scan(item, ITEM_COLUMNS, texts)} AS i "
        f"LEFT JOIN searches AS s ON i.c1 = s.c1) TO {quoted(out)} "
        f"(FORMAT parquet, COMPRESSION lz4_raw, ROW_GROUP_SIZE {ROW_GROUP_ROWS})",
        item,
        ITEM_COLUMNS,
        texts,
    )
    counts = run.connection.execute(
        f"SELECT sum(lone), sum(odd) FROM read_parquet({quoted(out)})"
    ).fetchone()
    lone, odd = counts or (0, 0)
    if odd:
        raise _odd_label(item)
    if lone:
        raise _lone_impression(run.connection, user, item, lone)
    return JoinedRows(item.name, out, checks=("lone", "odd"))


@dataclass(frozen=True)
class _Statements:
    """Runs the statements of one split and reports how far they are."""

    connection: duckdb.DuckDBPyConnection
    phase: str
    report: ReportProgress

    def read(self, sql: str, file: RawFile, num_columns: int, texts: tuple[int, ...]) -> None:
        """Run a statement that reads a raw file; where it fails, find the line to blame."""
        try:
            execute(self.connection, sql, phase=self.phase, report=self.report)
        except duckdb.Error as error:
            _check_lines(file, num_columns, texts)
            reason = one_line(error)
            raise TableError(f"{file.name}: not readable ({reason}); fetch it again") from error


def _numbered(file: RawFile) -> Iterator[tuple[int, bytes]]:
    try:
        yield from enumerate(file.lines(), start=1)
    except OSError as error:
        raise TableError(f"{file.name}: damaged ({error}); fetch the file again") from error


def _cell(line: bytes, column: int) -> str:
    cells = line.split(b",")
    return cells[column - 1].decode("utf-8", "replace") if len(cells) >= column else ""


def _check_lines(file: RawFile, num_columns: int, texts: tuple[int, ...]) -> None:
    for row, line in _numbered(file):
        cells = line.split(b",")
        if len(cells) != num_columns:
            raise TableError(
                f"{file.name}: row {row} has {len(cells)} cells instead of {num_columns}; mend or "
                "remove the line (a last line that is cut off means an unfinished download)"
            )
        for column, cell in enumerate(cells, start=1):
            if column not in texts and cell and not _is_number(cell):
                raise TableError(
                    f"{file.name}: row {row}: column {column} is "
                    f"{cell.decode('utf-8', 'replace')!r}, no number; mend the row"
                )


def _is_number(cell: bytes) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _odd_label(item: RawFile) -> TableError:
    found = [
        (row, line.split(b",")[-1])
        for row, line in _numbered(item)
        if line.split(b",")[-1] not in _LABELS
    ]
    row, label = found[0]
    return TableError(
        f"{item.name}: row {row}: column 49 is {label.decode('utf-8', 'replace')!r}, a label is "
        f"0 (none), 1 (click) or 2 (click and conversion) ({len(found)} such rows); mend the rows"
    )


def _lone_impression(
    connection: duckdb.DuckDBPyConnection, user: RawFile, item: RawFile, count: int
) -> TableError:
    known = {row[0] for row in connection.execute("SELECT c1 FROM searches").fetchall()}
    first = next((row, s) for row, line in _numbered(item) if (s := _cell(line, 1)) not in known)
    noun = "impression has" if count == 1 else "impressions have"
    return TableError(
        f"{item.name}: {count} {noun} a search that {user.name} does not hold (row {first[0]}, "
        f"search {first[1]!r}); give the two files of one download"
    )
