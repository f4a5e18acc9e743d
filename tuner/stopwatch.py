"""How long a job takes on the wall, beside the lane time that its studies add up."""

import time

from tuner.messages import Report
from tuner.search import StudySearch
from tuner.study import Trial

__all__ = ["Stopwatch"]


class Stopwatch:
    """Runs from its construction.

    Attributes:
        start_up_s: seconds until the first trial began in a lane; None before its first evaluation.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.start_up_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the construction."""
        return time.monotonic() - self._started

    def trial_started(self, trial: Trial) -> None:
        """A proposal is no beginning: its lane may not be up yet."""

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        """Reckon from the first evaluation back to its trial's beginning."""
        if self.start_up_s is None:
            self.start_up_s = self.elapsed_s - report.seconds.lane

    def trial_ended(self, trial: Trial) -> None:
        """Of no concern here."""

    def study_ended(self, search: StudySearch) -> None:
        """Of no concern here."""

    def summary(self) -> str:
        """Say the wall times on one line."""
        line = f"{self.elapsed_s:.1f} s in all"
        if self.start_up_s is not None:
            line += f", {self.start_up_s:.1f} s of it before the first trial began"
        return line
