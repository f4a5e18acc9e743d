"""A study: the search for one pair of a dataset and a model, and what became of its trials."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from trainables.configuration import TrialConfiguration
from tuner.messages import Report
from tuner.objective import Objective, objective_values, score

__all__ = [
    "PastTrial",
    "Study",
    "Trial",
    "TrialState",
    "choose_winner",
    "choose_winners",
    "short_params",
]


class TrialState(StrEnum):
    """What became of a trial."""

    RUNNING = "running"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of the trial in this run of the job."""
        return self is not TrialState.RUNNING

    @property
    def final(self) -> bool:
        """Whether the trial has ended for good: a stopped one goes on in the job's next run."""
        return self.ended and self is not TrialState.STOPPED


@dataclass(frozen=True, kw_only=True)
class Study:
    """One search. Its directory name is safe in a path whatever the model's name."""

    dataset: str
    dataset_uri: str
    model: str

    @property
    def name(self) -> str:
        """`dataset/model`, unique within a job."""
        return f"{self.dataset}/{self.model}"

    @property
    def directory(self) -> str:
        """The study's place below the job's storage."""
        return f"{self.dataset}/{self.model.replace(':', '.')}"


@dataclass(kw_only=True)
class Trial:
    """One configuration of a study, and its evaluations so far.

    Attributes:
        kind: of its MLflow run.
        number: from 0 within its study; 0 is the baseline.
        params: the values of the search's dimensions, by dotted path.
        best: the evaluation with the highest score; ties go to the earlier one.
        num_restarts: how often it has been proposed again, through no fault of its own.
    """

    kind: ClassVar[str] = "trial"

    study: Study
    number: int
    configuration: TrialConfiguration
    params: dict[str, Any]
    objectives: tuple[Objective, ...]
    state: TrialState = TrialState.RUNNING
    best: Report | None = None
    last: Report | None = None
    failure: str | None = None
    test_metrics: dict[str, float | None] = field(default_factory=dict)
    num_restarts: int = 0

    @property
    def baseline(self) -> bool:
        """Whether this is the study's plain BCE trial."""
        return self.number == 0

    @property
    def id(self) -> str:
        """`dataset/model/number`, unique within a job."""
        return f"{self.study.name}/{self.number}"

    @property
    def directory(self) -> str:
        """The trial's place below the job's storage."""
        return f"{self.study.directory}/trial-{self.number:04d}"

    @property
    def state_directory(self) -> str:
        """The place of its training state, until it has ended."""
        return f"{self.directory}-state"

    @property
    def usable(self) -> bool:
        """Whether the trial has an evaluation, and with it a checkpoint, that counts."""
        return self.best is not None and self.state is not TrialState.FAILED

    @property
    def best_values(self) -> tuple[float, ...] | None:
        """The objectives of the best evaluation; None before the first."""
        return None if self.best is None else objective_values(self.best.metrics, self.objectives)

    @property
    def best_score(self) -> float | None:
        """The score of the best evaluation; None before the first."""
        return None if self.best is None else self.score_of(self.best)

    def score_of(self, report: Report) -> float:
        """Rank an evaluation by one number: the mean of its objectives. Higher is better."""
        return score(objective_values(report.metrics, self.objectives))

    def record(self, report: Report) -> None:
        """Take in one evaluation."""
        self.last = report
        if self.best_score is None or self.score_of(report) > self.best_score:
            self.best = report

    def restart(self) -> None:
        """Forget the evaluations: whoever goes on with the trial repeats them."""
        self.best = self.last = None
        self.num_restarts += 1


@dataclass(frozen=True, kw_only=True)
class PastTrial:
    """What an earlier process left of a trial.

    Attributes:
        state: `RUNNING` for a trial that has to be run again.
        reports: its evaluations in order; of one that runs again, those of every attempt.
    """

    number: int
    params: dict[str, Any]
    state: TrialState
    reports: tuple[Report, ...] = ()
    failure: str | None = None


def short_params(params: Mapping[str, object]) -> list[str]:
    """Name each parameter by the last part of its path, with its value."""
    return [
        f"{path.rpartition('.')[2]} {value:.4g}"
        if isinstance(value, float)
        else f"{path.rpartition('.')[2]} {value}"
        for path, value in params.items()
    ]


def choose_winner(trials: Iterable[Trial]) -> Trial | None:
    """Choose the trial with the best evaluation; ties go to the lower number.

    Pruned and stopped trials count with the evaluations they had; failed ones do not. None if no
    trial qualifies. Of trials of several studies ties of equal numbers go to the first in order.
    """
    scores = [
        ((trial.best_score, -trial.number), trial)
        for trial in trials
        if trial.best_score is not None and trial.usable
    ]
    return max(scores, key=lambda scored: scored[0])[1] if scores else None


def choose_winners(trials: Iterable[Trial]) -> dict[str, Trial]:
    """Choose every dataset's winner, by the dataset; one without a usable trial has none."""
    by_dataset: dict[str, list[Trial]] = {}
    for trial in trials:
        by_dataset.setdefault(trial.study.dataset, []).append(trial)
    winners = {dataset: choose_winner(found) for dataset, found in by_dataset.items()}
    return {dataset: winner for dataset, winner in winners.items() if winner is not None}
