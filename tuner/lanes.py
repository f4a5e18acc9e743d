"""The driver's side of the lanes: one Ray Train run each, held open for the whole job."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tuner.cluster import Lanes
from tuner.lane import LaneSettings, run_lane
from tuner.network import NodeTorchConfig

__all__ = ["open_lanes"]

MAX_RESTARTS = 8
"""Times that a lane's workers are started again before the lane is given up."""


@contextmanager
def open_lanes(
    lanes: Lanes,
    queue: ray.actor.ActorHandle,
    *,
    job: str,
    storage_path: str,
    on_all_lost: Callable[[str], None],
) -> Iterator[None]:
    """Start the lanes, and end them when the context ends.

    Args:
        lanes: how many, and of what size.
        queue: the actor of a `TrialQueue`; it ends with the lanes.
        job: for the names of the Train runs.
        storage_path: where Ray Train keeps the state of its runs.
        on_all_lost: called with the reason once no lane is left, from another thread.
    """
    names = [f"{job}-lane-{index}" for index in range(lanes.num_lanes)]
    lost: dict[str, str] = {}

    def run(name: str) -> None:
        try:
            _trainer(name, lanes, queue, storage_path).fit()
        except Exception as error:  # noqa: BLE001 - whatever ends a lane, its task must go on
            lost[name] = " ".join(str(error).split())
            ray.get(queue.lose_lane.remote(name))
            if len(lost) == len(names):
                on_all_lost(lost[name])

    threads = [threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ray.get(queue.cancel_all.remote("the job has ended"))
        ray.get(queue.close.remote())
        for thread in threads:
            thread.join()
        ray.kill(queue)


def _trainer(
    name: str, lanes: Lanes, queue: ray.actor.ActorHandle, storage_path: str
) -> TorchTrainer:
    resources = {"CPU": float(lanes.cpus_per_worker)}
    if lanes.gpus_per_worker:
        resources["GPU"] = lanes.gpus_per_worker
    settings: LaneSettings = {"lane": name, "queue": queue, "threads": lanes.cpus_per_worker}
    return TorchTrainer(
        run_lane,
        train_loop_config=settings,
        torch_config=NodeTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=lanes.workers_per_lane,
            use_gpu=bool(lanes.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
        ),
    )
