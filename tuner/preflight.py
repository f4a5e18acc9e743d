"""Before a job starts on a cluster: can every node do its part? A task looks, on each of them.

A node that cannot write the storage or misses the dataset would otherwise show hours later, as
trials that fail or lanes that hang.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets import Dataset, DatasetError, open_dataset
from datasets.filesystem import Location, locate
from datasets.node_cache import cache_entry, check_cache
from trainables.execution import fits_in_memory, memory_limits
from tuner.cluster import Lanes, Node
from tuner.errors import ClusterError
from tuner.job import Job
from tuner.look import look
from tuner.storage import absolute_uri, join
from tuner.tracking import connect
from tuner.versions import installed_versions

__all__ = ["NodeCheck", "check_nodes", "job_check", "local_faults", "node_faults"]

CHECK_TIMEOUT_S = 30.0
NODE_TIMEOUT_S = 50.0
WRITE_TIMEOUT_S = 20.0  # of the nodes' time
READ_TIMEOUT_S = 7.0
REMOVE_TIMEOUT_S = 2.0
STORAGE_THREADS = 32
PROBE_PREFIX = ".preflight-"
NOT_SHARED = (
    "is another one than the driver's (what {} wrote is not there); mount the same disk on all "
    "nodes, or name an object store (s3://...)"
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What every node has to pass.

    Attributes:
        versions: of Python and the packages, as the driver has them.
        storage: URI to write below, and to read back.
        datasets: digest by URI.
        tracking: URI of the MLflow server; None where only the driver's own disk holds the store.
        mode: how lanes read the datasets.
        lanes: of the job; None where they find no room.
        token: name of a file that the driver has written in the storage; None where there is no
            other node.
    """

    versions: Mapping[str, str]
    storage: str
    datasets: Mapping[str, str]
    tracking: str | None
    mode: Literal["auto", "memory", "stream"] = "auto"
    lanes: Lanes | None = None
    token: str | None = None

    def has_workers(self, node: Node) -> bool:
        """Whether a worker finds room on a node; without lanes, on each that has CPUs."""
        if self.lanes is None:
            return node.cpus > 0
        return self.lanes.workers_in(node.cpus, node.gpus) > 0

    def probe_of(self, node: Node | None) -> Location:
        """Where a node writes what the driver reads; of None, where the driver's token is."""
        name = str(self.token) if node is None else f"{self.token}-{node.id}"
        return locate(join(self.storage, name))


def job_check(
    job: Job, datasets: Mapping[str, Dataset], tracking_uri: str, lanes: Lanes | None
) -> NodeCheck:
    """What a job's nodes have to pass, as this process finds it."""
    return NodeCheck(
        versions=installed_versions(),
        storage=absolute_uri(job.storage),
        datasets={dataset.uri: dataset.digest for dataset in datasets.values()},
        tracking=None if tracking_uri.startswith("sqlite:") else tracking_uri,
        mode=job.data.mode,
        lanes=lanes,
    )


def check_nodes(check: NodeCheck, nodes: Sequence[Node]) -> None:
    """Check this process and every node before a job.

    Raises:
        ClusterError: naming the driver, if it fails, and each node that does, and every reason.
    """
    faults = node_faults(check, nodes)
    if faults:
        raise ClusterError(
            f"cluster: {'; '.join(faults)}; mend what is named, or remove a node that fails, and "
            "start the job again"
        )


def node_faults(check: NodeCheck, nodes: Sequence[Node]) -> list[str]:
    """Run the check on every node at once, within a minute; a line for each that fails.

    The first is of the driver, this process, where it cannot write the storage.
    """
    deadline = time.monotonic() + NODE_TIMEOUT_S
    # of a name of its own: another job may be looking at the same storage now
    told = replace(check, token=f"{PROBE_PREFIX}{secrets.token_hex(8)}")
    try:
        fault = _token_fault(told)
        if fault is not None:
            return [f"driver: {fault}", *_faults_of_nodes(check, nodes, deadline)]
        return _faults_of_nodes(told, nodes, deadline)
    finally:
        _at_once(partial(_remove, told), [None, *nodes], REMOVE_TIMEOUT_S)


def _faults_of_nodes(check: NodeCheck, nodes: Sequence[Node], deadline: float) -> list[str]:
    """A line for each node that fails; of what the driver sees too, if it has written a token.

    A node where Ray could not run the check to its end is asked once more: a worker process that
    dies as it starts says nothing of the node.
    """
    answers = _ask(check, nodes, deadline)
    if unsure := [node for node in nodes if isinstance(answers[node.id], Exception)]:
        answers |= _ask(check, unsure, deadline)
    reasons = {
        node_id: [_reason(answer)] if isinstance(answer, Exception) else answer
        for node_id, answer in answers.items()
    }
    if check.token is not None:
        reasons |= _unseen(check, [node for node in nodes if not reasons[node.id]])
    return [
        f"node {node.address}: {', '.join(reasons[node.id])}" for node in nodes if reasons[node.id]
    ]


