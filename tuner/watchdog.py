"""Ends a process that hangs, also one that hangs in C, where no exception reaches it."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Watchdog"]

STDERR = 2
"""A file descriptor: Ray keeps what is written to it as the worker's log."""


class Watchdog:
    """Writes the stacks of all threads to standard error and exits, once nothing has moved.

    There is one per process, by `faulthandler`.

    Args:
        seconds: after the last sign of life.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def pat(self) -> None:
        """Give a sign of life."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=STDERR)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context lasts."""
        self.pat()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Watch nothing while the context lasts, and go on watching after it."""
        faulthandler.cancel_dump_traceback_later()
        yield
        self.pat()
