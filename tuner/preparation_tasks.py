"""Preparation over a Ray cluster: one task per input file, its results in the files' order.

The work on a batch is that of a preparation on one machine (`datasets.batch_work`), and so are the
merging and the writing, which stay with the caller: the dataset is the same, to its digest.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from datasets import RawBatch, SplitSource
from datasets.errors import one_line
from tuner.cluster import free_resources
from tuner.errors import ClusterError

__all__ = ["map_sources_on_cluster"]

Result = TypeVar("Result")

PLACEMENT_WAIT_S = 60.0
PART_PLACEMENT_WAIT_S = 10.0
"""For several cores at once, before half as many are asked for."""

WAITING_RESULTS = 2
"""Per task: what it has read ahead of the caller; memory is bounded by these."""


def _read(
    function: Callable[[SplitSource, RawBatch], Result], source: SplitSource
) -> Iterator[Result]:
    for raw in source.rows.batches():
        yield function(source, raw)


def _results(stream: "Iterable[ray.ObjectRef[Result]]") -> Iterator[Result]:
    for reference in stream:
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise ClusterError(
                f"cluster: a task of the preparation was lost ({one_line(error)}); start it again"
            ) from error
        yield result


@contextmanager
def _held_cores(wanted: int) -> Iterator[PlacementGroup]:
    """Hold as many cores, or half as many, and so on: a core may be free in halves on two nodes.

    Raises:
        ClusterError: if no core is free within a minute.
    """
    group = placement_group([{"CPU": 1}] * max(wanted, 1), strategy="SPREAD")
    try:
        while not group.wait(
            PLACEMENT_WAIT_S if group.bundle_count == 1 else PART_PLACEMENT_WAIT_S
        ):
            if group.bundle_count == 1:
                raise ClusterError(
                    f"cluster: no core was free within {PLACEMENT_WAIT_S:.0f} s; wait for its "
                    "jobs, or prepare without --ray"
                )
            remove_placement_group(group)
            group = placement_group([{"CPU": 1}] * (group.bundle_count // 2), strategy="SPREAD")
        yield group
    finally:
        remove_placement_group(group)


def map_sources_on_cluster(
    function: Callable[[SplitSource, RawBatch], Result], sources: Sequence[SplitSource]
) -> Generator[Iterator[Result], None, None]:
    """Read the sources by Ray tasks, as many at once as there are free cores (`MapSources`).

    The cores are held from the first result to the last, so that the task whose results come next
    can always run. Every node needs the sources' files and this package.

    Raises:
        ClusterError: if no core is free within a minute.
    """
    with _held_cores(min(int(free_resources().get("CPU", 0)), len(sources))) as group:
        task = ray.remote(_read).options(
            num_cpus=1,
            num_returns="streaming",
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            _generator_backpressure_num_objects=WAITING_RESULTS,
        )
        shared = ray.put(function)  # it may hold the vocabularies: once, not per task
        waiting = iter(sources)
        streams = deque(
            task.remote(shared, source) for source in islice(waiting, group.bundle_count)
        )
        while streams:
            yield _results(streams.popleft())
            streams.extend(task.remote(shared, source) for source in islice(waiting, 1))
