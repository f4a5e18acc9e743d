"""Reading a split window by window, for datasets larger than memory.

An order of the row groups lays all rows on one line; a window is a stretch of that line that ends
where a row group does, wherever it can, so that few row groups are read twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datasets.loading import Impressions, SplitReader

__all__ = ["StreamedSplit", "Window"]


@dataclass(frozen=True)
class Window:
    """A stretch of the rows in some order: from `start` to before `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class StreamedSplit:
    """The rows of one split, none of them held.

    Args:
        reader: of the split.

    Attributes:
        num_rows: of the whole split.
        num_groups: row groups, the smallest stretches that are read whole.

    Raises:
        DatasetError: a part is missing or damaged.
    """

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self._groups = reader.row_groups()
        self._sizes = np.array([group.num_rows for group in self._groups], np.int64)
        self.num_rows = int(self._sizes.sum())
        self.num_groups = len(self._groups)

    def stored_order(self) -> npt.NDArray[np.int64]:
        """The row groups as they are stored."""
        return np.arange(self.num_groups)

    def shuffled_order(self, *seed: int) -> npt.NDArray[np.int64]:
        """A random order of the row groups, the same for the same seed."""
        return np.random.default_rng(seed).permutation(self.num_groups)

    def windows(
        self, order: npt.NDArray[np.int64], start: int, stop: int, max_rows: int
    ) -> list[Window]:
        """Cut a stretch of the rows into windows.

        Args:
            order: of the row groups.
            start: first row of the stretch.
            stop: row after its last one; an empty stretch has no windows.
            max_rows: of a window; one of a single row group may have more.
        """
        ends = np.cumsum(self._sizes[order])
        found = []
        while start < stop:
            whole = np.searchsorted(ends, start + max_rows, side="right")  # groups that fit
            first = np.searchsorted(ends, start, side="right")
            end = min(int(ends[max(int(whole) - 1, int(first))]), stop)
            found.append(Window(start, end))
            start = end
        return found

    def read(self, order: npt.NDArray[np.int64], window: Window) -> Impressions:
        """Read a window's rows, in the order of the row groups.

        Raises:
            DatasetError: a part is missing, damaged, or has other rows than the manifest says.
        """
        ends = np.cumsum(self._sizes[order])
        first = int(np.searchsorted(ends, window.start, side="right"))
        last = int(np.searchsorted(ends, window.stop, side="left"))
        rows = self._reader.read_groups([self._groups[index] for index in order[first : last + 1]])
        skipped = window.start - (int(ends[first - 1]) if first else 0)
        return rows.slice(skipped, skipped + len(window))

    def labels(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read the clicks and the conversions of all rows, as they are stored: two bytes a row.

        Raises:
            DatasetError: a part is missing, damaged, or has other rows than the manifest says.
        """
        return self._reader.read_labels(self._groups)

    def chunks(self, start: int, stop: int, max_rows: int) -> Iterator[Impressions]:
        """Give the rows from `start` to before `stop`, as they are stored, window by window."""
        order = self.stored_order()
        for window in self.windows(order, start, stop, max_rows):
            yield self.read(order, window)
