"""The rows of a split, and the order in which a trial trains on them: held in memory, or streamed.

Both kinds give endless epochs of batches of one size. The order depends on the seed, the kind of
device and, where rows are streamed, the number of workers, so that a trial can begin at any step.
Shapes: N impressions of a split, B of a batch, F categorical fields, D numericals, T labels
(clicks, conversions).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch

from datasets import Dataset, Impressions
from datasets.streaming import StreamedSplit, Window
from trainables.models import Inputs
from trainables.workers import Workers

__all__ = [
    "WINDOWS_HELD",
    "Batch",
    "BatchShape",
    "Batches",
    "DeviceImpressions",
    "Rows",
    "StreamedRows",
    "inputs_of",
]

WINDOWS_HELD = 4
"""Windows that streaming holds at most: in use, ready, and two while one is read and shuffled."""


def inputs_of(dataset: Dataset) -> Inputs:
    """Return what a model of a dataset's rows reads, as its manifest has it."""
    manifest = dataset.manifest
    return Inputs(
        vocabulary_sizes=tuple(manifest.vocabulary_sizes.values()),
        num_numericals=len(manifest.table.numerical),
        bag_lengths=manifest.bag_lengths,
    )


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How an epoch is cut into batches; what does not fill a batch of all workers is left out.

    Attributes:
        steps_per_epoch: batches of an epoch, the same on every worker.
        rows: impressions of one worker in one batch.
        seed: of the order.
    """

    steps_per_epoch: int
    rows: int
    seed: int


class Batch(Protocol):
    """The rows of a batch, on the worker's device: there already, or to be selected."""

    def load(self) -> "DeviceImpressions":
        """Give the rows."""
        ...

    def clone(self) -> Self:
        """Copy what says which rows they are into memory of its own."""
        ...

    def copy_(self, other: Self) -> None:
        """Become another batch of as many rows, in the same memory."""
        ...


class Batches(Protocol):
    """One worker's batches, epoch after epoch without end."""

    def next(self) -> Batch:
        """Give the next batch; all are of one kind."""
        ...

    def seek(self, step: int) -> None:
        """Go to where `step` batches have been given since the beginning."""
        ...


class Rows(Protocol):
    """A split on its way to a device; the labels of all its rows are there, in stored order."""

    @property
    def clicks_N(self) -> torch.Tensor:  # noqa: N802
        """0 or 1, (N,) uint8."""
        ...

    @property
    def conversions_N(self) -> torch.Tensor:  # noqa: N802
        """0 or 1, (N,) uint8."""
        ...

    def __len__(self) -> int: ...

    def batches(self, shape: BatchShape, workers: Workers) -> Batches:
        """Give this worker's batches for training."""
        ...

    def chunks(self, share: slice, max_rows: int) -> "Iterator[DeviceImpressions]":
        """Give the rows of a share in stored order, about `max_rows` at a time."""
        ...


@dataclass(frozen=True)
class DeviceImpressions:
    """A split on a device: `ids_NF` integers, `numericals_ND` floats, `labels_NT` uint8.

    F counts columns of ids: a bag has as many as it is long. Models get numericals as float32. T is
    2, clicks and conversions: rows in random order are read from memory once for both.
    """

    ids_NF: torch.Tensor
    numericals_ND: torch.Tensor
    labels_NT: torch.Tensor

    @classmethod
    def from_impressions(
        cls, impressions: Impressions, device: torch.device
    ) -> "DeviceImpressions":
        """Copy a loaded split to a device."""
        return cls(
            torch.from_numpy(impressions.ids_NF).to(device),
            torch.from_numpy(impressions.numericals_ND).to(device),
            torch.from_numpy(
                np.stack([impressions.clicks_N, impressions.conversions_N], axis=1)
            ).to(device),
        )

    @property
    def clicks_N(self) -> torch.Tensor:  # noqa: N802
        """0 or 1, (N,) uint8."""
        return self.labels_NT[:, 0]

    @property
    def conversions_N(self) -> torch.Tensor:  # noqa: N802
        """0 or 1, (N,) uint8."""
        return self.labels_NT[:, 1]

    def __len__(self) -> int:
        return len(self.labels_NT)

    def load(self) -> "DeviceImpressions":
        """As a batch: all its rows."""
        return self

    def clone(self) -> "DeviceImpressions":
        """Copy the rows."""
        return DeviceImpressions(*(column.clone() for column in self._columns))

    def copy_(self, other: "DeviceImpressions") -> None:
        """Become other rows, as many, in the same memory."""
        for column, values in zip(self._columns, other._columns, strict=True):
            column.copy_(values)

    def rows(self, index: torch.Tensor | slice) -> "DeviceImpressions":
        """Select rows, in the order of `index`."""
        return DeviceImpressions(
            *(
                # Row by row: indexing by a tensor goes element by element, 4 times as long.
                column[index] if isinstance(index, slice) else column.index_select(0, index)
                for column in self._columns
            )
        )

    @property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        return (self.ids_NF, self.numericals_ND, self.labels_NT)

    def batches(self, shape: BatchShape, workers: Workers) -> Batches:
        """All workers hold the same rows and permute them alike; each takes its slice of a batch.

        The batch of all workers is then the same whatever their number, if it divides by that.
        """
        return _MemoryBatches(self, shape, workers)

    def chunks(self, share: slice, max_rows: int) -> "Iterator[DeviceImpressions]":
        """Give views of the rows."""
        for start in range(share.start, share.stop, max_rows):
            yield self.rows(slice(start, min(start + max_rows, share.stop)))


