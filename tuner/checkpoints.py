"""Which checkpoints a job keeps, and the removal of all others while it runs."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from tuner.errors import StorageError
from tuner.messages import Report
from tuner.replicates import Replicate
from tuner.search import StudySearch
from tuner.storage import child_names, discard, join
from tuner.study import Study, Trial, choose_winner

__all__ = ["CheckpointKeeper", "Keep", "kept_trials"]

Keep = Literal["winners", "all"]

logger = logging.getLogger(__name__)


def kept_trials(trials: Iterable[Trial], keep: Keep) -> list[Trial]:
    """List the trials of one study whose checkpoints are kept: its winner so far and its baseline.

    A failed trial's checkpoint is never kept.
    """
    usable = [trial for trial in trials if trial.usable]
    if keep == "all":
        return usable
    winner = choose_winner(usable)
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
        self._stored: dict[Study, dict[str, Trial]] = defaultdict(dict)
        self._marked: set[str] = set()

    def restore(self, trials: Iterable[Trial], marked: Iterable[str] = ()) -> None:
        """Take over what earlier processes kept, and remove what the last one had no time to.

        Args:
            trials: of all studies.
            marked: ids of those that are marked as winners; as long as they are so, they stay.
        """
        self._marked = set(marked)
        ended: dict[Study, list[Trial]] = defaultdict(list)
        for trial in trials:
            if trial.state.final:
                ended[trial.study].append(trial)
        for study, found in ended.items():
            kept = self._kept(found)
            self._stored[study] = {trial.id: trial for trial in found if trial.id in kept}
            lost = {trial.directory for trial in found if trial.id not in kept}
            lost |= {trial.state_directory for trial in found}
            for directory in self._found(study) & lost:
                discard(join(self._storage, directory))

    def trial_started(self, trial: Trial) -> None:
        """Nothing is stored yet."""

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        """A trial's checkpoint is wanted as long as it runs."""

    def trial_ended(self, trial: Trial) -> None:
        """Remove what has lost for good.

        A trial that still runs may fail yet, and wins nothing. Nor does a stopped one, which goes
        on from its training state.
        """
        if trial.state.final:
            discard(join(self._storage, trial.state_directory))
            self._stored[trial.study][trial.id] = trial
            self._remove_losers(trial.study)

    def winner_marked(self, winner: Trial) -> None:
        """Remove the checkpoint of an earlier winner of the dataset, if it has lost.

        To be told once MLflow has the new mark.
        """
        self._marked.add(winner.id)
        for study, stored in self._stored.items():
            if study.dataset == winner.study.dataset:
                self._marked -= stored.keys() - {winner.id}
                self._remove_losers(study)

    def remove_replicates_but(self, replicates: Iterable[Replicate]) -> None:
        """Remove what replicates have left that will not go on, as those of an earlier winner."""
        wanted: dict[Study, set[str]] = {study: set() for study in self._stored}
        for replicate in replicates:
            directories = {replicate.directory, replicate.state_directory}
            wanted.setdefault(replicate.study, set()).update(directories)
        for study, directories in wanted.items():
            for directory in self._found(study) - directories:
                if Replicate.is_directory(directory):
                    discard(join(self._storage, directory))

    def replicate_started(self, replicate: Replicate) -> None:
        """Nothing is stored yet."""

    def replicate_evaluated(self, replicate: Replicate, report: Report) -> None:
        """Its checkpoint is wanted for its test alone."""

    def replicate_ended(self, replicate: Replicate) -> None:
        """Remove what the test needed; a stopped one goes on from there."""
        if replicate.state.final:
            discard(join(self._storage, replicate.directory))
            discard(join(self._storage, replicate.state_directory))

    def study_ended(self, search: StudySearch) -> None:
        """Every loser is gone by now."""

    def _kept(self, trials: Iterable[Trial]) -> set[str]:
        return {trial.id for trial in kept_trials(trials, self._keep)} | self._marked

    def _remove_losers(self, study: Study) -> None:
        stored = self._stored[study]
        for lost in stored.keys() - self._kept(stored.values()):
            discard(join(self._storage, stored.pop(lost).directory))

    def _found(self, study: Study) -> set[str]:
        """List a study's directories."""
        try:
            names = child_names(join(self._storage, study.directory))
        except StorageError as error:
            logger.warning(error)
            return set()
        return {join(study.directory, name) for name in names}
