"""What a lane does between the steps of a trial: is it cancelled, is its state to be kept?"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import ray

from trainables.workers import Workers
from tuner.messages import Generation, TrialTask
from tuner.watchdog import Watchdog

__all__ = ["POLL_S", "STATE_SHARE", "Limit", "Poll", "Seen"]

POLL_S = 0.25

STATE_SHARE = 0.05
"""Of a trial's time that writing its states may take."""


@dataclass(frozen=True)
class Limit:
    """How many seconds a trial may hold its lanes, from `since` on (time.perf_counter)."""

    seconds: float | None
    since: float

    @property
    def reason(self) -> str | None:
        """Why the trial has failed, if its time is over."""
        if self.seconds is None or time.perf_counter() - self.since < self.seconds:
            return None
        return f"it took longer than budget.trial_hours ({self.seconds / 3600:g})"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What rank 0 saw, and every rank acts upon: `stride` steps later it looks again."""

    cancelled: bool
    keep: bool
    stride: int


class Poll:
    """Answers after every step whether the trial is cancelled, alike on all ranks.

    Rank 0 looks about every `POLL_S`; how many steps that is it tells the others with every
    answer, so that they meet at the same step. There, too, the trial's state is kept now and then,
    and a trial beyond its limit is cancelled.
    """

    def __init__(
        self,
        queue: ray.actor.ActorHandle,
        generation: Generation,
        task: TrialTask,
        limit: Limit,
        watchdog: Watchdog,
        decide: Callable[[Callable[[], Seen]], Seen],
        workers: Workers,
        keep: Callable[[], None],
    ) -> None:
        self.queue = queue
        self.generation = generation
        self.task = task
        self.limit = limit
        self.watchdog = watchdog
        self.decide = decide
        self.keep = keep
        self.reference = queue.wait_cancelled.remote(generation) if workers.rank == 0 else None
        self.cancelled = False
        self.steps_to_go = self.stride = 1
        self.looked = time.perf_counter()
        self.keep_at = self.looked + task.state_every_s

    def __call__(self) -> bool:
        """Whether the trial is cancelled; keeps its state first if that is due."""
        self.steps_to_go -= 1
        if self.steps_to_go > 0:
            return False
        self.watchdog.pat()
        seen = self.decide(self._look)
        self.steps_to_go = self.stride = seen.stride
        if seen.keep:
            self._keep()
        self.cancelled = seen.cancelled
        return seen.cancelled

    def _look(self) -> Seen:
        now = time.perf_counter()
        step_s = max(now - self.looked, 1e-6) / self.stride
        self.looked = now
        done, _ = ray.wait([self.reference], timeout=0)
        reason = None if done else self.limit.reason
        if reason is not None:
            ray.get(self.queue.fail.remote(self.generation, self.task.id, reason))
            done = [self.reference]
        return Seen(
            cancelled=bool(done),
            keep=not done and now >= self.keep_at,
            stride=max(int(POLL_S / step_s), 1),
        )

    def _keep(self) -> None:
        started = time.perf_counter()
        self.keep()
        self.looked = time.perf_counter()
        took_s = self.looked - started
        self.keep_at = self.looked + max(self.task.state_every_s, took_s / STATE_SHARE)
