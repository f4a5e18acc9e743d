import os
import platform
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import ray
from processes import descendants

import tuner.preflight
from datasets import Dataset
from datasets.filesystem import locate
from datasets.node_cache import CACHE_VARIABLE, cache_directory
from tuner import __version__
from tuner.cluster import Lanes, Node, alive_nodes, connected, named_once
from tuner.errors import ClusterError, JobFileError
from tuner.job import Job
from tuner.preflight import (
    NodeCheck,
    _token_fault,
    _unseen,
    check_nodes,
    job_check,
    local_faults,
    node_faults,
)
from tuner.trial_queue import TrialQueue

NODE = Node(id="node", address="10.0.0.1", cpus=1, gpus=0)


@pytest.fixture
def check(tmp_path: Path, tiny_dataset: Dataset) -> NodeCheck:
    """What this machine passes."""
    content = {"name": "us", "datasets": [tiny_dataset.uri], "storage": str(tmp_path / "storage")}
    job = Job.model_validate(content)
    return job_check(job, {"tiny": tiny_dataset}, f"sqlite:///{tmp_path / 'mlflow.db'}", None)


@pytest.fixture
def away() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class FirstCallerDies(BaseHTTPRequestHandler):
    """Kills the process that checks the node at its first request, and knows nothing at others."""

    killed: list[int]

    def do_POST(self) -> None:
        if self.killed:
            self.send_error(404)
            return
        for process in descendants(os.getpid(), "ray::local_faults"):
            process.kill()
            self.killed.append(process.pid)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@pytest.fixture
def first_caller_dies() -> Iterator[HTTPServer]:
    FirstCallerDies.killed = []
    with HTTPServer(("127.0.0.1", 0), FirstCallerDies) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def in_the_way(directory: Path) -> str:
    (directory / "file").write_text("in the way")
    return str(directory / "file")


def test_a_check_is_what_the_driver_has(check: NodeCheck, tiny_dataset: Dataset) -> None:
    assert check.versions["python"] == platform.python_version()
    assert check.versions["pwiser-tuner"] == __version__
    assert check.versions["ray"] == ray.__version__
    assert check.datasets == {tiny_dataset.uri: tiny_dataset.digest}
    assert check.tracking is None  # a file of the driver's own


