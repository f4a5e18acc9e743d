"""Tune's side of a trial: a Trainable that hands its task to a lane and passes its reports on."""

from typing import Any

import ray
from ray import tune

from tuner.messages import Ended, TrialTask

__all__ = ["ENDED", "REPORT", "TASK", "LaneTrial"]

TASK = "task"
"""Key of a Tune trial's configuration: its `TrialTask`."""

REPORT = "report"
"""Key of a Tune result: the `Report` of one evaluation."""

ENDED = "ended"
"""Key of a Tune result: the `Ended` of a trial that has no last report."""


class LaneTrial(tune.Trainable):
    """Holds no resources and trains nothing; one actor serves trial after trial."""

    def setup(self, config: dict[str, Any], queue: ray.actor.ActorHandle) -> None:
        """Take the first trial, and submit nothing: Tune may start an actor in vain.

        Where another trial's actor is free before this one is up, Tune gives that one the trial and
        stops this one.
        """
        self._queue = queue
        self._task: TrialTask = config[TASK]
        self._submission: int | None = None

    def step(self) -> dict[str, Any]:
        """Let the lane go on, and wait for its next evaluation."""
        if self._submission is None:
            self._submit()
        message = ray.get(self._queue.next_message.remote(self._task.id))
        if isinstance(message, Ended):
            return {ENDED: message, "done": True}
        return {REPORT: message, "done": message.last}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stop the old trial, wherever it is, and submit the new one's task."""
        self.cleanup()
        self._task = new_config[TASK]
        self._submit()
        return True

    def cleanup(self) -> None:
        """Stop the trial's task if it was submitted; it may have ended by itself."""
        if self._submission is not None:
            ray.get(self._queue.cancel.remote(self._task.id, self._submission))

    def _submit(self) -> None:
        self._submission = ray.get(self._queue.submit.remote(self._task))
