"""Reading a split into contiguous arrays, in memory or once per node in memory-mapped files.

Row groups are decoded by all cores. Columns are normalised while they are in the cache and then
turned into rows block by block: writing column after column into rows touches every cache line
once per column.

Shape suffixes: N impressions, F id columns (one per categorical field, one per place of a bag), D
numerical fields.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.encoder import Encoder
from datasets.errors import DatasetError, one_line
from datasets.filesystem import Location
from datasets.manifest import FileSum, Manifest
from datasets.node_cache import (
    READY,
    cache_entry,
    cache_fault,
    empty_entry,
    locked,
    make_cache,
    remove_unused,
)
from datasets.pipeline import map_in_order
from datasets.schema import CLICK, CONVERSION

__all__ = [
    "Impressions",
    "RowGroup",
    "SplitReader",
    "shared_impressions",
]

_PARQUET_TAIL_BYTES = 8
"""After a Parquet file's metadata: its length and the magic number."""
_BLOCK_ROWS = 2048
_BLOCK_PAD = 16  # columns a power of two apart fall into the same sets of the cache


@dataclass(frozen=True)
class Impressions:
    """The rows of one split, ready for a model; all arrays are contiguous.

    Attributes:
        ids_NF: Category ids in the smallest integer type that holds the largest vocabulary; -1 at
            a place that a bag does not fill.
        numericals_ND: Normalised numerical values, float32 or float16 by the schema.
        clicks_N: 0 or 1, uint8.
        conversions_N: 0 or 1, uint8; 1 only where the click is 1.
    """

    ids_NF: npt.NDArray[np.signedinteger[Any]]
    numericals_ND: npt.NDArray[np.floating[Any]]
    clicks_N: npt.NDArray[np.uint8]
    conversions_N: npt.NDArray[np.uint8]

    @property
    def num_impressions(self) -> int:
        """The number of rows."""
        return len(self.clicks_N)

    @property
    def size_bytes(self) -> int:
        """The size of all arrays."""
        arrays = (self.ids_NF, self.numericals_ND, self.clicks_N, self.conversions_N)
        return sum(array.nbytes for array in arrays)

    def slice(self, start: int, stop: int) -> "Impressions":
        """Give the rows from ``start`` to before ``stop``, without a copy."""
        return Impressions(
            self.ids_NF[start:stop],
            self.numericals_ND[start:stop],
            self.clicks_N[start:stop],
            self.conversions_N[start:stop],
        )

    def take(self, index_N: npt.NDArray[np.int64]) -> "Impressions":
        """Copy the rows of ``index_N``, in its order."""
        return Impressions(
            self.ids_NF[index_N],
            self.numericals_ND[index_N],
            self.clicks_N[index_N],
            self.conversions_N[index_N],
        )


class _MakeArray(Protocol):
    def __call__(self, name: str, shape: tuple[int, ...], kind: type[Any]) -> npt.NDArray[Any]: ...


