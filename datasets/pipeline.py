"""Work on batches by several threads, results in the order of the batches.

numpy, pyarrow and hashing release the interpreter for most of a batch's time, so that threads fill
the cores without a copy of the vocabularies per process. What comes out does not depend on how many
threads there are.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["map_in_order", "num_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_THREADS = 16
_WAITING_PER_THREAD = 1  # beyond the one in work: memory is bounded by these


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not tell


def num_threads() -> int:
    """Return how many threads to work with: a core each, at most 16."""
    return min(num_cores(), _MAX_THREADS)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """Apply a function to every item on several threads; give the results in order.

    At most two items per thread are held. The first failure in the order of the items is raised
    where its result would have come, and what has not begun then is left undone.
    """
    threads = num_threads()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads * (1 + _WAITING_PER_THREAD):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
