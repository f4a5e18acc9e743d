"""Input tables, CSV or Parquet, in batches whose size does not depend on the file's."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from datasets.errors import TableError, one_line
from datasets.filesystem import Location, locate

__all__ = ["RawBatch", "RowSource", "open_table", "open_tables"]

_BLOCK_BYTES = 8 << 20
_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class RawBatch:
    """Consecutive rows of an input; ``first_row`` counts data rows from 1, without the header."""

    first_row: int
    rows: pa.RecordBatch  # or a pa.Table


class RowSource(Protocol):
    """Rows that can be read more than once; a further raw format implements these three."""

    @property
    def name(self) -> str:
        """What messages call it, a file's path as a rule."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """The column names in the input's order."""
        ...

    def batches(self) -> Iterator[RawBatch]:
        """Read all rows from the start, in order."""
        ...


def open_table(path: str | Path) -> RowSource:
    """Open a CSV or Parquet file (told apart by content; CSV also compressed, by its suffix).

    Raises:
        TableError: The file is missing, empty, or its header cannot be read.
    """
    location = locate(path)
    if not location.is_file():
        kind = "is no file" if location.exists() else "no such file"
        raise TableError(f"{path}: {kind}; give a CSV or Parquet file")
    with location.filesystem.open_input_stream(location.path, compression=None) as stream:
        magic = stream.read(4)
    return (
        _ParquetTable(str(path), location) if magic == b"PAR1" else _CsvTable(str(path), location)
    )


def open_tables(given: str | Path) -> tuple[RowSource, ...]:
    """Open one file, all files of a directory, or those that a pattern names.

    Args:
        given: A path or URI; its last part may be a pattern (``*``, ``?``, ``[...]``). Hidden
            files, those that begin with ``_`` and directories inside are left out.

    Returns:
        The tables in the order of their paths, at least one.

    Raises:
        TableError: There is no such file, or one of them cannot be opened.
    """
    location = locate(given)
    if location.is_file():
        return (open_table(given),)
    folder, pattern = str(given).rstrip("/"), "*"
    if not location.exists():
        folder, _, pattern = str(given).rpartition("/")
        if not any(letter in pattern for letter in "*?["):
            return (open_table(given),)  # which refuses it
    where = locate(folder or ("/" if str(given).startswith("/") else "."))
    infos = where.filesystem.get_file_info(pafs.FileSelector(where.path, allow_not_found=True))
    names = sorted(
        info.base_name
        for info in infos
        if info.type == pafs.FileType.File
        and fnmatchcase(info.base_name, pattern)
        and not info.base_name.startswith((".", "_"))
    )
    if not names:
        raise TableError(
            f"{given}: no file in it; give a CSV or Parquet file, or a directory of them"
        )
    prefix = f"{folder}/" if "/" in str(given) or location.exists() else ""
    return tuple(open_table(f"{prefix}{name}") for name in names)


class _ParquetTable:
    def __init__(self, name: str, location: Location) -> None:
        self.name = name
        self._location = location
        with self._open() as file:
            self.columns: Sequence[str] = tuple(file.schema_arrow.names)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(
                self._location.filesystem.open_input_file(self._location.path),
                pre_buffer=False,  # it would hold the whole file while batches are read
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a column's name, too
            raise TableError(
                f"{self.name}: not readable as Parquet ({one_line(error)}); write the file again"
            ) from error

    def batches(self) -> Iterator[RawBatch]:
        first_row = 1
        with self._open() as file:
            try:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    self._check_cells(batch, first_row)
                    yield RawBatch(first_row, batch)
                    first_row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise TableError(
                    f"{self.name}: damaged after row {first_row - 1} ({one_line(error)}); "
                    "write the file again"
                ) from error

    def _check_cells(self, batch: pa.RecordBatch, first_row: int) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise TableError(
                    f"{self.name}: column {name!r}: a cell after row {first_row - 1} is not what "
                    f"its type says ({one_line(error)}); write the file again"
                ) from error


class _CsvTable:
    """A CSV file with a header; every cell is read as text, and typed by its role later."""

    def __init__(self, name: str, location: Location) -> None:
        self.name = name
        self._location = location
        self.columns: Sequence[str] = tuple(self._read_header())

    def _text(self) -> io.TextIOWrapper:
        stream = self._location.filesystem.open_input_stream(self._location.path)
        # the decoder reads ahead: what it cannot decode may lie beyond the lines that are wanted
        return io.TextIOWrapper(
            io.BufferedReader(stream), encoding="utf-8-sig", errors="surrogateescape", newline=""
        )

    def _read_header(self) -> list[str]:
        try:
            with self._text() as text:
                header = next((row for row in csv.reader(text) if row), None)
        except (csv.Error, OSError) as error:
            raise TableError(
                f"{self.name}: not readable as CSV ({one_line(error)}); give CSV or Parquet"
            ) from error
        if header is None:
            raise TableError(f"{self.name}: the file is empty; give a file with a header and rows")
        if any("\udc80" <= letter <= "\udcff" for name in header for letter in name):
            raise TableError(
                f"{self.name}: the header is not UTF-8 text; convert the file to UTF-8"
            )
        return header

    def batches(self) -> Iterator[RawBatch]:
        first_row = 1
        try:
            with self._location.filesystem.open_input_stream(self._location.path) as stream:
                reader = pacsv.open_csv(
                    stream,
                    read_options=pacsv.ReadOptions(block_size=_BLOCK_BYTES),
                    parse_options=pacsv.ParseOptions(newlines_in_values=True),
                    convert_options=pacsv.ConvertOptions(
                        column_types={name: pa.string() for name in self.columns},
                        strings_can_be_null=False,
                    ),
                )
                for batch in reader:
                    yield RawBatch(first_row, batch)
                    first_row += batch.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if "Empty CSV file or block" in str(error):
                return  # a header and nothing after it
            raise self._explain(error, first_row - 1) from error

    def _explain(self, error: Exception, rows_read: int) -> TableError:
        reason = one_line(error)
        if "UTF8" in reason or isinstance(error, UnicodeDecodeError):
            return TableError(
                f"{self.name}: a cell after row {rows_read} is not UTF-8 text; "
                "convert the file to UTF-8"
            )
        if ragged := self._first_ragged_row():
            return ragged
        return TableError(
            f"{self.name}: not readable as CSV after row {rows_read} ({reason}); mend that line"
        )

    def _first_ragged_row(self) -> TableError | None:
        """Find the row with too few or too many cells, which pyarrow does not number."""
        with self._text() as text:
            rows = (row for row in csv.reader(text) if row)
            next(rows)
            for number, row in enumerate(rows, start=1):
                if len(row) != len(self.columns):
                    return TableError(
                        f"{self.name}: row {number} has {len(row)} cells, "
                        f"the header has {len(self.columns)}; mend that line"
                    )
        return None
