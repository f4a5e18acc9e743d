"""Before a job starts on a cluster: can every node do its part? A task looks, on each of them.

A node that cannot write the storage or misses the dataset would otherwise show hours later, as
trials that fail or lanes that hang.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets import Dataset, open_dataset
from datasets.filesystem import locate
from tuner.cluster import Node
from tuner.errors import ClusterError
from tuner.job import Job
from tuner.storage import absolute_uri, join
from tuner.tracking import connect
from tuner.versions import installed_versions

__all__ = ["NodeCheck", "check_nodes", "job_check", "local_faults", "node_faults"]

CHECK_TIMEOUT_S = 30.0
NODE_TIMEOUT_S = 50.0
PROBE_PREFIX = ".preflight-"


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What every node has to pass.

    Attributes:
        versions: of Python and the packages, as the driver has them.
        storage: URI to write below, and to read back.
        datasets: digest by URI.
        tracking: URI of the MLflow server; None where only the driver's own disk holds the store.
    """

    versions: Mapping[str, str]
    storage: str
    datasets: Mapping[str, str]
    tracking: str | None


def job_check(job: Job, datasets: Mapping[str, Dataset], tracking_uri: str) -> NodeCheck:
    """What a job's nodes have to pass, as this process finds it."""
    return NodeCheck(
        versions=installed_versions(),
        storage=absolute_uri(job.storage),
        datasets={dataset.uri: dataset.digest for dataset in datasets.values()},
        tracking=None if tracking_uri.startswith("sqlite:") else tracking_uri,
    )


def check_nodes(check: NodeCheck, nodes: Sequence[Node]) -> None:
    """Check every node before a job.

    Raises:
        ClusterError: naming each node that fails, and every reason.
    """
    faults = node_faults(check, nodes)
    if faults:
        raise ClusterError(
            f"cluster: {'; '.join(faults)}; mend or remove "
            f"{'that node' if len(faults) == 1 else 'those nodes'} and start the job again"
        )


def node_faults(check: NodeCheck, nodes: Sequence[Node]) -> list[str]:
    """Run the check on every node at once, within a minute; a line for each that fails.

    A node where Ray could not run it to its end is asked once more: a worker process that dies as
    it starts says nothing of the node.
    """
    deadline = time.monotonic() + NODE_TIMEOUT_S
    answers = _ask(check, nodes, deadline)
    if unsure := [node for node in nodes if isinstance(answers[node.id], Exception)]:
        answers |= _ask(check, unsure, deadline)
    faults = []
    for node in nodes:
        answer = answers[node.id]
        reasons = [_reason(answer)] if isinstance(answer, Exception) else answer
        if reasons:
            faults.append(f"node {node.address}: {', '.join(reasons)}")
    return faults


def _ask(
    check: NodeCheck, nodes: Sequence[Node], deadline: float
) -> dict[str, list[str] | Exception]:
    """What is wrong with each node, by its id, or what kept Ray from finding out."""
    task = ray.remote(num_cpus=0, max_retries=0)(local_faults)
    references = {
        node.id: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(check, node.id)
        for node in nodes
    }
    done, _ = ray.wait(
        list(references.values()),
        num_returns=len(references),
        timeout=max(deadline - time.monotonic(), 0.0),
    )
    return {
        node_id: _result(reference) if reference in done else [_no_answer(NODE_TIMEOUT_S)]
        for node_id, reference in references.items()
    }


def local_faults(check: NodeCheck, node_id: str) -> list[str]:
    """Check this node; every reason why it cannot take part, in words."""
    parts: dict[str, Callable[[], str | None]] = {
        f"storage {check.storage}": partial(_storage_fault, check.storage, node_id),
    }
    for uri, digest in check.datasets.items():
        parts[f"dataset {uri}"] = partial(_dataset_fault, uri, digest)
    if check.tracking is not None:
        parts["MLflow"] = partial(_tracking_fault, check.tracking)
    pool = ThreadPoolExecutor(len(parts))
    futures = {name: pool.submit(part) for name, part in parts.items()}
    wait(futures.values(), timeout=CHECK_TIMEOUT_S)
    pool.shutdown(wait=False)  # a part that hangs may go on hanging; the verdict is in
    named = {name: _fault_of(future) for name, future in futures.items()}
    return _version_faults(check.versions) + [
        f"{name} {fault}" for name, fault in named.items() if fault is not None
    ]


def _fault_of(future: Future[str | None]) -> str | None:
    if not future.done():
        return _no_answer(CHECK_TIMEOUT_S)
    error = future.exception()
    return future.result() if error is None else f"cannot be used ({_reason(error)})"


def _version_faults(wanted: Mapping[str, str]) -> list[str]:
    found = installed_versions()
    return [
        f"{name} is {found[name]}, the driver's is {wanted[name]}"
        for name in wanted
        if found[name] != wanted[name]
    ]


def _storage_fault(uri: str, node_id: str) -> str | None:
    # of a name of its own: another job may be looking at the same storage now
    probe = locate(join(uri, f"{PROBE_PREFIX}{node_id}-{secrets.token_hex(4)}"))
    try:
        probe.write_bytes(node_id.encode())
        content = probe.read_bytes()
        probe.filesystem.delete_file(probe.path)
    except OSError as error:
        return f"cannot be written and read back ({_reason(error)})"
    return None if content == node_id.encode() else "gives back other bytes than were written"


def _dataset_fault(uri: str, digest: str) -> str | None:
    found = open_dataset(uri).digest
    if found != digest:
        return f"has the digest {found[:12]}, the driver's has {digest[:12]}"
    return None


def _tracking_fault(uri: str) -> None:
    connect(uri)


def _result(reference: "ray.ObjectRef[list[str]]") -> list[str] | Exception:
    try:
        faults: list[str] = ray.get(reference)
    except Exception as error:  # noqa: BLE001 - a node without our code fails in many ways
        return error
    return faults


def _no_answer(timeout_s: float) -> str:
    return f"gave no answer within {timeout_s:g} s"


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
