"""Replicates: a study's winner and baseline, trained again with fresh seeds and tested.

They run once the search is over (`tuner.replicate_run`), and steer nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tuner.search import StudySearch
from tuner.study import Trial, choose_winner

__all__ = ["Replicate", "plan_replicates"]


@dataclass(kw_only=True)
class Replicate(Trial):
    """A trial of a study, repeated with another seed."""

    kind: ClassVar[str] = "replicate"

    seed: int

    @property
    def id(self) -> str:
        """The trial's, and the seed."""
        return f"{super().id}/seed-{self.seed}"

    @property
    def directory(self) -> str:
        """Of its checkpoint, which is there until it has been tested."""
        return f"{super().directory}-seed-{self.seed}"


def plan_replicates(searches: Iterable[StudySearch], num_seeds: int) -> list[Replicate]:
    """List the replicates of every study that has a winner, seed by seed in pairs.

    The seeds are the `num_seeds` that follow the one of the search. Where the baseline itself has
    won there is nothing beside it.

    Args:
        searches: that have ended.
        num_seeds: replicates of each trial.
    """
    replicates = []
    for search in searches:
        winner = choose_winner(search.trials)
        baseline = next((trial for trial in search.trials if trial.baseline), None)
        if winner is None or baseline is None:
            continue
        pair = (baseline,) if winner is baseline else (baseline, winner)
        first = baseline.configuration.training.seed + 1
        for seed in range(first, first + num_seeds):
            replicates += [_replicate(trial, seed) for trial in pair]
    return replicates


def _replicate(trial: Trial, seed: int) -> Replicate:
    return Replicate(
        study=trial.study,
        number=trial.number,
        configuration=trial.configuration.replace({"training.seed": seed}),
        params=trial.params,
        objectives=trial.objectives,
        seed=seed,
    )
