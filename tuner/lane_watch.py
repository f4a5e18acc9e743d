"""Lanes that wait for room on a cluster: they are told of, with what they lack."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.exceptions import RayActorError
from rich.console import Console

from tuner.cluster import Lanes, free_resources

__all__ = ["waiting_line", "watched_lanes"]

FIRST_LOOK_S = 30.0
NEXT_LOOK_S = 120.0


@contextmanager
def watched_lanes(lanes: Lanes, queue: ray.actor.ActorHandle, console: Console) -> Iterator[None]:
    """Print a line while lanes are not up, now and then, until all are or the context ends.

    Args:
        lanes: that there will be.
        queue: the actor of a `TrialQueue`, which knows the lanes that have come.
        console: where to print.
    """
    over = threading.Event()

    def watch() -> None:
        wait_s = FIRST_LOOK_S
        while not over.wait(wait_s):
            try:
                num_up = ray.get(queue.num_lanes.remote())
            except RayActorError:  # of which the job hears elsewhere
                return
            if num_up >= lanes.num_lanes:
                return
            line = waiting_line(lanes, num_up, free_resources())
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            wait_s = NEXT_LOOK_S

    thread = threading.Thread(target=watch, name="lane-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def waiting_line(lanes: Lanes, num_up: int, free: Mapping[str, float]) -> str:
    """Say how many lanes wait, what a worker needs and what is free.

    Args:
        lanes: that there will be.
        num_up: that have come.
        free: resources of the cluster that nobody holds, as Ray names them.
    """
    needs = f"{lanes.cpus_per_worker} CPUs"
    has = f"{free.get('CPU', 0.0):g} CPUs"
    if lanes.gpus_per_worker:
        needs += f" and {lanes.gpus_per_worker:g} GPUs"
        has += f" and {free.get('GPU', 0.0):g} GPUs"
    return (
        f"{lanes.num_lanes - num_up} of {lanes.num_lanes} lanes are not up yet: each of their "
        f"{lanes.workers_per_lane} worker(s) needs {needs} on one node, free on the cluster are "
        f"{has}{'; the others go on' if num_up else ''}"
    )
