"""The Ray cluster that a job runs on: the one in `RAY_ADDRESS`, or one embedded in this process."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tuner.errors import ClusterError
from tuner.job import ResourceSettings

__all__ = ["Lanes", "connected", "plan_lanes"]

OBJECT_STORE_BYTES = 256 * 1024**2  # nothing large passes through it


@contextmanager
def connected(*, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for as long as the context lasts; an embedded Ray ends with it.

    Args:
        verbose: show what Ray and the workers print.

    Raises:
        ClusterError: if the cluster in `RAY_ADDRESS` cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # a lane is four processes: at Ray's own limit of one start per core it warns of "too many"
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(2 * (os.cpu_count() or 1)))
    import ray

    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, logging_level=level, log_to_driver=verbose)
        else:
            ray.init(
                address="local",
                logging_level=level,
                log_to_driver=verbose,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"RAY_ADDRESS {address}: no Ray cluster answers ({reason}); check the address, "
            "or unset it to run on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """How many lanes there are, and what each worker of one holds."""

    num_lanes: int
    workers_per_lane: int
    cpus_per_worker: int
    gpus_per_worker: float


def plan_lanes(settings: ResourceSettings, cluster: Mapping[str, float]) -> Lanes:
    """Fit the lanes of a job to a cluster.

    Args:
        settings: of the job file.
        cluster: the resources of the whole cluster, as `ray.cluster_resources` names them.

    Raises:
        ClusterError: if the lanes asked for do not fit.
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    gpus_per_worker = settings.gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if gpus else 0.0
    cpus_per_lane = settings.workers_per_lane * settings.cpus_per_worker
    gpus_per_lane = settings.workers_per_lane * gpus_per_worker
    room = int(cpus // cpus_per_lane)
    if gpus_per_lane:
        room = min(room, int(gpus / gpus_per_lane + 1e-9))
    wanted = settings.lanes or max(room, 1)
    if wanted > room:
        raise ClusterError(
            f"resources: {wanted} lane(s) of {settings.workers_per_lane} worker(s) need "
            f"{wanted * cpus_per_lane} CPUs and {wanted * gpus_per_lane:g} GPUs, "
            f"the cluster has {cpus:g} and {gpus:g}; "
            + (f"set resources.lanes to {room} or less" if room else "ask for less per lane")
        )
    return Lanes(
        num_lanes=wanted,
        workers_per_lane=settings.workers_per_lane,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
    )
