"""Why a search ends before its trials are done: a signal, a spent budget, or no lane left."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

__all__ = ["StopRequests"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_PER_HOUR = 3600


class StopRequests:
    """Listens for requests to stop, for as long as its context lasts.

    The first SIGINT or SIGTERM stops the search in order; a second one raises KeyboardInterrupt.
    Signals are heard in the main thread only; elsewhere they keep their handlers.

    Attributes:
        interrupted: whether a signal came.
        failure: why the job cannot go on, if it cannot.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._handlers: dict[signal.Signals, object] = {}
        self.interrupted = False
        self.failure: str | None = None

    def fail(self, reason: str) -> None:
        """Stop the search because the job cannot go on; may be called from any thread."""
        self.failure = reason
        self._requested.set()

    @contextmanager
    def passed_to(self, stop: Callable[[str], None], hours: float | None = None) -> Iterator[None]:
        """Pass the first request on, an earlier one at once, while the context lasts.

        Args:
            stop: called once with the reason, in a thread of its own.
            hours: the job's budget, from here on; None for no limit.
        """
        over = threading.Event()

        def watch() -> None:
            in_time = self._requested.wait(None if hours is None else hours * SECONDS_PER_HOUR)
            if over.is_set():
                return
            if self.interrupted:
                stop("interrupted")
            elif self.failure is not None:
                stop(self.failure)
            elif not in_time:
                stop("the budget is spent")

        thread = threading.Thread(target=watch, name="stop-requests", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            self._requested.set()
            thread.join()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._requested.set()
