"""How far a preparation is; who shows it is not this package's concern."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ProgressReport", "ReportProgress", "report_nothing"]


@dataclass(frozen=True)
class ProgressReport:
    """One step forward.

    Attributes:
        phase: What is going on, in words; another phase begins a new count.
        done: Rows done in this phase.
        total: Rows of this phase, None where nobody knows yet.
    """

    phase: str
    done: int
    total: int | None


ReportProgress = Callable[[ProgressReport], None]


def report_nothing(_: ProgressReport) -> None:
    """Ignore the report."""
