"""The Ray cluster that a job runs on: the one in `RAY_ADDRESS`, or one embedded in this process."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datasets.errors import one_line
from tuner.errors import ClusterError, JobFileError
from tuner.job import ResourceSettings

if TYPE_CHECKING:
    import ray

__all__ = [
    "Lanes",
    "Node",
    "alive_nodes",
    "cluster_address",
    "connected",
    "free_resources",
    "named_once",
    "plan_lanes",
]

NAMESPACE = "pwiser"
LANE_BYTES = 512 * 1024**2
"""What a lane's other processes hold, Ray Train's controller and Ray Tune's actor: twice that."""
WORKER_BYTES = 1024**3
"""What one worker holds, with a table of some million impressions; larger ones are shared."""
MAX_CPUS_BESIDE_GPU = 4
"""Cores for a worker that trains on a GPU, where the job file names none: it hardly uses one."""
NAME_WAIT_S = 15.0  # Ray takes some seconds to notice that a killed driver is gone


def cluster_address() -> str | None:
    """The cluster in `RAY_ADDRESS`; None where the job runs on a Ray embedded in this process."""
    return os.environ.get("RAY_ADDRESS") or None


@contextmanager
def connected(*, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for as long as the context lasts; an embedded Ray ends with it.

    Args:
        verbose: show what Ray and the workers print.

    Raises:
        ClusterError: if the cluster in `RAY_ADDRESS` cannot be reached, or an embedded Ray started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # an actor per Train run that tells of a node's coming end, which changes nothing for a lane
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # a lane is three processes: at Ray's own limit of one start per core it warns of "too many"
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(2 * (os.cpu_count() or 1)))
    import ray

    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if not verbose:  # Tune prints a traceback for each of its actors that dies; we say so ourselves
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    address = cluster_address()
    try:
        if address:
            ray.init(address=address, logging_level=level, log_to_driver=verbose)
        else:
            from tuner.embedded_ray import start_embedded_ray

            start_embedded_ray(logging_level=level, shows_output=verbose)
    except Exception as error:  # Ray raises that itself, where its processes do not start in time
        raise ClusterError(_no_ray(address, one_line(error))) from error
    try:
        yield
    finally:
        ray.shutdown()


def _no_ray(address: str | None, reason: str) -> str:
    if address:
        return (
            f"RAY_ADDRESS {address}: no Ray cluster answers ({reason}); check the address, "
            "or unset it to run on this machine"
        )
    from ray._common.utils import get_default_ray_temp_dir

    return (
        f"Ray cannot be started on this machine ({reason}); its files and logs are below "
        f"{get_default_ray_temp_dir()}: set RAY_TMPDIR to put them elsewhere"
    )


