"""How far a preparation is; who shows it is not this package's concern."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ProgressReport", "ReportProgress", "report_nothing"]


@dataclass(frozen=True)
class ProgressReport:
    """One step forward.

    Attributes:
        phase: What is going on, in words; another phase begins a new count.
        done: What is done in this phase.
        total: What this phase has to do, None where nobody knows yet.
        unit: What is counted.
    """

    phase: str
    done: int
    total: int | None
    unit: str = "rows"


ReportProgress = Callable[[ProgressReport], None]


def report_nothing(_: ProgressReport) -> None:
    """Ignore the report."""
