"""Jobs on a real Ray head with token authentication, through the client and the command line."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from processes import descendants
from ray._raylet import AuthenticationTokenLoader, Config

from datasets import Dataset
from tuner import Client
from tuner.cli import run
from tuner.client import JobState
from tuner.errors import ClusterError, JobFileError, JobNotFoundError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TRIALS = 8
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0
PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--ray-client-server-port",
    "--runtime-env-agent-port",
)
OWN_MODEL = """
import pathlib, torch, tuner
from trainables.models import DNN, Inputs

SLOW = pathlib.Path({slow!r})
ONES = torch.ones(256, 256)
print("code at", tuner.__file__)

class Mine(DNN):
    def __init__(self, inputs: Inputs, *, embedding_dim: int = 4) -> None:
        super().__init__(inputs, embedding_dim=embedding_dim, hidden_units=(8,))

    def forward(self, ids, numericals):
        for _ in range(100 if SLOW.exists() else 0):
            ONES @ ONES
        return super().forward(ids, numericals)
"""


@dataclass(frozen=True)
class Head:
    """A Ray head, and a user's directory with a job and a model of their own.

    Attributes:
        address: URL of the dashboard.
        directory: of the user.
    """

    address: str
    token: str
    directory: Path

    def write_job(self, name: str, dataset: Dataset, **content: Any) -> Path:
        job = {
            "name": name,
            "datasets": [dataset.uri],
            "models": ["mine:Mine"],
            "search": {
                "sampler": "random",
                "pruner": "none",
                "trials": NUM_TRIALS,
                "replicates": 0,
            },
            "training": {"epochs": 10, "batch_size": 256, "learning_rate": 0.01},
            "resources": {"lanes": 1, "cpus_per_worker": 1},
            "storage": str(self.directory / "storage"),
        }
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job | content))
        return path

    @property
    def modules(self) -> Path:
        """What `--working-dir` names."""
        return self.directory / "modules"

    def runs(self, job: str) -> dict[str, list[Run]]:
        """A job's runs by kind, the trials by their numbers."""
        client = MlflowClient(f"sqlite:///{self.directory / 'storage' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(job)
        assert experiment is not None
        found: dict[str, list[Run]] = {"study": [], "trial": []}
        for one in client.search_runs([experiment.experiment_id]):
            found[one.data.tags["pwiser.kind"]].append(one)
        found["trial"].sort(key=lambda one: int(one.data.tags["pwiser.trial"]))
        return found


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started, by their ids."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    _, left = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
    assert not left


def use_token(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    forget_token()


def forget_token() -> None:
    """Have Ray look at the environment again: it reads its token once per process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    directory = tmp_path_factory.mktemp("user")
    (directory / "modules").mkdir()
    (directory / "modules" / "mine.py").write_text(OWN_MODEL.format(slow=str(directory / "slow")))
    ports = free_ports(len(PORT_OPTIONS))
    token = secrets.token_hex(20)
    temporary = Path(tempfile.mkdtemp(prefix="pw"))  # short: Ray's sockets lie below it
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "HOME": str(temporary),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        *("ray", "start", "--head", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0"),
        *("--dashboard-host=127.0.0.1", f"--temp-dir={temporary / 'ray'}"),
        *("--object-store-memory=100000000", "--disable-usage-stats", "--block"),
        *(f"{option}={port}" for option, port in zip(PORT_OPTIONS, ports, strict=True)),
    ]
    found = Head(f"http://127.0.0.1:{ports[1]}", token, directory)
    with pytest.MonkeyPatch.context() as monkeypatch, (temporary / "log").open("wb") as log:
        for name in ("PWISER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        use_token(monkeypatch, token)
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(found, process, temporary / "log")
            yield found
        finally:
            end(process)
            shutil.rmtree(temporary, ignore_errors=True)
    forget_token()


def wait_for(head: Head, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            Client(head.address)
        except ClusterError as error:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{error}: {log.read_text()}"
            time.sleep(0.5)
        else:
            return


def pwiser(head: Head, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, which has what a test says and no token else."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "tuner", *arguments, "--address", head.address],
        env=known | {"HOME": str(head.directory)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def follow_until_ended(client: Client, job_id: str, num_trials: int) -> None:
    """Read a job's log until so many trials have ended."""
    printed = ""
    for piece in client.logs(job_id, follow=True):
        printed += piece
        if printed.count(" done, best ") >= num_trials:
            return
    pytest.fail(f"the job ended before {num_trials} trials had: {printed}")


def started(runs: list[Run]) -> dict[str, str]:
    return {one.data.tags["pwiser.trial"]: one.data.tags["pwiser.started"] for one in runs}


def test_a_job_is_watched_stopped_and_gone_on_with(
    head: Head, tiny_dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(head.address)
    job = head.write_job("story", tiny_dataset)
    slow = head.directory / "slow"
    slow.touch()  # so that there are trials left to stop
    first = client.submit(job, working_dir=head.modules)
    assert first.startswith("story-")
    follow_until_ended(client, first, 2)

    status = client.status("story")
    assert (status.job.id, status.job.name, status.job.state) == (first, "story", JobState.RUNNING)
    assert status.fault is None
    assert status.progress is not None
    (study,) = status.progress.studies
    assert (study.dataset, study.model, study.trials) == ("tiny", "mine:Mine", NUM_TRIALS)
    assert 2 <= study.done < NUM_TRIALS
    assert study.best is not None
    assert study.best > 0.5
    assert study.time_left_s is not None

    with pytest.raises(JobFileError) as caught:
        client.submit(job, working_dir=head.modules)
    assert str(caught.value) == (
        f"{job}: name: job 'story' is running already, as {first}; wait for it, "
        "stop it (pwiser stop), or choose another name"
    )
    with pytest.raises(JobFileError) as caught:
        client.resume("story", working_dir=head.modules)
    assert str(caught.value) == (
        f"job story: name: job 'story' is running already, as {first}; wait for it, "
        "stop it (pwiser stop), or choose another name"
    )

    stopped = client.stop("story")
    assert (stopped.id, stopped.state) == (first, JobState.STOPPED)
    assert stopped.ended is not None
    assert client.stop(first) == stopped
    slow.unlink()
    runs = head.runs("story")
    assert [one.info.status for one in runs["study"]] == ["KILLED"]
    assert {one.info.status for one in runs["trial"]} == {"FINISHED", "KILLED"}
    ended = [one for one in runs["trial"] if one.info.status == "FINISHED"]

    second = client.resume("story", working_dir=head.modules)
    assert second != first
    assert "".join(client.logs(second, follow=True)) == "".join(client.logs(second))
    done = client.wait(second)
    assert (done.state, done.exit_code) == (JobState.SUCCEEDED, 0), "".join(client.logs(second))
    trials = head.runs("story")["trial"]
    assert [one.data.tags["pwiser.trial"] for one in trials] == [
        str(number) for number in range(NUM_TRIALS)
    ]
    assert {one.info.status for one in trials} == {"FINISHED"}
    assert started(ended).items() <= started(trials).items()
    assert [one.data.tags.get("pwiser.winner") for one in trials].count("true") == 1
    elsewhere = f"sqlite:///{head.directory / 'elsewhere.db'}"
    status = Client(head.address, tracking=elsewhere).status("story")
    assert status.progress is None
    assert status.fault is not None
    assert status.fault.startswith(f"{head.directory / 'elsewhere.db'}: no tracking store on this")
    status = client.status("story")
    assert status.progress is not None
    assert (status.progress.done, status.progress.time_left_s) == (NUM_TRIALS, 0.0)

    assert [(one.id, one.state) for one in client.jobs()] == [
        (second, JobState.SUCCEEDED),
        (first, JobState.STOPPED),
    ]
    assert_the_clusters_code_was_sent("".join(client.logs(first)))
    assert_the_commands_say_the_same(head, client, capsys)


def assert_the_clusters_code_was_sent(log: str) -> None:
    code = log.partition("code at ")[2].partition("\n")[0]
    assert "/runtime_resources/py_modules_files/" in code, log


def assert_the_commands_say_the_same(
    head: Head, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    second, first = client.jobs()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PWISER_ADDRESS", head.address)
        monkeypatch.setenv("COLUMNS", "200")

        def printed(*arguments: str) -> str:
            monkeypatch.setattr(sys, "argv", ["pwiser", *arguments])
            assert run() == 0
            return capsys.readouterr().out

        assert json.loads(printed("status", "story", "--json")) == json.loads(
            client.status("story").model_dump_json()
        )
        assert client.statuses() == [client.status(one.id) for one in client.jobs()]
        listed = json.loads(printed("jobs", "--json"))
        assert [one["job"]["id"] for one in listed] == [second.id, first.id]
        table = printed("jobs")
        assert second.id in table
        assert f"{NUM_TRIALS}/{NUM_TRIALS}" in table
        assert f"{NUM_TRIALS}/{NUM_TRIALS}" in printed("status", first.id)
        assert printed("logs", second.id) == "".join(client.logs(second.id))
        assert printed("stop", second.id) == f"{second.id}: succeeded\n"
        assert printed("stop", first.id) == (
            f"{first.id}: stopped; pwiser resume story goes on with it\n"
        )


def test_a_driver_that_ray_lost_is_told_with_the_reason_and_resumed(
    head: Head, tiny_dataset: Dataset
) -> None:
    client = Client(head.address)
    slow = head.directory / "slow"
    slow.touch()
    job_id = client.submit(head.write_job("lost", tiny_dataset), working_dir=head.modules)
    follow_until_ended(client, job_id, 1)
    slow.unlink()
    assert client.status(job_id).job.reason is None
    supervisors = descendants(os.getpid(), "ray::JobSupervisor")
    processes = [child for one in supervisors for child in one.children(recursive=True)]
    for supervisor in supervisors:
        supervisor.kill()
    found = client.wait(job_id)
    assert (found.state, found.exit_code) == (JobState.FAILED, None)
    assert found.reason is not None
    assert found.reason.startswith("Job supervisor actor died: ")
    assert "\n" not in found.reason
    shown = pwiser(
        head, "status", job_id, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=head.token, COLUMNS="2000"
    )
    assert f"({job_id}); {found.reason}" in shown.stdout
    _, left = psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
    assert not left
    resumed = client.resume("lost", working_dir=head.modules)
    assert client.wait(resumed).state is JobState.SUCCEEDED
    assert [one.info.status for one in head.runs("lost")["trial"]] == ["FINISHED"] * NUM_TRIALS


def test_a_plan_is_made_where_the_job_would_run(head: Head, tiny_dataset: Dataset) -> None:
    job = head.write_job("planned", tiny_dataset)
    client = Client(head.address)
    plan = client.plan(job, working_dir=head.modules)
    assert (plan.job, plan.trials, plan.obstacles) == ("planned", NUM_TRIALS, ())
    (study,) = plan.studies
    assert (study.dataset, study.model) == ("tiny", "mine:Mine")
    assert plan.lanes is not None
    assert plan.lanes.lanes == 1
    assert plan.hours > 0
    assert "planned" not in [one.name for one in client.jobs()]


def test_a_plan_that_cannot_be_made_there_says_why(head: Head, tiny_dataset: Dataset) -> None:
    missing = head.directory / "missing"
    job = head.write_job("unplanned", tiny_dataset, models=["dnn"], datasets=[str(missing)])
    with pytest.raises(ClusterError) as caught:
        Client(head.address).plan(job)
    assert str(caught.value) == (
        f"{job}: {missing}: no such dataset; make one with 'pwiser data prepare' or "
        "'pwiser data synth'"
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "Authentication required: Unauthorized: Missing authentication token"),
        (
            {"RAY_AUTH_TOKEN": "not-the-token-0123456789"},
            "Authentication failed: Forbidden: Invalid authentication token",
        ),
    ],
    ids=["no token", "a wrong token"],
)
def test_a_client_without_the_token_is_refused(
    head: Head, environment: dict[str, str], reason: str
) -> None:
    ended = pwiser(head, "jobs", **environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"pwiser: --address {head.address}: the cluster refuses the token ({reason}); set "
        "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it\n"
    )


def test_token_mode_without_a_token_is_told(head: Head) -> None:
    ended = pwiser(head, "jobs", RAY_AUTH_MODE="token")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"pwiser: --address {head.address}: the cluster refuses the token (Token authentication is "
        "enabled but Ray couldn't find an authentication token. Create a token file at "
        "~/.ray/auth_token, or store the token in any file and set RAY_AUTH_TOKEN_PATH to point to "
        "it, or set the RAY_AUTH_TOKEN environment variable.); set RAY_AUTH_TOKEN, or "
        "RAY_AUTH_TOKEN_PATH to the file that holds it\n"
    )


def test_the_token_may_lie_in_a_file(head: Head, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(head.token)
    ended = pwiser(head, "logs", "unheard-of", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("pwiser: job 'unheard-of': not on the cluster")


@pytest.mark.parametrize("ask", ["status", "logs", "stop", "wait"])
def test_a_job_that_the_cluster_does_not_know_is_told(head: Head, ask: str) -> None:
    client = Client(head.address)
    known = ", ".join(sorted({one.name for one in client.jobs()})) or "no job"
    with pytest.raises(JobNotFoundError) as caught:
        list(getattr(client, ask)("unheard-of"))
    assert str(caught.value) == (
        f"job 'unheard-of': not on the cluster {head.address}; it has {known}"
    )


def test_an_unknown_job_is_not_resumed(head: Head) -> None:
    client = Client(head.address)
    with pytest.raises(JobNotFoundError) as caught:
        client.resume("unheard-of")
    assert str(caught.value) == (
        f"job 'unheard-of': the cluster {head.address} knows no submission of it; name "
        "the tracking store that holds it by --tracking or MLFLOW_TRACKING_URI"
    )
