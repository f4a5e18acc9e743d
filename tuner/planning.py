"""Looking up and measuring what a plan needs: on this machine, or on the cluster that runs it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import ray

from datasets import Dataset, PwiserError
from trainables.configuration import TrialConfiguration
from tuner.cluster import (
    Lanes,
    Node,
    alive_nodes,
    cluster_address,
    connected,
    free_resources,
    plan_lanes,
)
from tuner.errors import ClusterError
from tuner.job import Job
from tuner.plan import Plan, make_plan, table_shape, this_machine
from tuner.preflight import NodeCheck, job_check, local_faults, node_faults
from tuner.probe import Probe, TableShape, measure
from tuner.storage import absolute_uri
from tuner.tracking_store import default_uri
from tuner.tuning import check_datasets

__all__ = ["plan_job"]

PROBE_TIMEOUT_S = 180.0

Measure = Callable[[TrialConfiguration, TableShape, int, int, float], Probe]


def plan_job(job: Job) -> Plan:
    """Plan a job for the cluster in `RAY_ADDRESS`, or for this machine where there is none.

    A few steps of every study's model are trained on rows of its dataset's shape.

    Raises:
        PwiserError: if the job cannot be run as it is written.
    """
    datasets = check_datasets(job)
    if cluster_address() is None:
        node = this_machine()
        lanes = _lanes_or_fault(lambda: plan_lanes(job.resources, [node]))
        faults = local_faults(_check(job, datasets, lanes), node)
        return _plan(job, datasets, [node], lanes, faults, _measure_here)
    with connected():
        nodes = alive_nodes()
        lanes = _lanes_or_fault(lambda: plan_lanes(job.resources, nodes, free=free_resources()))
        faults = node_faults(_check(job, datasets, lanes), nodes)
        return _plan(job, datasets, nodes, lanes, faults, _measure_on_cluster)


def _check(job: Job, datasets: dict[str, Dataset], lanes: Lanes | ClusterError) -> NodeCheck:
    tracking_uri = job.tracking.uri or default_uri(absolute_uri(job.storage))
    return job_check(job, datasets, tracking_uri, lanes if isinstance(lanes, Lanes) else None)


def _plan(
    job: Job,
    datasets: dict[str, Dataset],
    nodes: list[Node],
    lanes: Lanes | ClusterError,
    faults: list[str],
    measure_one: Measure,
) -> Plan:
    num_workers, threads = job.resources.workers_per_lane, job.resources.cpus_per_worker or 1
    gpus = 0.0
    if isinstance(lanes, Lanes):
        threads, gpus = lanes.cpus_per_worker, lanes.gpus_per_worker
    probes = {}
    for name, dataset in datasets.items():
        for model in job.models:
            try:
                probes[name, model] = measure_one(
                    job.configuration(model), table_shape(dataset), num_workers, threads, gpus
                )
            except PwiserError as error:
                faults.append(f"{name}/{model}: {error}")
    return make_plan(job, datasets, nodes, lanes, probes, faults)


def _lanes_or_fault(fit: Callable[[], Lanes]) -> Lanes | ClusterError:
    try:
        return fit()
    except ClusterError as error:
        return error


def _measure_here(
    configuration: TrialConfiguration,
    shape: TableShape,
    num_workers: int,
    threads: int,
    gpus: float,
) -> Probe:
    """Measure in a process of its own, as a lane's worker is one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(measure, configuration, shape, num_workers, threads, gpus)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise ClusterError("the probe was killed; is the memory enough?") from error
        except Exception as error:
            raise ClusterError(f"the probe failed ({type(error).__name__}: {error})") from error


def _measure_on_cluster(
    configuration: TrialConfiguration,
    shape: TableShape,
    num_workers: int,
    threads: int,
    gpus: float,
) -> Probe:
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)(measure)
    reference = task.remote(configuration, shape, num_workers, threads, gpus)
    try:
        found: Probe = ray.get(reference, timeout=PROBE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(reference, force=True)
        raise ClusterError(
            f"no worker of {threads} CPUs and {gpus:g} GPUs could be placed and measured within "
            f"{PROBE_TIMEOUT_S:g} s; is the cluster busy?"
        ) from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(f"the probe failed ({reason})") from error
    return found