@dataclass(frozen=True)
class _Selection:
    split: DeviceImpressions
    index_B: torch.Tensor

    def load(self) -> DeviceImpressions:
        return self.split.rows(self.index_B)

    def clone(self) -> "_Selection":
        return _Selection(self.split, self.index_B.clone())

    def copy_(self, other: "_Selection") -> None:
        self.index_B.copy_(other.index_B)


class _MemoryBatches:
    def __init__(self, split: DeviceImpressions, shape: BatchShape, workers: Workers) -> None:
        self._split = split
        self._shape = shape
        self._workers = workers
        self.seek(0)

    def seek(self, step: int) -> None:
        device = self._workers.device
        self._generator = torch.Generator(device).manual_seed(self._shape.seed)
        epoch, self._position = divmod(step, self._shape.steps_per_epoch)
        for _ in range(epoch + 1):
            self._permute()

    def next(self) -> Batch:
        if self._position == self._shape.steps_per_epoch:
            self._permute()
            self._position = 0
        rows = self._shape.rows
        start = (self._position * self._workers.size + self._workers.rank) * rows
        self._position += 1
        return _Selection(self._split, self._order[start : start + rows])

    def _permute(self) -> None:
        self._order = torch.randperm(
            len(self._split), generator=self._generator, device=self._workers.device
        )


class StreamedRows:
    """A split that is read from the dataset again in every epoch.

    Args:
        split: to read.
        device: where batches go; the labels of all rows are held there.
        window_rows: that are held and shuffled together; the next such window is read meanwhile.
        labelled: whether the labels of all rows are read first, as an evaluation needs them.
    """

    def __init__(
        self, split: StreamedSplit, device: torch.device, window_rows: int, *, labelled: bool
    ) -> None:
        self._split = split
        self._device = device
        self._window_rows = window_rows
        clicks_N, conversions_N = (
            split.labels() if labelled else (np.empty(0, np.uint8), np.empty(0, np.uint8))
        )
        self.clicks_N = torch.from_numpy(clicks_N).to(device)
        self.conversions_N = torch.from_numpy(conversions_N).to(device)

    def __len__(self) -> int:
        return self._split.num_rows

    def batches(self, shape: BatchShape, workers: Workers) -> Batches:
        """Every epoch lays the row groups in a new order and deals each worker a stretch of them.

        A worker reads its own stretch alone, and shuffles it window by window. What is in a batch
        depends on the number of workers, other than in memory.
        """
        return _StreamedBatches(self._split, self._device, self._window_rows, shape, workers)

    def chunks(self, share: slice, max_rows: int) -> Iterator[DeviceImpressions]:
        """Read the rows window by window, one ahead."""
        order = self._split.stored_order()
        windows = self._split.windows(order, share.start, share.stop, self._window_rows)
        if not windows:
            return  # more workers than rows
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self._split.read, order, window) for window in windows[:1]]
            for following in [*windows[1:], None]:
                rows = ahead.pop().result()
                if following is not None:
                    ahead.append(reader.submit(self._split.read, order, following))
                held = DeviceImpressions.from_impressions(rows, self._device)
                yield from held.chunks(slice(0, len(held)), max_rows)


class _StreamedBatches:
    def __init__(
        self,
        split: StreamedSplit,
        device: torch.device,
        window_rows: int,
        shape: BatchShape,
        workers: Workers,
    ) -> None:
        self._split = split
        self._device = device
        self._window_rows = window_rows
        self._shape = shape
        share = shape.steps_per_epoch * shape.rows
        self._stretch = Window(workers.rank * share, (workers.rank + 1) * share)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self.seek(0)

    def seek(self, step: int) -> None:
        epoch, position = divmod(step, self._shape.steps_per_epoch)
        self._row = position * self._shape.rows  # of this worker's stretch
        self._windows = self._from(epoch, self._stretch.start + self._row)
        self._ahead = self._read_ahead()
        self._held: DeviceImpressions | None = None
        self._held_from = 0

    def next(self) -> Batch:
        parts, missing = [], self._shape.rows
        while missing:
            if self._held is None or self._held_from == len(self._held):
                self._held, self._held_from = self._take_window()
            taken = min(missing, len(self._held) - self._held_from)
            parts.append(self._held.rows(slice(self._held_from, self._held_from + taken)))
            self._held_from += taken
            missing -= taken
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _from(self, epoch: int, row: int) -> Iterator[tuple[int, Window, int]]:
        """Give windows without end: the epoch, the window, and how many of its rows to skip."""
        while True:
            order = self._split.shuffled_order(self._shape.seed, epoch)
            windows = self._split.windows(
                order, self._stretch.start, self._stretch.stop, self._window_rows
            )
            for window in windows:
                if window.stop > row:
                    yield epoch, window, max(row - window.start, 0)
            epoch, row = epoch + 1, 0

    def _read_ahead(self) -> Future[tuple[Impressions, int]]:
        return self._reader.submit(self._read_shuffled, *next(self._windows))

    def _read_shuffled(self, epoch: int, window: Window, skip: int) -> tuple[Impressions, int]:
        rows = self._split.read(self._split.shuffled_order(self._shape.seed, epoch), window)
        seed = (self._shape.seed, epoch, window.start)
        return rows.take(np.random.default_rng(seed).permutation(len(window))), skip

    def _take_window(self) -> tuple[DeviceImpressions, int]:
        rows, skip = self._ahead.result()
        self._held = None  # frees the memory before the next window is read
        held = DeviceImpressions.from_impressions(rows, self._device)
        self._ahead = self._read_ahead()
        return held, skip


def _joined(parts: list[DeviceImpressions]) -> DeviceImpressions:
    columns = zip(*(part._columns for part in parts), strict=True)
    return DeviceImpressions(*(torch.cat(column) for column in columns))
