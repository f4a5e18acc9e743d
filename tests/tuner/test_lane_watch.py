import io
from collections.abc import Iterator

import pytest
import ray
from rich.console import Console

from tuner import lane_watch
from tuner.cluster import Lanes, connected
from tuner.lane_watch import waiting_line, watched_lanes
from tuner.lanes import queue_actor

LANES = Lanes(num_lanes=3, workers_per_lane=2, cpus_per_worker=4, gpus_per_worker=0.0)


def test_a_waiting_lane_is_told_with_what_it_lacks() -> None:
    assert waiting_line(LANES, 1, {"CPU": 6.0}) == (
        "2 of 3 lanes are not up yet: each of their 2 worker(s) needs 4 CPUs on one node, free on "
        "the cluster are 6 CPUs; the others go on"
    )


def test_gpus_are_told_where_lanes_need_them() -> None:
    lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0.5)
    assert waiting_line(lanes, 0, {"CPU": 2.0, "GPU": 0.25}) == (
        "2 of 2 lanes are not up yet: each of their 1 worker(s) needs 1 CPUs and 0.5 GPUs on one "
        "node, free on the cluster are 2 CPUs and 0.25 GPUs"
    )


@pytest.fixture(scope="module")
def queue() -> Iterator[ray.actor.ActorHandle]:
    with connected():
        handle = queue_actor().remote()
        yield handle
        ray.kill(handle)


@pytest.mark.ray
@pytest.mark.slow
def test_lanes_are_reported_until_they_are_up(
    queue: ray.actor.ActorHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_watch, "FIRST_LOOK_S", 0.01)
    printed = io.StringIO()
    lanes = Lanes(num_lanes=1, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0.0)
    with watched_lanes(lanes, queue, Console(file=printed)):
        while "1 of 1 lanes are not up yet" not in printed.getvalue():
            ray.get(queue.num_lanes.remote())
    ray.get(queue.join.remote("lane-0"))
    told = io.StringIO()
    with watched_lanes(lanes, queue, Console(file=told)):
        assert ray.get(queue.num_lanes.remote()) == 1
    assert told.getvalue() == ""