def test_two_jobs_may_look_at_one_node_at_the_same_time(check: NodeCheck, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        faults = list(pool.map(lambda _: local_faults(check, NODE), range(40)))
    assert faults == [[]] * 40
    assert list((tmp_path / "storage").iterdir()) == []


def test_a_node_in_order_has_no_fault_and_nothing_is_left(check: NodeCheck, tmp_path: Path) -> None:
    assert local_faults(check, NODE) == []
    assert local_faults(check, NODE) == []
    assert list((tmp_path / "storage").iterdir()) == []


def test_a_storage_that_cannot_be_written_is_told(check: NodeCheck, tmp_path: Path) -> None:
    storage = in_the_way(tmp_path)
    assert local_faults(replace(check, storage=storage), NODE) == [
        f"storage {storage} cannot be written and read back ([Errno 17] Cannot create directory "
        f"'{storage}': non-directory entry exists. Detail: [errno 17] File exists)"
    ]


def test_a_storage_without_what_the_driver_wrote_is_told(check: NodeCheck, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shared = replace(check, token=".preflight-token")
    fault = (
        f"storage {storage} is another one than the driver's (what the driver wrote is not there); "
        "mount the same disk on all nodes, or name an object store (s3://...)"
    )
    assert local_faults(shared, NODE) == [fault]
    assert list(storage.iterdir()) == []
    (storage / ".preflight-token").touch()
    assert local_faults(shared, NODE) == []


def test_what_a_node_wrote_and_the_driver_does_not_see_is_told(
    check: NodeCheck, tmp_path: Path
) -> None:
    shared = replace(check, token=".preflight-token")
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / ".preflight-token").touch()
    assert local_faults(shared, NODE) == []
    assert _unseen(shared, [NODE]) == {NODE.id: []}
    elsewhere = replace(shared, storage=str(tmp_path))
    assert _unseen(elsewhere, [NODE]) == {
        NODE.id: [
            f"storage {tmp_path} is another one than the driver's (what the node wrote is not "
            "there); mount the same disk on all nodes, or name an object store (s3://...)"
        ]
    }


def test_what_hundreds_of_nodes_wrote_is_looked_for_only_as_long_as_is_set(
    check: NodeCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.preflight, "READ_TIMEOUT_S", 1.0)
    shared = replace(check, token=".preflight-token")
    quick, *hanging = (replace(NODE, id=str(index)) for index in range(200))
    (tmp_path / "storage").mkdir()
    shared.probe_of(quick).write_bytes(quick.id.encode())
    fifos = [Path(shared.probe_of(node).path) for node in hanging]
    for fifo in fifos:
        os.mkfifo(fifo)
    before = time.monotonic()
    found = _unseen(shared, [quick, *hanging])
    assert time.monotonic() - before < 10
    fault = (
        f"storage {tmp_path / 'storage'} cannot be read by the driver (gave no answer within 1 s)"
    )
    assert found == {quick.id: []} | {node.id: [fault] for node in hanging}
    for fifo in fifos:  # whoever still reads it comes to its end
        fifo.open("r+b", buffering=0).close()


def test_a_storage_that_never_answers_the_driver_is_told(
    check: NodeCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.preflight, "WRITE_TIMEOUT_S", 0.5)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert _token_fault(replace(check, storage="s3://bucket/storage", token="token")) == (
            "storage s3://bucket/storage cannot be written (gave no answer within 0.5 s)"
        )


def test_a_cache_that_cannot_be_written_is_told_where_one_is_used(
    check: NodeCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = in_the_way(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, cache)
    assert local_faults(check, NODE) == [
        f"cache cannot be used ({cache_directory()}: cannot keep the shared arrays here ([Errno "
        f"17] File exists: '{cache}'); make room or set {CACHE_VARIABLE} to another directory of "
        "this node)"
    ]
    assert local_faults(replace(check, mode="stream"), NODE) == []
    assert local_faults(check, replace(NODE, cpus=0)) == []


def test_a_cache_that_cannot_be_written_is_no_fault_where_no_worker_finds_room(
    check: NodeCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, in_the_way(tmp_path))
    lanes = Lanes(num_lanes=1, workers_per_lane=1, cpus_per_worker=2, gpus_per_worker=1.0)
    planned = replace(check, lanes=lanes)
    assert local_faults(planned, replace(NODE, cpus=8)) == []
    assert local_faults(planned, replace(NODE, gpus=1)) == []
    (fault,) = local_faults(planned, replace(NODE, cpus=8, gpus=1))
    assert fault.startswith("cache cannot be used (")


def test_a_cache_without_room_is_told_where_lanes_are_sure_to_need_it(
    check: NodeCheck, tmp_path: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    vast, manifest = tmp_path / "vast", tiny_dataset.manifest
    train = manifest.splits["train"].model_copy(update={"impressions": 10**15})
    splits = {"splits": manifest.splits | {"train": train}}
    manifest.model_copy(update=splits).write(locate(vast))
    wanted = replace(check, datasets={str(vast): tiny_dataset.digest})
    (fault,) = local_faults(replace(wanted, mode="memory"), NODE)
    assert re.fullmatch(
        rf"cache cannot be used \({cache_directory()}: cannot keep the shared arrays here "
        rf"\(\d+ bytes needed, \d+ are free\); make room or set {CACHE_VARIABLE} to another "
        r"directory of this node\)",
        fault,
    )
    assert local_faults(wanted, NODE) == []  # they stream it


def test_a_missing_dataset_is_told(check: NodeCheck, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    (fault,) = local_faults(replace(check, datasets={missing: "0" * 64}), NODE)
    assert fault == (
        f"dataset {missing} cannot be used ({missing}: no such dataset; make one with "
        "'pwiser data prepare' or 'pwiser data synth')"
    )


def test_other_content_of_a_dataset_is_told(check: NodeCheck, tiny_dataset: Dataset) -> None:
    (fault,) = local_faults(replace(check, datasets={tiny_dataset.uri: "0" * 64}), NODE)
    assert fault == (
        f"dataset {tiny_dataset.uri} has the digest {tiny_dataset.digest[:12]}, "
        "the driver's has 000000000000"
    )


def test_another_version_is_told(check: NodeCheck) -> None:
    versions = {**check.versions, "ray": "2.0.0", "python": "3.8.1"}
    assert local_faults(replace(check, versions=versions), NODE) == [
        f"python is {platform.python_version()}, the driver's is 3.8.1",
        f"ray is {ray.__version__}, the driver's is 2.0.0",
    ]


def test_an_mlflow_that_does_not_answer_is_told(
    check: NodeCheck, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (fault,) = local_faults(replace(check, tracking=away), NODE)
    assert fault.startswith(
        f"MLflow cannot be used (tracking.uri {away}: cannot be used (API request to {away}/api/2.0"
        "/mlflow/experiments/search failed with exception "
    )


def test_all_faults_of_a_node_are_told_at_once(
    check: NodeCheck, tmp_path: Path, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    broken = NodeCheck(
        versions={"ray": "2.0.0"},
        storage=in_the_way(tmp_path),
        datasets={"/missing/es": "0", "/missing/us": "0"},
        tracking=away,
    )
    faults = local_faults(broken, NODE)
    starts = ("ray is ", "storage /", "dataset /missing/es ", "dataset /missing/us ", "MLflow ")
    assert len(faults) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(faults, starts, strict=True))
    assert not any("\n" in fault for fault in faults)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connected():
        yield


@pytest.mark.ray
@pytest.mark.slow
class TestOnRay:
    """What a cluster's nodes say, here the one of an embedded Ray."""

    def test_nodes_in_order_pass(self, ray_session: None, check: NodeCheck, tmp_path: Path) -> None:
        nodes = alive_nodes()
        assert len(nodes) == 1
        assert nodes[0].cpus >= 1
        check_nodes(check, nodes)
        assert list((tmp_path / "storage").iterdir()) == []

    def test_a_node_that_fails_is_named_with_every_reason(
        self, ray_session: None, check: NodeCheck
    ) -> None:
        (node,) = alive_nodes()
        broken = replace(check, versions={"ray": "2.0.0"}, datasets={"/missing/us": "0"})
        with pytest.raises(ClusterError) as caught:
            check_nodes(broken, [node])
        assert str(caught.value) == (
            f"cluster: node {node.address}: ray is {ray.__version__}, the driver's is 2.0.0, "
            "dataset /missing/us cannot be used (/missing/us: no such dataset; make one with "
            "'pwiser data prepare' or 'pwiser data synth'); mend what is named, or remove a node "
            "that fails, and start the job again"
        )

    def test_a_storage_that_each_node_has_for_itself_is_refused(
        self,
        ray_session: None,
        check: NodeCheck,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (node,) = alive_nodes()
        monkeypatch.chdir(tmp_path)
        storage = "/proc/self/cwd"  # of this process another than of Ray's workers
        with pytest.raises(ClusterError) as caught:
            check_nodes(replace(check, storage=storage), [node])
        assert str(caught.value) == (
            f"cluster: node {node.address}: storage {storage} is another one than the driver's "
            "(what the driver wrote is not there); mount the same disk on all nodes, or name an "
            "object store (s3://...); mend what is named, or remove a node that fails, and start "
            "the job again"
        )
        assert list(tmp_path.iterdir()) == []

    def test_a_storage_that_the_driver_cannot_write_is_named_beside_other_faults(
        self, ray_session: None, check: NodeCheck, tmp_path: Path
    ) -> None:
        (node,) = alive_nodes()
        storage = in_the_way(tmp_path)
        broken = replace(check, storage=storage, versions={"ray": "2.0.0"})
        driver, other = node_faults(broken, [node])
        assert driver.startswith(f"driver: storage {storage} cannot be written ([Errno 17] Cannot ")
        assert other.startswith(
            f"node {node.address}: ray is {ray.__version__}, the driver's is 2.0.0, storage "
            f"{storage} cannot be written and read back ("
        )
        with pytest.raises(
            ClusterError, match=f"^cluster: driver: storage {storage} .*; mend what"
        ):
            check_nodes(broken, [node])

    def test_a_check_that_died_is_run_once_more(
        self, ray_session: None, check: NodeCheck, first_caller_dies: HTTPServer
    ) -> None:
        tracking = f"http://127.0.0.1:{first_caller_dies.server_port}"
        (fault,) = node_faults(replace(check, tracking=tracking), alive_nodes())
        assert len(FirstCallerDies.killed) == 1
        assert f": MLflow cannot be used (tracking.uri {tracking}: " in fault
        assert "404" in fault

    def test_a_node_that_is_gone_is_named_beside_those_that_pass(
        self, ray_session: None, check: NodeCheck
    ) -> None:
        gone = Node(id="0" * 56, address="10.0.0.9", cpus=1, gpus=0)
        (fault,) = node_faults(check, [*alive_nodes(), gone])
        assert fault.startswith(
            "node 10.0.0.9: The task is not schedulable: The node specified via "
            "NodeAffinitySchedulingStrategy doesn't exist any more or is infeasible"
        )

    def test_a_job_has_its_name_alone_and_gives_it_back(
        self, ray_session: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tuner.cluster.NAME_WAIT_S", 0.0)
        actor = ray.remote(num_cpus=0)(TrialQueue)
        with named_once("us", actor), named_once("es", actor):
            with pytest.raises(JobFileError) as caught, named_once("us", actor):
                pass
            assert str(caught.value) == (
                "name: job 'us' is running already on this cluster; "
                "wait for it, stop it (pwiser stop), or choose another name"
            )
        monkeypatch.undo()
        with named_once("us", actor):
            pass