def _token_fault(check: NodeCheck) -> str | None:
    """Write the driver's token into the storage; what is wrong if it cannot."""
    try:
        if look(partial(_write_token, check), WRITE_TIMEOUT_S):
            return None
        reason = _no_answer(WRITE_TIMEOUT_S)
    except (OSError, DatasetError) as error:
        reason = _reason(error)
    return f"storage {check.storage} cannot be written ({reason})"


def _write_token(check: NodeCheck) -> bool:
    check.probe_of(None).write_bytes(str(check.token).encode())
    return True


def _unseen(check: NodeCheck, nodes: Sequence[Node]) -> dict[str, list[str]]:
    """What is wrong, by the node's id, where the driver does not see what a node has written."""
    faults = _at_once(partial(_probe_faults, check), nodes, READ_TIMEOUT_S)
    late = [_unreadable(check, _no_answer(READ_TIMEOUT_S))]
    return {
        node.id: late if found is None else found for node, found in zip(nodes, faults, strict=True)
    }


def _probe_faults(check: NodeCheck, node: Node) -> list[str]:
    try:
        probe = check.probe_of(node)
        if probe.exists() and probe.read_bytes() == node.id.encode():
            return []
    except (OSError, DatasetError) as error:
        return [_unreadable(check, _reason(error))]
    return [f"storage {check.storage} {NOT_SHARED.format('the node')}"]


def _unreadable(check: NodeCheck, reason: str) -> str:
    return f"storage {check.storage} cannot be read by the driver ({reason})"


def _remove(check: NodeCheck, node: Node | None) -> None:
    with suppress(OSError, DatasetError):
        probe = check.probe_of(node)
        probe.filesystem.delete_file(probe.path)


def _at_once(
    call: Callable[[Item], Answer], items: Sequence[Item], timeout_s: float
) -> list[Answer | None]:
    """Make a call of each, some at a time; None for one that has not returned when time is up."""
    deadline = time.monotonic() + timeout_s

    def answer(item: Item) -> Answer | None:
        return look(partial(call, item), max(deadline - time.monotonic(), 0.0))

    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        return list(pool.map(answer, items))


def _ask(
    check: NodeCheck, nodes: Sequence[Node], deadline: float
) -> dict[str, list[str] | Exception]:
    """What is wrong with each node, by its id, or what kept Ray from finding out."""
    task = ray.remote(num_cpus=0, max_retries=0)(local_faults)
    references = {
        node.id: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(check, node)
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


def local_faults(check: NodeCheck, node: Node) -> list[str]:
    """Check this node; every reason why it cannot take part, in words."""
    parts: dict[str, Callable[[], str | None]] = {
        f"storage {check.storage}": partial(_storage_fault, check, node),
    }
    if check.mode != "stream" and check.has_workers(node):
        parts["cache"] = partial(_cache_fault, check, node)
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


def _storage_fault(check: NodeCheck, node: Node) -> str | None:
    own = check if check.token else replace(check, token=f"{PROBE_PREFIX}{secrets.token_hex(8)}")
    probe, content = own.probe_of(node), node.id.encode()
    try:
        probe.write_bytes(content)
        is_same = probe.read_bytes() == content
        is_shared = check.token is not None and check.probe_of(None).exists()
        if not is_shared:  # nobody else looks for it
            probe.filesystem.delete_file(probe.path)
    except OSError as error:
        return f"cannot be written and read back ({_reason(error)})"
    if not is_same:
        return "gives back other bytes than were written"
    if check.token is not None and not is_shared:
        return NOT_SHARED.format("the driver")
    return None


def _cache_fault(check: NodeCheck, node: Node) -> None:
    """Check that the node's cache can be written, with room for what lanes are sure to hold."""
    sizes = {}
    for uri in check.datasets:
        with suppress(DatasetError):  # of which its own part tells
            dataset = open_dataset(uri)
            for split in dataset.manifest.splits:
                sizes[cache_entry(dataset.manifest, split)] = dataset.size_bytes(split)
    if check.mode == "auto" and (
        node.gpus or not fits_in_memory(sum(sizes.values()), memory_limits(torch.device("cpu")))
    ):
        sizes = {}  # lanes may stream some of them
    check_cache(sizes)


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
