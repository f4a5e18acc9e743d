"""Checking a prepared dataset against its manifest: every file's bytes, then what the rows hold.

Shape suffixes: N rows, F id columns (one per categorical field, one per place of a bag), D
numerical fields.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.dataset import Dataset
from datasets.digest import RowSum, dataset_digest
from datasets.errors import DatasetError, one_line
from datasets.filesystem import Location, locate
from datasets.manifest import SplitSummary
from datasets.pipeline import map_in_order
from datasets.progress import ProgressReport, ReportProgress, report_nothing
from datasets.schema import CLICK, CONVERSION, id_columns
from datasets.vocabulary import PADDING_ID, read_vocabularies, vocabularies_hash

__all__ = ["validate"]

_CHUNK_BYTES = 4 << 20
_BATCH_ROWS = 65_536


@dataclass
class _PartContent:
    """What the rows of a part, or of a split, hold."""

    rows: RowSum = field(default_factory=RowSum)
    clicks: int = 0
    conversions: int = 0
    faults: list[str] = field(default_factory=list)

    def merge(self, other: "_PartContent") -> None:
        self.rows.merge(other.rows)
        self.clicks += other.clicks
        self.conversions += other.conversions
        self.faults += other.faults


def validate(dataset: Dataset, *, report: ReportProgress = report_nothing) -> list[str]:
    """Check a dataset; memory holds a few batches.

    Args:
        dataset: The opened dataset.
        report: Told how many rows have been read.

    Returns:
        One line per fault, the file first: missing, truncated or changed files, labels and ids out
        of range, numbers that are not finite, counts and digest that are not the manifest's. Empty
        if the dataset is as it was when it was prepared.
    """
    return _Validation(dataset, report).run()


class _Validation:
    def __init__(self, dataset: Dataset, report: ReportProgress) -> None:
        self.directory = locate(dataset.uri)
        self.manifest = dataset.manifest
        self.report = report
        self.done = 0
        self.total = sum(split.impressions for split in self.manifest.splits.values())

    def run(self) -> list[str]:
        faults = self.check_bytes()
        unreadable = len(faults)
        vocabulary_hash = self.check_vocabularies(faults)
        sums: dict[str, RowSum] = {}
        for name, summary in self.manifest.splits.items():
            found = self.read_split(name, summary)
            faults += found.faults
            sums[name] = found.rows
        if vocabulary_hash is not None and len(faults) == unreadable:
            digest = dataset_digest(
                self.manifest.table, vocabularies_hash=vocabulary_hash, row_sums=sums
            )
            if digest != self.manifest.digest:
                faults.append(
                    f"manifest.json: the content's digest is {digest}, the manifest says "
                    f"{self.manifest.digest}"
                )
        return faults

    def check_bytes(self) -> list[str]:
        """Compare every file with its size and SHA-256; missing files are named by the readers."""
        faults = []
        for name, recorded in self.manifest.files.items():
            file = self.directory / name
            if not file.is_file():
                faults.append(f"{name}: missing")
                continue
            size_bytes, sha256 = _hash_file(file)
            if size_bytes < recorded.size_bytes:
                faults.append(
                    f"{name}: truncated, {size_bytes} bytes instead of {recorded.size_bytes}"
                )
            elif sha256 != recorded.sha256:
                faults.append(f"{name}: changed, its SHA-256 is not the manifest's")
        return faults

    def check_vocabularies(self, faults: list[str]) -> str | None:
        fields = list(self.manifest.table.categorical)
        try:
            vocabularies = read_vocabularies(self.directory, fields)
        except DatasetError as error:
            faults.append(str(error))
            return None
        for name, known in vocabularies.items():
            expected = self.manifest.vocabulary_sizes.get(name)
            if known.size != expected:
                faults.append(
                    f"vocabularies.parquet: field {name!r} has {known.size} ids, the manifest says "
                    f"{expected}"
                )
        return vocabularies_hash(vocabularies)

    def read_split(self, name: str, summary: SplitSummary) -> _PartContent:
        found = _PartContent()
        for part in summary.parts:
            content = _PartContent()
            try:
                for batch in map_in_order(partial(self.read_batch, part), self.batches(part)):
                    content.merge(batch)
                    self.done += batch.rows.rows
                    self.report(ProgressReport("validating rows", self.done, self.total))
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                reason = one_line(error)
                content.faults.append(f"{part}: not readable ({reason})")
            content.faults = content.faults[:1]  # the first rows that are wrong name the rest
            found.merge(content)
        counts = (found.rows.rows, found.clicks, found.conversions)
        expected = (summary.impressions, summary.clicks, summary.conversions)
        if counts != expected and not found.faults:
            found.faults.append(
                f"{name}: holds {counts[0]} impressions, {counts[1]} clicks, {counts[2]} "
                f"conversions; the manifest says {expected[0]}, {expected[1]}, {expected[2]}"
            )
        return found

    def batches(self, part: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        file = self.directory / part
        with file.filesystem.open_input_file(file.path) as stream:
            first_row = 1
            rows = pq.ParquetFile(stream, pre_buffer=False)
            for batch in rows.iter_batches(batch_size=_BATCH_ROWS):
                yield first_row, batch
                first_row += batch.num_rows

    def read_batch(self, part: str, numbered: tuple[int, pa.RecordBatch]) -> _PartContent:
        first_row, batch = numbered
        content = _PartContent()

        def note(what: str, wrong_N: np.ndarray) -> None:
            if wrong_N.any():
                row = first_row + int(wrong_N.argmax())
                content.faults.append(f"{part}: row {row}: {what} ({int(wrong_N.sum())} such rows)")

        field_of = id_columns(self.manifest.table.categorical)
        ids_NF = np.empty((batch.num_rows, len(field_of)), np.int32)
        above: str | None = None  # the field of the column before
        for index, (column, name) in enumerate(field_of.items()):
            ids_N = batch.column(column).to_numpy(zero_copy_only=False)
            ids_NF[:, index] = ids_N
            size = self.manifest.vocabulary_sizes[name]
            low = PADDING_ID if name == above else 0  # a bag is filled from its first place
            note(
                f"field {column!r} has an id outside {low} to {size - 1}",
                (ids_N < low) | (ids_N >= size),
            )
            if name == above:
                note(
                    f"field {column!r} has an id behind a place that is not filled",
                    (ids_N >= 0) & (ids_NF[:, index - 1] < 0),
                )
            above = name
        names = list(self.manifest.table.numerical)
        raw_ND = np.empty((batch.num_rows, len(names)), np.float32)
        for index, name in enumerate(names):
            raw_ND[:, index] = batch.column(name).to_numpy(zero_copy_only=False)
            note(f"field {name!r} is not finite", ~np.isfinite(raw_ND[:, index]))
        click_N = batch.column(CLICK).to_numpy(zero_copy_only=False).astype(np.uint8)
        conversion_N = batch.column(CONVERSION).to_numpy(zero_copy_only=False).astype(np.uint8)
        note("the click label is not 0 or 1", click_N > 1)
        note("the conversion label is not 0 or 1", conversion_N > 1)
        note("a conversion without a click", conversion_N > click_N)
        content.rows.update(ids_NF, raw_ND, click_N, conversion_N)
        content.clicks = int(click_N.sum())
        content.conversions = int(conversion_N.sum())
        return content


def _hash_file(file: Location) -> tuple[int, str]:
    sha256, size_bytes = hashlib.sha256(), 0
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            size_bytes += len(chunk)
    return size_bytes, sha256.hexdigest()
