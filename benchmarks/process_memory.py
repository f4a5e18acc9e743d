"""The memory of every process of a program over time (Linux)."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

SAMPLE_S = 1.0
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One process's own memory early and late, in MB: means of its samples."""

    process: str
    early_mb: float
    late_mb: float


class ProcessMemory:
    """Samples this process and all below it, in a thread, for as long as its context lasts.

    What is counted is the memory that would be freed if the process ended (USS): pages that
    processes share, such as a dataset loaded once for all lanes, are nobody's own.
    """

    def __init__(self) -> None:
        self._samples: dict[int, list[tuple[float, float]]] = {}
        self._names: dict[int, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def growth(self, early: tuple[float, float], late: tuple[float, float]) -> list[Growth]:
        """Compare two spans of time (of `time.time`), process by process, the largest first.

        A process that came between the two counts as grown from nothing.
        """
        rows = [
            Growth(
                process=self._names[pid],
                early_mb=_mean(samples, early),
                late_mb=_mean(samples, late),
            )
            for pid, samples in self._samples.items()
        ]
        return sorted(
            (row for row in rows if row.late_mb), key=lambda row: row.late_mb, reverse=True
        )

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            this = psutil.Process()
            for process in (this, *this.children(recursive=True)):
                try:
                    self._names[process.pid] = _name(process)
                    size_mb = process.memory_full_info().uss / MB
                except psutil.Error:
                    continue  # it has ended meanwhile
                self._samples.setdefault(process.pid, []).append((time.time(), size_mb))


def _mean(samples: Sequence[tuple[float, float]], span: tuple[float, float]) -> float:
    inside = [size for when, size in samples if span[0] <= when <= span[1]]
    return sum(inside) / len(inside) if inside else 0.0


def _name(process: psutil.Process) -> str:
    """Ray's title of a worker, without the method that it is in; else the program or script."""
    command = process.cmdline() or [process.name()]
    if command[0].startswith("ray::"):
        return command[0].removeprefix("ray::").partition("(")[0].partition(".")[0]
    scripts = [part for part in command[1:4] if part.endswith(".py")]
    return (scripts or command)[0].rpartition("/")[2]


def parts(driver: psutil.Process, title: str) -> list[psutil.Process]:
    """List a driver's processes whose title begins so; the driver itself where there is none."""
    if not title:
        return [driver]
    found = []
    for child in driver.children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith(title):
                found.append(child)
        except psutil.Error:
            continue
    return found
