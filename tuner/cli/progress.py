"""A progress bar for long preparations: rows, rows per second and time left, on a terminal only."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import ProgressReport, ReportProgress

__all__ = ["shown_progress"]


@contextlib.contextmanager
def shown_progress() -> "Iterator[ReportProgress]":
    """Give what a preparation reports to; it shows a bar on standard error if that is a terminal.

    The bar goes when the block ends.
    """
    from datasets.progress import report_nothing

    if not sys.stderr.isatty():
        yield report_nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None, rows="")
        phase, since = "", time.perf_counter()

        def show(report: "ProgressReport") -> None:
            nonlocal phase, since
            if report.phase != phase:
                phase, since = report.phase, time.perf_counter()
                progress.reset(task, description=phase, total=report.total, rows="")
            seconds = max(time.perf_counter() - since, 1e-3)
            rows = f"{report.done:,} {report.unit}" if report.done else ""
            if report.done and report.unit == "rows":
                rows += f"  {report.done / seconds:,.0f}/s"
            progress.update(task, completed=report.done, rows=rows)

        yield show