@contextmanager
def named_once(job: str, actor: "ray.actor.ActorClass[Any]") -> "Iterator[ray.actor.ActorHandle]":
    """Start an actor under a job's name, which no other driver of the cluster can then take.

    The name is free again when the context ends, and when this process dies.

    Args:
        job: its name.
        actor: started without arguments.

    Raises:
        JobFileError: if a job of this name runs on the cluster.
    """
    import ray

    deadline = time.monotonic() + NAME_WAIT_S
    while True:
        try:
            handle = actor.options(name=f"job/{job}", namespace=NAMESPACE).remote()
            break
        except ValueError as error:
            if time.monotonic() > deadline:
                raise JobFileError(
                    f"name: job {job!r} is running already on this cluster; "
                    "wait for it, stop it (pwiser stop), or choose another name"
                ) from error
            time.sleep(1.0)
    try:
        yield handle
    finally:
        ray.kill(handle)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster and what it has in all, used or not.

    Attributes:
        id: Ray's.
        address: IP address.
        cpus: that Ray may give out.
        gpus: likewise.
        memory_bytes: that Ray counts on; of the whole machine where nobody told it.
    """

    id: str
    address: str
    cpus: float
    gpus: float
    memory_bytes: int = 0


def alive_nodes() -> list[Node]:
    """List the nodes of the cluster that this process is connected to."""
    import ray

    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory_bytes=int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> dict[str, float]:
    """What nobody holds now, over all nodes, as Ray names it."""
    import ray

    return dict(ray.available_resources())


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """How many lanes there are, and what each worker of one holds."""

    num_lanes: int
    workers_per_lane: int
    cpus_per_worker: int
    gpus_per_worker: float

    @property
    def cpus_per_lane(self) -> int:
        """CPUs that one lane holds."""
        return self.workers_per_lane * self.cpus_per_worker

    @property
    def gpus_per_lane(self) -> float:
        """GPUs that one lane holds."""
        return self.workers_per_lane * self.gpus_per_worker

    @property
    def workers_per_gpu(self) -> int:
        """Workers that share a GPU; 1 where each has one or more, or none."""
        return int(1.0 / self.gpus_per_worker + 1e-9) if 0 < self.gpus_per_worker < 1 else 1

    def workers_in(self, cpus: float, gpus: float) -> int:
        """Count the workers that so many CPUs and GPUs hold."""
        workers = int(cpus // self.cpus_per_worker)
        if self.gpus_per_worker >= 1:
            workers = min(workers, int(gpus // self.gpus_per_worker))
        elif self.gpus_per_worker:  # none has parts of two GPUs
            whole, rest = divmod(gpus, 1.0)
            in_rest = int(rest / self.gpus_per_worker + 1e-9)
            workers = min(workers, int(whole) * self.workers_per_gpu + in_rest)
        return workers


def plan_lanes(
    settings: ResourceSettings,
    nodes: Sequence[Node],
    *,
    free: Mapping[str, float] | None = None,
) -> Lanes:
    """Fit the lanes of a job to a cluster: each worker has to find room on one node.

    Args:
        settings: of the job file.
        nodes: of the cluster.
        free: what other jobs leave, as `free_resources` gives it; where the job file names no
            number of lanes they are as many as fit there, and at least one.

    Raises:
        ClusterError: if the lanes asked for do not fit, and nothing says that nodes will be added.
    """
    gpus_per_worker = settings.gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if any(node.gpus for node in nodes) else 0.0
    lanes = Lanes(
        num_lanes=settings.lanes or 1,
        workers_per_lane=settings.workers_per_lane,
        cpus_per_worker=settings.cpus_per_worker or 1,
        gpus_per_worker=gpus_per_worker,
    )
    room = _room(lanes, nodes)
    if settings.lanes is None and room:
        unused = _room_in_memory(lanes, nodes)
        if free is not None:
            workers = lanes.workers_in(free.get("CPU", 0.0), free.get("GPU", 0.0))
            unused = min(unused, workers // lanes.workers_per_lane)
        lanes = replace(lanes, num_lanes=max(unused, 1))
    if lanes.num_lanes <= room:
        return lanes if settings.cpus_per_worker else _share_cores(lanes, nodes, free)
    if not settings.autoscaled:  # Ray does not tell what an autoscaler may add
        raise ClusterError(_no_room(lanes, nodes, room))
    return lanes


def _room(lanes: Lanes, nodes: Sequence[Node]) -> int:
    """Count the lanes that find room by cores and GPUs."""
    workers = sum(lanes.workers_in(node.cpus, node.gpus) for node in nodes)
    return workers // lanes.workers_per_lane


def _room_in_memory(lanes: Lanes, nodes: Sequence[Node]) -> int:
    """Count the lanes that find room by cores, GPUs and memory, where a node tells of it."""
    worker_bytes = WORKER_BYTES + LANE_BYTES // lanes.workers_per_lane
    workers = 0
    for node in nodes:
        in_node = lanes.workers_in(node.cpus, node.gpus)
        if node.memory_bytes:
            in_node = min(in_node, node.memory_bytes // worker_bytes)
        workers += in_node
    return workers // lanes.workers_per_lane


def _share_cores(lanes: Lanes, nodes: Sequence[Node], free: Mapping[str, float] | None) -> Lanes:
    """Give every worker as many cores as all can have, of those that other jobs leave."""
    num_workers = lanes.num_lanes * lanes.workers_per_lane
    free_cpus = sum(node.cpus for node in nodes) if free is None else free.get("CPU", 0.0)
    share = int(free_cpus // num_workers)
    if lanes.gpus_per_worker:
        share = min(share, MAX_CPUS_BESIDE_GPU)
    while share > 1:  # the cores of a worker are on one node
        wider = replace(lanes, cpus_per_worker=share)
        if _room(wider, nodes) >= lanes.num_lanes:
            return wider
        share -= 1
    return lanes


def _no_room(lanes: Lanes, nodes: Sequence[Node], room: int) -> str:
    largest = max(nodes, key=lambda node: (lanes.workers_in(node.cpus, node.gpus), node.cpus))
    has = f"{sum(node.cpus for node in nodes):g} and {sum(node.gpus for node in nodes):g}"
    if len(nodes) > 1:
        has += (
            f" on {len(nodes)} nodes (the largest {largest.cpus:g} and {largest.gpus:g}; "
            f"a worker needs {lanes.cpus_per_worker} and {lanes.gpus_per_worker:g} on one node)"
        )
    fix = f"set resources.lanes to {room} or less" if room else "ask for less per lane"
    if len(nodes) > 1 or not largest.cpus:
        fix += ", or resources.autoscaled to true where nodes are added as they are asked for"
    return (
        f"resources: {lanes.num_lanes} lane(s) of {lanes.workers_per_lane} worker(s) need "
        f"{lanes.num_lanes * lanes.cpus_per_lane} CPUs and "
        f"{lanes.num_lanes * lanes.gpus_per_lane:g} GPUs, the cluster has {has}; {fix}"
    )
