"""Replicates on the lanes of a job."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import ray

from tuner.messages import Ended, Report, TestTask, TrialTask
from tuner.replicates import Replicate
from tuner.study import Trial, TrialState

__all__ = ["ReplicateObserver", "ReplicateRun"]


class ReplicateObserver(Protocol):
    """Somebody who is told of replicates."""

    def replicate_started(self, replicate: Replicate) -> None:
        """Take note of a new replicate."""

    def replicate_evaluated(self, replicate: Replicate, report: Report) -> None:
        """Take note of an evaluation on valid."""

    def replicate_ended(self, replicate: Replicate) -> None:
        """Take note of its end, with `test_metrics` if it ended well."""


class ReplicateRun:
    """Trains and tests replicates on the lanes of a job.

    Args:
        queue: of the lanes.
        trial_task: makes a replicate's training.
        test_task: makes the test of the checkpoint that it leaves.
        observers: told in their order.
    """

    def __init__(
        self,
        queue: ray.actor.ActorHandle,
        *,
        trial_task: Callable[[Trial], TrialTask],
        test_task: Callable[[Trial], TestTask],
        observers: Sequence[ReplicateObserver],
    ) -> None:
        self._queue = queue
        self._trial_task = trial_task
        self._test_task = test_task
        self._observers = list(observers)
        self._messages: dict[ray.ObjectRef, tuple[Replicate, TrialTask | TestTask]] = {}

    def run(self, replicates: Sequence[Replicate], num_lanes: int) -> None:
        """Run all, as many at a time as there are lanes.

        One that fails is reported as failed; a stop ends those that are left as stopped.
        """
        waiting = iter(replicates)
        for replicate in islice(waiting, num_lanes):
            self._begin(replicate)
        while self._messages:
            (ready,), _ = ray.wait(list(self._messages), num_returns=1)
            replicate, task = self._messages.pop(ready)
            self._hear(replicate, task, ray.get(ready))
            if replicate.state.ended:
                for following in islice(waiting, 1):
                    self._begin(following)

    def _begin(self, replicate: Replicate) -> None:
        for observer in self._observers:
            observer.replicate_started(replicate)
        self._submit(replicate, self._trial_task(replicate))

    def _submit(self, replicate: Replicate, task: TrialTask | TestTask) -> None:
        ray.get(self._queue.submit.remote(task))
        self._listen(replicate, task)

    def _listen(self, replicate: Replicate, task: TrialTask | TestTask) -> None:
        self._messages[self._queue.next_message.remote(task.id)] = (replicate, task)

    def _hear(
        self, replicate: Replicate, task: TrialTask | TestTask, message: Report | Ended
    ) -> None:
        if isinstance(message, Ended):
            stopped = message.kind == "stopped"
            replicate.failure = None if stopped else message.reason
            self._end(replicate, TrialState.STOPPED if stopped else TrialState.FAILED)
        elif isinstance(task, TestTask):
            replicate.test_metrics = message.metrics
            self._end(replicate, TrialState.COMPLETE)
        else:
            replicate.record(message)
            for observer in self._observers:
                observer.replicate_evaluated(replicate, message)
            if message.last:
                self._submit(replicate, self._test_task(replicate))
            else:
                self._listen(replicate, task)

    def _end(self, replicate: Replicate, state: TrialState) -> None:
        replicate.state = state
        for observer in self._observers:
            observer.replicate_ended(replicate)
