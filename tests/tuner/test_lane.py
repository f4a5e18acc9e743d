"""What a lane does between its steps, on a real queue; whole lanes are in test_lanes."""

import faulthandler
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
import torch

from trainables.workers import Workers
from tuner.cluster import connected
from tuner.lane import CANCEL_POLL_S, _CancelPoll, _Limit
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

    def poll(
        self,
        *,
        decide: Callable[[Any], tuple[bool, int]] = lambda look: look(),
        limit_s: float | None = None,
    ) -> _CancelPoll:
        limit = _Limit(limit_s, since=time.perf_counter())
        watchdog = Watchdog(60.0)
        return _CancelPoll(self.queue, self.generation, "a", limit, watchdog, decide, ALONE)


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
    yield Leased(queue, generation)
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

    def decide(look: object) -> tuple[bool, int]:
        nonlocal looks
        looks += 1
        found: tuple[bool, int] = look()  # type: ignore[operator]
        return found

    poll = leased.poll(decide=decide)
    for _ in range(10_000):
        assert not poll()
    assert looks < 1000


def test_slow_steps_are_looked_at_one_by_one(leased: Leased) -> None:
    poll = leased.poll()
    poll.looked -= 10 * CANCEL_POLL_S  # as if the step had taken so long
    assert not poll()
    assert poll.steps_to_go == 1
