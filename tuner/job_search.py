"""The search of a whole job: its studies one after another, and who hears of their trials."""

from collections.abc import Sequence
from typing import Protocol

from tuner.messages import Ended, Report
from tuner.search import StudySearch
from tuner.study import Trial, TrialState

__all__ = ["MAX_RESTARTS", "JobObserver", "JobSearch"]


MAX_RESTARTS = 2
"""Times that a trial is proposed again."""


class JobObserver(Protocol):
    """Somebody who is told of a job's trials, in the thread that runs the search."""

    def trial_started(self, trial: Trial) -> None:
        """Take note of a new trial."""

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        """Take note of an evaluation; `trial` holds it already."""

    def trial_ended(self, trial: Trial) -> None:
        """Take note of a trial's end; `trial.state` says which."""

    def study_ended(self, search: StudySearch) -> None:
        """Take note that all trials of a study have ended."""


class JobSearch:
    """Proposes trials study by study, so that lanes never wait for the end of a study.

    Args:
        searches: of the job's studies, in the order of the job file.
        observers: told in their order.
    """

    def __init__(
        self, searches: Sequence[StudySearch], observers: Sequence[JobObserver] = ()
    ) -> None:
        self.searches = list(searches)
        self._observers = list(observers)
        self._open = list(self.searches)
        self.stop_reason: str | None = None

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, study by study."""
        return [trial for search in self.searches for trial in search.trials]

    @property
    def over(self) -> bool:
        """Whether no trial will be proposed any more."""
        return self.stop_reason is not None or all(search.ended for search in self.searches)

    def stop(self, reason: str) -> None:
        """Propose nothing more; the first reason stays. May be called from any thread."""
        self.stop_reason = self.stop_reason or reason

    def next_trial(self) -> Trial | None:
        """Propose a trial; None when there is none now, and none at all once it is `over`."""
        if self.stop_reason is not None:
            return None
        for search in self.searches:
            while (trial := search.ask()) is not None:
                for observer in self._observers:
                    observer.trial_started(trial)
                if trial.failure is None:
                    return trial
                self._end(trial, TrialState.FAILED)
        return None

    def restart(self, trial: Trial) -> bool:
        """Propose a trial again that was lost on the way; return False if that is over."""
        if self.stop_reason is not None or trial.num_restarts >= MAX_RESTARTS:
            return False
        trial.restart()
        self._search_of(trial).propose_again(trial)
        return True

    def evaluated(self, trial: Trial, report: Report) -> bool:
        """Take in an evaluation that is not the trial's last; return whether to prune the trial."""
        self._record(trial, report)
        if self._search_of(trial).should_prune(trial):
            self._end(trial, TrialState.PRUNED)
            return True
        return False

    def ended(self, trial: Trial, message: Report | Ended) -> None:
        """Take in a trial's last evaluation, or why it has none."""
        if trial.state.ended:
            return
        if isinstance(message, Report):
            self._record(trial, message)
            self._end(trial, TrialState.COMPLETE)
        elif message.kind == "stopped":
            self._end(trial, TrialState.STOPPED)
        else:
            trial.failure = message.reason
            self._end(trial, TrialState.FAILED)

    def close(self) -> None:
        """End whatever is still open, as stopped: nothing more will come."""
        for trial in self.trials:
            if not trial.state.ended:
                self._end(trial, TrialState.STOPPED)
        for search in list(self._open):
            self._end_study(search)

    def _record(self, trial: Trial, report: Report) -> None:
        trial.record(report)
        for observer in self._observers:
            observer.trial_evaluated(trial, report)

    def _end(self, trial: Trial, state: TrialState) -> None:
        trial.state = state
        search = self._search_of(trial)
        search.tell(trial)
        for observer in self._observers:
            observer.trial_ended(trial)
        if search.ended:
            self._end_study(search)

    def _end_study(self, search: StudySearch) -> None:
        self._open.remove(search)
        for observer in self._observers:
            observer.study_ended(search)

    def _search_of(self, trial: Trial) -> StudySearch:
        return next(search for search in self.searches if search.study == trial.study)
