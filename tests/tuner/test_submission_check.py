import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml

import tuner.look
from datasets import Dataset, DatasetError
from tuner.errors import JobFileError, TrackingRefusedError
from tuner.job import Job
from tuner.submission_check import check_submission

SERVER_TIMEOUT_S = 300.0


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def check(*, working_dir: Path | None = None, seen_at: str | None = None, **content: Any) -> Job:
    text = yaml.safe_dump({"name": "us", "storage": "/storage"} | content)
    return check_submission(text, "us.yaml", working_dir=working_dir, tracking=seen_at)


def refusal(**content: Any) -> str:
    with pytest.raises(JobFileError) as caught:
        check(**content)
    return str(caught.value)


def test_a_job_in_order_is_given_back(tiny_dataset: Dataset) -> None:
    job = check(datasets=[tiny_dataset.uri], models=["dnn"])
    assert (job.name, job.datasets, job.models) == ("us", (tiny_dataset.uri,), ("dnn",))


def test_a_faulty_job_file_is_told_by_its_name(tiny_dataset: Dataset) -> None:
    assert refusal(datasets=[tiny_dataset.uri], models=["dnm"]) == (
        "us.yaml: models: 'dnm' is no model; choose from shared_bottom, mmoe, ple, dnn, masknet, "
        "or name your own as module:Class"
    )


@pytest.mark.parametrize("uri", ["data/us", "~/us", "us"])
def test_relative_paths_are_refused(uri: str) -> None:
    fix = (
        f"{uri} is relative to a directory of this machine; give a URI such as s3://bucket/..., "
        "or an absolute path that every node has"
    )
    assert refusal(datasets=["/data/es", uri]) == f"us.yaml: datasets: {fix}"
    assert refusal(datasets=["/data/es"], storage=uri) == f"us.yaml: storage: {fix}"


def test_a_job_file_that_is_too_large_is_refused() -> None:
    text = "name: us\ndatasets: [/data/us]\nstorage: /storage\n"
    padding = "# é" + "é" * 32_000
    largest = text + padding + "#" * (64 * 1024 - len((text + padding).encode()))
    check_submission(largest, "us.yaml", working_dir=None, tracking=None)
    with pytest.raises(JobFileError) as caught:
        check_submission(largest + "#", "us.yaml", working_dir=None, tracking=None)
    assert str(caught.value) == ("us.yaml: has 65537 bytes, a job file may have 65536; shorten it")


def test_a_working_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "modules"
    assert refusal(datasets=["/data/us"], working_dir=missing) == (
        f"--working-dir {missing}: no such directory; name one"
    )


def test_a_users_module_is_found_in_the_working_directory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "module_that_is_sent.py").write_text(
        "from trainables.models import DNN\nclass Mine(DNN):\n    pass\n"
    )
    content: dict[str, Any] = {"datasets": ["/data/us"], "models": ["module_that_is_sent:Mine"]}
    path = list(sys.path)
    assert refusal(**content) == (
        "us.yaml: models: 'module_that_is_sent:Mine' cannot be imported (ModuleNotFoundError: No "
        "module named 'module_that_is_sent'); mend it, or put the directory of "
        "'module_that_is_sent' on PYTHONPATH"
    )
    monkeypatch.chdir(tmp_path)
    assert check(**content, working_dir=Path("sent")).models == ("module_that_is_sent:Mine",)
    assert sys.path == path


def test_the_import_path_is_as_before_after_a_refusal(tmp_path: Path) -> None:
    path = list(sys.path)
    refusal(datasets=["/data/us"], models=["no_such_module:Mine"], working_dir=tmp_path)
    assert sys.path == path


@pytest.mark.parametrize("uri", ["/not/on/this/machine", "s3://bucket/us"])
def test_a_dataset_out_of_reach_is_left_to_the_cluster(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert check(datasets=[uri]).datasets == (uri,)


def test_a_dataset_that_never_answers_is_left_to_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuner.look, "LOOK_TIMEOUT_S", 0.5)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert check(datasets=["s3://bucket/us"]).datasets == ("s3://bucket/us",)


@pytest.mark.parametrize(
    "content", [{"datasets": ["ftp://host/us"]}, {"datasets": ["/us"], "storage": "ftp://host/us"}]
)
def test_an_unknown_filesystem_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(DatasetError) as caught:
        check(**content)
    assert str(caught.value) == (
        "ftp://host/us: no filesystem for this URI (Unrecognized filesystem type in URI: "
        "ftp://host/us); give a local path or a URI such as s3://bucket/dataset"
    )


def test_a_damaged_dataset_is_refused(tiny_dataset: Dataset, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    copytree(tiny_dataset.uri, damaged)
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(DatasetError) as caught:
        check(datasets=["/not/on/this/machine", str(damaged)])
    assert str(caught.value) == (
        f"{damaged}: manifest.json is damaged (content: invalid JSON: Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)); prepare the dataset again"
    )


def test_a_dataset_without_a_test_split_is_refused(tiny_dataset: Dataset, tmp_path: Path) -> None:
    untested = tmp_path / "untested"
    copytree(tiny_dataset.uri, untested)
    manifest = tiny_dataset.manifest
    splits = {name: split for name, split in manifest.splits.items() if name != "test"}
    content = manifest.model_copy(update={"splits": splits}).model_dump_json()
    (untested / "manifest.json").write_text(content)
    assert refusal(datasets=[str(untested)]) == (
        f"us.yaml: datasets: {untested} has no test split; prepare it again with one "
        "(nothing is ever searched on test)"
    )


@pytest.mark.parametrize("split", ["valid", "test"])
def test_an_objective_that_a_split_cannot_show_is_refused(
    tiny_dataset: Dataset, tmp_path: Path, split: str
) -> None:
    without = tmp_path / "without"
    copytree(tiny_dataset.uri, without)
    manifest = tiny_dataset.manifest
    summary = manifest.splits[split].model_copy(update={"conversions": 0})
    splits = dict(manifest.splits) | {split: summary}
    content = manifest.model_copy(update={"splits": splits}).model_dump_json()
    (without / "manifest.json").write_text(content)
    said = refusal(datasets=[str(without)])
    assert said.startswith(
        f"us.yaml: search.objective: mean_auc cannot be computed on the {split} split of {without}"
    )
    assert ("search.replicates to 0" in said) == (split == "test")
    if split == "test":
        check(datasets=[str(without)], search={"replicates": 0})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A real MLflow server with basic authentication: its address and its password."""
    directory = tmp_path_factory.mktemp("server")
    password = secrets.token_hex(12)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    (directory / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{directory / 'users.db'}\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(directory / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SERVER_TIMEOUT_S
        while not answers(address):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.2)
        yield address, password
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, "not the password"])
def test_a_tracking_server_that_refuses_us_is_told(
    guarded: tuple[str, str], monkeypatch: pytest.MonkeyPatch, wrong: str | None
) -> None:
    address, password = guarded
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", wrong or "")
    told = []
    for content in ({"tracking": {"uri": address}}, {"seen_at": address}):
        with pytest.raises(TrackingRefusedError) as caught:
            check(datasets=["/data/us"], **content)
        told.append(str(caught.value))
    assert (
        told
        == [
            f"tracking.uri {address}: refuses us (API request to endpoint "
            "/api/2.0/mlflow/experiments/search failed with error code 401 != 200); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ]
        * 2
    )
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    assert check(datasets=["/data/us"], tracking={"uri": address}).tracking.uri == address


def test_a_tracking_server_that_is_away_is_left_to_the_cluster() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        content = {"datasets": ["/data/us"], "tracking": {"uri": address}}
        assert check(**content).tracking.uri == address
