"""What the tuner and its lanes say to each other: small, picklable, without torch."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = [
    "HANG_S",
    "Ended",
    "Generation",
    "GivenUp",
    "Reading",
    "Report",
    "Seconds",
    "Task",
    "TestTask",
    "TrialTask",
]


HANG_S = 1800.0
"""Seconds that nothing should take: a step, an evaluation, loading a dataset."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where a trial's time went so far, in seconds of its lane.

    Attributes:
        setup: loading the dataset and building the model.
        training: steps.
        evaluation: of the valid split.
        lane: all of the lane's time since the trial before it ended, waiting for this one included.
    """

    setup: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    lane: float = 0.0

    @property
    def overhead(self) -> float:
        """The lane's time that was neither set-up nor training nor evaluation."""
        return max(self.lane - self.setup - self.training - self.evaluation, 0.0)

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            setup=self.setup + other.setup,
            training=self.training + other.training,
            evaluation=self.evaluation + other.evaluation,
            lane=self.lane + other.lane,
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a lane reads a dataset.

    Attributes:
        mode: `memory` holds it, `stream` reads it again in every epoch, `auto` holds what fits.
        buffer_bytes: that one worker may hold of a streamed dataset.
    """

    mode: Literal["auto", "memory", "stream"] = "auto"
    buffer_bytes: int = 512 * 1024**2


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """A trial for a lane: train it, and write the best evaluation's checkpoint.

    Attributes:
        id: unique within the job.
        dataset: URI of the prepared dataset.
        configuration: a `TrialConfiguration` as JSON values.
        objectives: what decides which evaluation is the best.
        checkpoint: directory URI of the checkpoint.
        state: directory URI of the training state, from which another lane can go on.
        reading: how to read the dataset.
        limit_s: seconds of a lane after which the trial has failed; None for no limit.
        hang_s: seconds without progress after which the lane is started again.
        state_every_s: after which its state is written again, later only where writing takes more
            than a twentieth of the time; a lost lane costs at most this.
    """

    id: str
    dataset: str
    configuration: dict[str, Any]
    objectives: tuple[Literal["mean_auc", "ctr_auc", "ctcvr_auc"], ...]
    checkpoint: str
    state: str
    reading: Reading = Reading()
    limit_s: float | None = None
    hang_s: float = HANG_S
    state_every_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class TestTask:
    """A checkpoint for a lane to evaluate on the test split, once the winner is chosen."""

    __test__ = False  # for pytest: not a test class

    id: str
    dataset: str
    checkpoint: str
    reading: Reading = Reading()
    hang_s: float = HANG_S


Task = TrialTask | TestTask


class Generation(NamedTuple):
    """One start of a lane's workers: what they show the queue with everything they say.

    Attributes:
        lane: its name.
        number: how many of the job's lanes had been started or restarted by then.
    """

    lane: str
    number: int


class GivenUp(NamedTuple):
    """A lane that gets no more tasks, since it has given them back.

    Attributes:
        lane: its name.
        reason: of the last one that it gave back.
    """

    lane: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """One evaluation, sent once its checkpoint is safe.

    Attributes:
        index: from 1; for a test task always 1.
        last: whether the task ends with it.
        step: optimiser steps done.
        epoch: epochs done, a fraction inside one.
        metrics: of the split that was evaluated; None where one class alone is there.
        train: mean `loss`, `bce` and `pwiser` of the steps since the evaluation before.
        nodes: addresses of those that the lane's workers are on.
    """

    index: int
    last: bool
    step: int
    epoch: float
    metrics: dict[str, float | None]
    train: dict[str, float] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    seconds: Seconds = Seconds()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A task that ended without its last report.

    Attributes:
        kind: `failed` with its reason, or `stopped` because somebody asked.
    """

    kind: Literal["failed", "stopped"]
    reason: str
