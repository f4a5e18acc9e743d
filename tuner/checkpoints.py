"""Which checkpoints a job keeps, and the removal of all others while it runs."""

import logging
from collections.abc import Iterable
from typing import Literal

from tuner.errors import StorageError
from tuner.messages import Report
from tuner.replicates import Replicate
from tuner.search import StudySearch
from tuner.storage import delete, join
from tuner.study import Trial, TrialState, choose_winner

__all__ = ["CheckpointKeeper", "Keep", "kept_trials"]

Keep = Literal["winners", "all"]

logger = logging.getLogger(__name__)


def kept_trials(trials: list[Trial], keep: Keep) -> list[Trial]:
    """List the trials of one study whose checkpoints are kept: its winner so far and its baseline.

    A failed trial's checkpoint is never kept.
    """
    usable = [trial for trial in trials if trial.usable]
    if keep == "all":
        return usable
    winner = choose_winner(trials)
    return [trial for trial in usable if trial.baseline or trial is winner]


class CheckpointKeeper:
    """Removes checkpoints as soon as their trials have lost, so that storage stays small.

    Args:
        storage: URI below which the job's checkpoints lie.
        keep: what the job file says.
    """

    def __init__(self, storage: str, keep: Keep) -> None:
        self._storage = storage
        self._keep = keep
        self._stored: dict[str, list[Trial]] = {}

    def restore(self, trials: Iterable[Trial]) -> None:
        """Take over the checkpoints that an earlier process kept."""
        for trial in trials:
            if trial.state.ended and trial.best is not None:
                self._stored.setdefault(trial.study.name, []).append(trial)

    def trial_started(self, trial: Trial) -> None:
        """Nothing is stored yet."""

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        """Remember that the trial has a checkpoint now."""
        stored = self._stored.setdefault(trial.study.name, [])
        if trial not in stored:
            stored.append(trial)

    def trial_ended(self, trial: Trial) -> None:
        """Remove what has lost for good: a trial that still runs may fail yet, and wins nothing.

        The training state of a stopped trial stays: it goes on from there.
        """
        if trial.state is not TrialState.STOPPED:
            _discard(join(self._storage, trial.state_directory))
        stored = self._stored.get(trial.study.name, [])
        ended = [other for other in stored if other.state.ended]
        kept = kept_trials(ended, self._keep)
        for other in ended:
            if other not in kept:
                _discard(join(self._storage, other.directory))
                stored.remove(other)

    def replicate_started(self, replicate: Replicate) -> None:
        """Nothing is stored yet."""

    def replicate_evaluated(self, replicate: Replicate, report: Report) -> None:
        """Its checkpoint is wanted for its test alone."""

    def replicate_ended(self, replicate: Replicate) -> None:
        """Remove what the test needed; a stopped one goes on from there."""
        if replicate.state is not TrialState.STOPPED:
            _discard(join(self._storage, replicate.directory))
            _discard(join(self._storage, replicate.state_directory))

    def study_ended(self, search: StudySearch) -> None:
        """Every loser is gone by now."""


def _discard(uri: str) -> None:
    """Delete what nobody needs; what a storage keeps for now is worth no more than a warning."""
    try:
        delete(uri)
    except StorageError as error:
        logger.warning(error)
