"""Replicates: a study's winner, with its loss and with plain BCE, trained again with fresh seeds.

They run once the search is over (`tuner.replicate_run`), and steer nothing. The two differ in the
loss alone, whatever else was searched: the study's own baseline keeps the job file's learning rate
while the winner has one that was searched for, so that between them alpha would explain nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tuner.search import BASELINE_POINT, StudySearch
from tuner.study import Trial, choose_winner

__all__ = ["Replicate", "plan_replicates"]

SEED_MARK = "-seed-"


@dataclass(kw_only=True)
class Replicate(Trial):
    """A trial of a study, repeated with another seed.

    Attributes:
        seed: of the repetition.
        plain: whether it is trained with plain BCE, alpha 0, in place of the trial's loss.
    """

    kind: ClassVar[str] = "replicate"

    seed: int
    plain: bool

    @property
    def id(self) -> str:
        """The trial's, `plain` where it is, and the seed."""
        return f"{super().id}{'/plain' if self.plain else ''}/seed-{self.seed}"

    @property
    def directory(self) -> str:
        """Of its checkpoint, which is there until it has been tested."""
        return f"{super().directory}{'-plain' if self.plain else ''}{SEED_MARK}{self.seed}"

    @staticmethod
    def is_directory(directory: str) -> bool:
        """Whether a directory below the storage is a replicate's, of its state too."""
        return SEED_MARK in directory.rpartition("/")[2]


def plan_replicates(searches: Iterable[StudySearch], num_seeds: int) -> list[Replicate]:
    """List the replicates of every study that has a winner, seed by seed in pairs.

    The seeds are the `num_seeds` that follow the one of the winner. Where that is trained with
    plain BCE itself there is nothing beside it.

    Args:
        searches: that have ended.
        num_seeds: replicates of each of a pair.
    """
    replicates = []
    for search in searches:
        winner = choose_winner(search.trials)
        if winner is None:
            continue
        first = winner.configuration.training.seed + 1
        for seed in range(first, first + num_seeds):
            if winner.configuration.loss.alpha > 0.0:
                replicates.append(_replicate(winner, seed, plain=True))
            replicates.append(_replicate(winner, seed, plain=False))
    return replicates


def _replicate(trial: Trial, seed: int, *, plain: bool) -> Replicate:
    changes = {"training.seed": seed} | (BASELINE_POINT if plain else {})
    return Replicate(
        study=trial.study,
        number=trial.number,
        configuration=trial.configuration.replace(changes),
        params=trial.params,
        objectives=trial.objectives,
        seed=seed,
        plain=plain,
    )