def _in_memory(name: str, shape: tuple[int, ...], kind: type[Any]) -> npt.NDArray[Any]:
    return np.empty(shape, kind)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a part, and where its first row goes."""

    part: Location
    metadata: pq.FileMetaData
    index: int
    start: int

    @property
    def num_rows(self) -> int:
        """The number of its rows."""
        return int(self.metadata.row_group(self.index).num_rows)


class SplitReader:
    """Reads one split of a prepared dataset.

    Args:
        uri: What messages call the dataset.
        directory: Where it lies.
        manifest: Its manifest.
        split: The name of the split; it must be there.
        encoder: The dataset's encoder.
    """

    def __init__(
        self, uri: str, directory: Location, manifest: Manifest, split: str, encoder: Encoder
    ) -> None:
        self._uri = uri
        self._directory = directory
        self._split = split
        self._summary = manifest.splits[split]
        self._files = manifest.files
        self._encoder = encoder

    def read(self, make: _MakeArray = _in_memory) -> Impressions:
        """Read all rows, in the order in which they are stored, into arrays that ``make`` gives.

        Raises:
            DatasetError: A part is missing, damaged, or has other rows than the manifest says.
        """
        impressions = self._make(self._summary.impressions, make)
        for _ in map_in_order(partial(self._fill, impressions), self._row_groups()):
            pass
        pa.default_memory_pool().release_unused()  # what decoding needed
        return impressions

    def row_groups(self) -> list[RowGroup]:
        """List the row groups in the order in which they are stored.

        Raises:
            DatasetError: A part is missing or damaged, or they have other rows than the manifest.
        """
        return list(self._row_groups())

    def read_groups(self, groups: Sequence[RowGroup]) -> Impressions:
        """Read the rows of some row groups, one after another, in this thread.

        Raises:
            DatasetError: A part is missing or damaged.
        """
        impressions = self._make(sum(group.num_rows for group in groups), _in_memory)
        for group in _laid_out(groups):
            self._fill(impressions, group)
        return impressions

    def read_labels(
        self, groups: Sequence[RowGroup]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read the clicks and the conversions of some row groups, and no other column.

        Raises:
            DatasetError: A part is missing or damaged.
        """
        labels = np.empty((2, sum(group.num_rows for group in groups)), np.uint8)
        for group in _laid_out(groups):
            rows = self._read_row_group(group, [CLICK, CONVERSION])
            stop = group.start + rows.num_rows
            labels[0, group.start : stop] = rows.column(CLICK).to_numpy()
            labels[1, group.start : stop] = rows.column(CONVERSION).to_numpy()
        return labels[0], labels[1]

    def first_rows(self, num_rows: int) -> pa.Table:
        """Read the first rows as they are stored: ids and raw numericals; fewer if fewer are there.

        Raises:
            DatasetError: The first part is missing or damaged.
        """
        columns = [*self._encoder.id_columns, *self._encoder.numerical]
        return self._read_row_group(next(self._row_groups()), columns).slice(0, num_rows)

    def _make(self, num_rows: int, make: _MakeArray) -> Impressions:
        return Impressions(
            make("ids_NF", (num_rows, len(self._encoder.id_columns)), self._encoder.id_type),
            make(
                "numericals_ND",
                (num_rows, len(self._encoder.numerical)),
                self._encoder.numerical_type,
            ),
            make("clicks_N", (num_rows,), np.uint8),
            make("conversions_N", (num_rows,), np.uint8),
        )

    def _row_groups(self) -> Iterator[RowGroup]:
        num_rows, start = self._summary.impressions, 0
        for name in self._summary.parts:
            part = self._directory / name
            try:
                with part.filesystem.open_input_file(part.path) as stream:
                    metadata = pq.ParquetFile(stream).metadata
                    recorded = self._files.get(name)
                    if recorded is not None:
                        _check_footer(stream, metadata, recorded)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._unreadable(part, error) from error
            if start + metadata.num_rows > num_rows:
                raise self._wrong_rows(part.path, num_rows, start + metadata.num_rows)
            for index in range(metadata.num_row_groups):
                group = RowGroup(part, metadata, index, start)
                yield group
                start += group.num_rows
        if start != num_rows:
            raise self._wrong_rows(self._split, num_rows, start)

    def _fill(self, impressions: Impressions, group: RowGroup) -> None:
        try:
            self._fill_rows(impressions, self._read_row_group(group), group.start)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise self._unreadable(group.part, error) from error

    def _read_row_group(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        try:
            with group.part.filesystem.open_input_file(group.part.path) as stream:
                file = pq.ParquetFile(
                    stream, metadata=group.metadata, page_checksum_verification=True
                )
                return file.read_row_group(group.index, columns, use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(group.part, error) from error

    def _fill_rows(self, impressions: Impressions, rows: pa.Table, start: int) -> None:
        stop = start + rows.num_rows
        ids_FN = [rows.column(name).to_numpy() for name in self._encoder.id_columns]
        _transpose(ids_FN, impressions.ids_NF[start:stop])
        numericals_DN = [
            self._encoder.normalize_column(name, rows.column(name).to_numpy())
            for name in self._encoder.numerical
        ]
        _transpose(numericals_DN, impressions.numericals_ND[start:stop])
        impressions.clicks_N[start:stop] = rows.column(CLICK).to_numpy()
        impressions.conversions_N[start:stop] = rows.column(CONVERSION).to_numpy()

    def _unreadable(self, part: Location, error: Exception) -> DatasetError:
        reason = one_line(error)
        return DatasetError(
            f"{self._uri}: cannot read {part.path} ({reason}); prepare the dataset again"
        )

    def _wrong_rows(self, where: str, expected: int, found: int) -> DatasetError:
        return DatasetError(
            f"{self._uri}: {where} holds {found} rows, the manifest says {expected}; "
            "prepare the dataset again"
        )


def _check_footer(stream: pa.NativeFile, metadata: pq.FileMetaData, recorded: FileSum) -> None:
    """Check that a part ends as it was written.

    Raises:
        ValueError: It does not.
    """
    if stream.size() != recorded.size_bytes:
        raise ValueError(f"it has {stream.size()} bytes, the manifest says {recorded.size_bytes}")
    length = metadata.serialized_size + _PARQUET_TAIL_BYTES
    stream.seek(recorded.size_bytes - length)
    sha256 = hashlib.sha256(stream.read(length)).hexdigest()
    if recorded.footer_sha256 not in (None, sha256):
        raise ValueError("its footer is not what was written, by its checksum")


def _laid_out(groups: Sequence[RowGroup]) -> Iterator[RowGroup]:
    """Give row groups their places one after another."""
    start = 0
    for group in groups:
        yield replace(group, start=start)
        start += group.num_rows


def _transpose(columns: list[npt.NDArray[Any]], rows: npt.NDArray[Any]) -> None:
    """Write columns into the rows of a contiguous array, as many at a time as the cache holds."""
    if not columns:
        return
    kind = rows.dtype
    block = np.empty((len(columns), _BLOCK_ROWS + _BLOCK_PAD), kind)
    for start in range(0, len(rows), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(rows))
        for index, column in enumerate(columns):
            block[index, : stop - start] = column[start:stop]
        rows[start:stop] = block[:, : stop - start].T


def shared_impressions(reader: SplitReader, manifest: Manifest, split: str) -> Impressions:
    """Give a split's arrays as private mappings of files that all processes of the node share.

    The first process that asks writes the files, the others wait for it. Pages are shared as long
    as nobody writes to the arrays; a process that does gets a copy of the page. What
    `remove_unused` finds is removed before others are written.

    Raises:
        DatasetError: The dataset cannot be read, or the cache not written, or others can write it.
    """
    entry = cache_entry(manifest, split)
    try:
        make_cache()
        entry.mkdir(exist_ok=True)
        with locked(entry):
            if not (entry / READY).exists():
                empty_entry(entry)  # of what a killed process left
                remove_unused(entry.parent)
                reader.read(partial(_mapped_file, entry))
            (entry / READY).touch()
        return Impressions(*(_open_mapped(entry, name) for name in Impressions.__annotations__))
    except OSError as error:
        raise cache_fault(entry, error) from error


def _mapped_file(
    entry: Path, name: str, shape: tuple[int, ...], kind: type[Any]
) -> npt.NDArray[Any]:
    path = entry / f"{name}.npy"
    if 0 in shape:
        np.save(path, np.empty(shape, kind))
        return np.empty(shape, kind)
    size_bytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    if shutil.disk_usage(entry).free < size_bytes:
        raise OSError(f"{size_bytes} bytes needed for {name}, the disk is full")
    array = np.lib.format.open_memmap(path, "w+", np.dtype(kind), shape)
    if hasattr(os, "posix_fallocate"):  # a mapping that outgrows the disk is a SIGBUS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _open_mapped(entry: Path, name: str) -> npt.NDArray[Any]:
    path = entry / f"{name}.npy"
    array: npt.NDArray[Any] = np.load(path, mmap_mode=None if _is_empty(path) else "c")
    return array.view(np.ndarray)


def _is_empty(path: Path) -> bool:
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return 0 in shape
