"""Why a search ends before its trials are done: a signal, a spent budget, or no lane left."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

__all__ = ["StopRequests"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_PER_HOUR = 3600
POLL_S = 0.1


class StopRequests:
    """Listens for requests to stop, for as long as its context lasts.

    The first SIGINT or SIGTERM stops the search in order; a second one raises KeyboardInterrupt.
    Signals are heard in the main thread only; elsewhere they keep their handlers.

    Attributes:
        interrupted: whether a signal came.
        failure: why the job cannot go on, if it cannot.
    """

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, object] = {}
        self.interrupted = False
        self.failure: str | None = None

    def fail(self, reason: str) -> None:
        """Stop the search because the job cannot go on; may be called from any thread."""
        self.failure = reason

    @contextmanager
    def passed_to(self, stop: Callable[[str], None], hours: float | None = None) -> Iterator[None]:
        """Pass the first request on, an earlier one at once, while the context lasts.

        Args:
            stop: called once with the reason, in a thread of its own.
            hours: the budget, from here on; None for no limit.
        """
        over = threading.Event()
        deadline = None if hours is None else time.monotonic() + hours * SECONDS_PER_HOUR

        def watch() -> None:
            while not over.wait(POLL_S):
                reason = self._reason(deadline)
                if reason is not None:
                    stop(reason)
                    return

        self._listen()  # again: Ray takes SIGTERM for itself when it starts
        thread = threading.Thread(target=watch, name="stop-requests", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _reason(self, deadline: float | None) -> str | None:
        if self.interrupted:
            return "interrupted"
        if self.failure is not None:
            return self.failure
        if deadline is not None and time.monotonic() >= deadline:
            return "the budget is spent"
        return None

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            before = signal.signal(number, self._on_signal)
            self._handlers.setdefault(number, before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
