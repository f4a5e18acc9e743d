"""What a lane does between its steps, on a real queue; whole lanes are in test_lanes."""

import faulthandler
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import ray
import torch

from trainables.workers import Workers
from tuner.cluster import connected
from tuner.lane_poll import POLL_S, STATE_SHARE, Limit, Poll, Seen
from tuner.lanes import queue_actor
from tuner.messages import Ended, Generation, TrialTask
from tuner.watchdog import Watchdog

pytestmark = pytest.mark.ray

ALONE = Workers(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connected():
        yield


@dataclass(frozen=True)
class Leased:
    """A queue with one trial, "a", that a lane has taken."""

    queue: ray.actor.ActorHandle
    generation: Generation
    task: TrialTask

    def poll(
        self,
        *,
        decide: Callable[[Any], Seen] = lambda look: look(),
        limit_s: float | None = None,
        state_every_s: float = 3600.0,
        keep: Callable[[], None] = lambda: None,
    ) -> Poll:
        task = replace(self.task, state_every_s=state_every_s)
        limit = Limit(limit_s, since=time.perf_counter())
        watchdog = Watchdog(60.0)
        return Poll(self.queue, self.generation, task, limit, watchdog, decide, ALONE, keep)


@pytest.fixture
def leased(ray_session: None) -> Iterator[Leased]:
    queue = queue_actor().remote()
    task = TrialTask(
        id="a",
        dataset="/data/us",
        configuration={},
        objectives=("mean_auc",),
        checkpoint="/c",
        state="/nowhere-state",
    )
    ray.get(queue.submit.remote(task))
    generation = ray.get(queue.join.remote("lane"))
    assert ray.get(queue.take.remote(generation, timeout_s=1.0)) == task
    yield Leased(queue, generation, task)
    faulthandler.cancel_dump_traceback_later()


def test_a_trial_beyond_its_limit_has_failed(leased: Leased) -> None:
    assert not leased.poll(limit_s=3600.0)()
    poll = leased.poll(limit_s=0.36)
    while not poll():
        pass
    ended = ray.get(leased.queue.next_message.remote("a"))
    reason = "it took longer than budget.trial_hours (0.0001)"
    assert ended == Ended(kind="failed", reason=reason)


def test_a_trial_goes_on_until_it_is_cancelled(leased: Leased) -> None:
    poll = leased.poll()
    assert not any(poll() for _ in range(1000))
    ray.get(leased.queue.cancel.remote("a"))
    assert any(poll() for _ in range(10_000_000))


def test_quick_steps_look_seldom(leased: Leased) -> None:
    looks = 0

    def decide(look: Callable[[], Seen]) -> Seen:
        nonlocal looks
        looks += 1
        return look()

    poll = leased.poll(decide=decide)
    for _ in range(10_000):
        assert not poll()
    assert looks < 1000


def test_slow_steps_are_looked_at_one_by_one(leased: Leased) -> None:
    poll = leased.poll()
    poll.looked -= 10 * POLL_S  # as if the step had taken so long
    assert not poll()
    assert poll.steps_to_go == 1


def test_its_state_is_kept_as_often_as_asked(leased: Leased) -> None:
    kept: list[float] = []
    poll = leased.poll(state_every_s=0.5, keep=lambda: kept.append(time.perf_counter()))
    started = time.perf_counter()
    while len(kept) < 3:
        time.sleep(0.01)
        assert not poll()
    times = [started, *kept]
    assert all(after - before >= 0.5 for before, after in pairwise(times))


def test_a_state_that_takes_long_is_kept_less_often(leased: Leased) -> None:
    poll = leased.poll(state_every_s=0.0, keep=lambda: time.sleep(0.2))
    assert not poll()
    assert poll.keep_at - poll.looked >= 0.2 / STATE_SHARE


def test_a_cancelled_trial_keeps_no_state_between_its_steps(leased: Leased) -> None:
    kept: list[int] = []
    poll = leased.poll(state_every_s=0.0, keep=lambda: kept.append(1))
    ray.get(leased.queue.cancel.remote("a"))
    ray.get(poll.reference)
    assert poll()
    assert kept == []
