"""Where the batches of sources are read and worked on: here, or wherever a caller says."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from datasets.pipeline import map_in_order
from datasets.table_reader import RawBatch, RowSource

__all__ = ["MapSources", "SplitSource", "map_sources_here"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class SplitSource:
    """A source, and the split that its rows were given for."""

    split: str
    rows: RowSource


class MapSources(Protocol):
    """Applies a function to every batch of every source.

    It gives one iterator of results per source, in the order of the sources and of their batches,
    each to be read to its end before the next. A failure of the function is raised where its
    result would have come. What it holds it gives back at its end, or when it is closed.
    """

    def __call__(
        self,
        function: Callable[[SplitSource, RawBatch], Result],
        sources: Sequence[SplitSource],
    ) -> Generator[Iterator[Result], None, None]:
        """Begin; nothing needs to be read before the results are asked for."""
        ...


def map_sources_here(
    function: Callable[[SplitSource, RawBatch], Result], sources: Sequence[SplitSource]
) -> Generator[Iterator[Result], None, None]:
    """Read one source after another, the batches of each on all cores (`MapSources`)."""
    for source in sources:
        with closing(map_in_order(partial(function, source), source.rows.batches())) as results:
            yield results
