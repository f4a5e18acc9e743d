"""Input tables, CSV or Parquet, in batches whose size does not depend on the file's."""

import contextlib
import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from datasets.errors import TableError, one_line
from datasets.filesystem import Location, locate, split_query

__all__ = ["RawBatch", "RowSource", "TableFile", "open_table", "open_tables"]

_BLOCK_BYTES = 8 << 20
_BATCH_ROWS = 65_536
_END_BYTES = 64
_COMPRESSED = frozenset({".gz", ".zst", ".bz2", ".lz4", ".br"})


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


def open_table(path: str | Path) -> "TableFile":
    """Open a CSV or Parquet file (told apart by content; CSV also compressed, by its suffix).

    Raises:
        TableError: The file is missing, empty, or its header cannot be read.
    """
    return _open(str(path), locate(path), None)


def open_tables(
    given: str | Path, columns: Collection[str] | None = None
) -> "tuple[TableFile, ...]":
    """Open one file, all files of a directory, or those that a pattern names.

    Args:
        given: A path or URI; its last part may be a pattern (``*``, ``?``, ``[...]``). Hidden
            files, those that begin with ``_`` or end with ``~``, and directories inside are left
            out.
        columns: Those that batches are to hold, as far as a file has them; None for all.

    Returns:
        The tables in the order of their paths, at least one.

    Raises:
        TableError: There is no such file, one of them cannot be opened, or the same rows are
            there twice: a file beside its compressed form, or versions of a Delta table.
    """
    place, query = split_query(str(given))
    location = locate(given)
    if location.is_file():
        return (_open(str(given), location, columns),)
    folder, pattern = place.rstrip("/"), "*"
    if not location.exists():
        folder, _, pattern = place.rpartition("/")
        if not any(letter in pattern for letter in "*?["):
            return (_open(str(given), location, columns),)  # which refuses it
    where = locate((folder or ("/" if place.startswith("/") else ".")) + query)
    infos = where.filesystem.get_file_info(pafs.FileSelector(where.path, allow_not_found=True))
    names = sorted(
        info.base_name
        for info in infos
        if info.type == pafs.FileType.File
        and fnmatchcase(info.base_name, pattern)
        and not info.base_name.startswith((".", "_"))
        and not info.base_name.endswith("~")
    )
    if not names:
        raise TableError(
            f"{given}: no file in it; give a CSV or Parquet file, or a directory of them"
        )
    _refuse_twice(str(given), names, [info.base_name for info in infos])
    prefix = f"{folder}/" if "/" in place or location.exists() else ""
    return tuple(_open(f"{prefix}{name}{query}", where / name, columns) for name in names)


def _refuse_twice(given: str, names: Sequence[str], everything: Sequence[str]) -> None:
    if "_delta_log" in everything:
        raise TableError(
            f"{given}: is a Delta table, whose files hold superseded rows too; "
            "write its rows to a directory of their own"
        )
    for name in names:
        plain = name.removesuffix(Path(name).suffix)
        if Path(name).suffix in _COMPRESSED and plain in names:
            raise TableError(
                f"{given}: holds {plain} and {name}, the same rows twice; leave one of them"
            )


def _open(name: str, location: Location, columns: Collection[str] | None) -> "TableFile":
    if not location.is_file():
        kind = "is no file" if location.exists() else "no such file"
        raise TableError(f"{name}: {kind}; give a CSV or Parquet file")
    with location.filesystem.open_input_stream(location.path, compression=None) as stream:
        magic = stream.read(4)
    if magic == b"PAR1":
        return _ParquetTable(name, location, columns)
    if magic[:2] == b"\x1f\x8b" and not location.path.endswith(".gz"):
        raise TableError(f"{name}: is compressed by gzip; let its name end in .gz")
    if magic == b"PK\x03\x04":
        raise TableError(f"{name}: is a zip archive; unpack it")
    return _CsvTable(name, location, columns)


def _read_columns(columns: Sequence[str], wanted: Collection[str] | None) -> list[str] | None:
    """Return those to read, None for all of them."""
    found = None if wanted is None else [name for name in columns if name in wanted]
    return found or None


class _ParquetTable:
    def __init__(self, name: str, location: Location, wanted: Collection[str] | None) -> None:
        self.name = name
        self.location = location
        with self._open() as file:
            self.columns: Sequence[str] = tuple(file.schema_arrow.names)
        self._read = _read_columns(self.columns, wanted)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(
                self.location.filesystem.open_input_file(self.location.path),
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
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=self._read):
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

    def __init__(self, name: str, location: Location, wanted: Collection[str] | None) -> None:
        self.name = name
        self.location = location
        self.columns: Sequence[str] = tuple(self._read_header())
        self._read = _read_columns(self.columns, wanted)

    def _text(self) -> io.TextIOWrapper:
        stream = self.location.filesystem.open_input_stream(self.location.path)
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
        first_row, last, last_cell = 1, self.columns[-1], ""
        try:
            with self.location.filesystem.open_input_stream(self.location.path) as stream:
                reader = pacsv.open_csv(
                    stream,
                    read_options=pacsv.ReadOptions(block_size=_BLOCK_BYTES),
                    parse_options=pacsv.ParseOptions(newlines_in_values=True),
                    convert_options=pacsv.ConvertOptions(
                        column_types={name: pa.string() for name in self.columns},
                        include_columns=self._read and list(dict.fromkeys([*self._read, last])),
                        strings_can_be_null=False,
                    ),
                )
                for batch in reader:
                    rows = batch if self._read is None else batch.select(self._read)
                    yield RawBatch(first_row, rows)
                    first_row += batch.num_rows
                    if batch.num_rows:
                        last_cell = batch.column(batch.num_columns - 1)[-1].as_py()
            if "\n" in last_cell or "\r" in last_cell:
                self._check_closed(first_row - 1)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if "Empty CSV file or block" in str(error):
                return  # a header and nothing after it
            raise self._explain(error, first_row - 1) from error

    def _check_closed(self, num_rows: int) -> None:
        """Refuse a quote that nothing closes: pyarrow takes what follows it for one cell."""
        end = b""
        with self.location.filesystem.open_input_stream(self.location.path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                end = (end + block)[-_END_BYTES:].rstrip(b"\r\n")
        if not end.endswith(b'"'):
            raise TableError(
                f"{self.name}: row {num_rows}: the quote that opens column {self.columns[-1]!r} is "
                "not closed before the file ends; close it"
            )

    def _explain(self, error: Exception, rows_read: int) -> TableError:
        reason = one_line(error)
        if "UTF8" in reason or isinstance(error, UnicodeDecodeError):
            return TableError(
                f"{self.name}: a cell after row {rows_read} is not UTF-8 text; "
                "convert the file to UTF-8"
            )
        with contextlib.suppress(csv.Error, OSError):  # then the first error is all there is
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


TableFile = _ParquetTable | _CsvTable
"""A file of rows: a `RowSource` that knows its location."""
