"""SIGKILL of every part of a running job, at random moments: nothing lost, nothing run twice.

Each round runs a job, kills one process of it soon after a trial has ended and another each time
that three more have, gives the same command again until the job is done, and compares with the
undisturbed job: the same trials, each once, with the same parameters, states and metrics; no run
left open, no process, no training state. `CHAOS_KILLS` says how often each victim is killed, at
least: every round of a victim kills it as often as the others.

Two more are killed that are not the job's own: a node of its cluster, with the lane on it, which is
replaced, and the MLflow server, which comes back after `AWAY_S`, once in a round.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from processes import descendants
from ray.cluster_utils import Cluster

from datasets import synthesize

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))
KILLS_PER_ROUND = 5
TIMEOUT_S = 300
AWAY_S = 30.0
DONE = re.compile(r"(\d+)/\d+ done")
SLOW = """
import time
from torch import nn
from trainables.models import Inputs

class Slow(nn.Module):
    num_heads = 2

    def __init__(self, inputs: Inputs, *, step_s: float = 0.06) -> None:
        super().__init__()
        self.step_s = step_s
        self.linear = nn.Linear(inputs.num_numericals, 2)

    def forward(self, ids, numericals):
        if self.training and ids.device.type != "meta":
            time.sleep(self.step_s)
        return self.linear(numericals)
"""
VICTIMS = {
    "worker": "ray::RayTrainWorker",
    "worker-of-two": "ray::RayTrainWorker",
    "controller": "ray::LaneController",
    "tune-actor": "ray::ResourceTrainable",
    "queue": "ray::TrialQueue",
    "driver": "",
    "node": "",
    "mlflow": "",
}
TRIALS_PER_KILL = {"node": 12}
"""Trials of a job, for each kill: 4 where none are named. A lane needs some to be back."""
GOES_ON = {"queue": "goes on with it", "mlflow": "the same command delivers them"}
"""What a job says that ends early, by its victim: MLflow may be away for longer than it waits."""

ALWAYS = ("controller", "queue")
"""Those that `make test` kills too; the others are a part of `make chaos` alone."""


@dataclass(frozen=True)
class Place:
    """Where jobs run; they differ by their names alone.

    Attributes:
        started: all commands.
        killed: those whose driver was killed, from whose end Ray's agents live on for a minute.
    """

    directory: Path
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)

    def tracking(self, *, served: bool = False) -> str:
        if served:
            return f"http://127.0.0.1:{(self.directory / 'port').read_text()}"
        return f"sqlite:///{self.directory / 'mlflow.db'}"

    def write_job(self, name: str, *, trials: int, workers: int = 1, served: bool = False) -> Path:
        # The baseline and the job's own alpha, 0.3, come first.
        alphas = [round(0.001 * number, 3) for number in range(1, trials - 1)]
        job = {
            "name": name,
            "datasets": [str(self.directory / "tiny")],
            "models": ["slow:Slow"],
            "search": {
                "sampler": "grid",
                "pruner": "none",
                "trials": trials,
                "replicates": 0,
                "space": {"loss.alpha": {"values": alphas}},
            },
            "training": {"epochs": 2, "batch_size": 256, "evaluate_every": 0.25},
            "resources": {
                "lanes": 2 // workers,
                "workers_per_lane": workers,
                "cpus_per_worker": 1,
            },
            "storage": str(self.directory / "storage"),
            "tracking": {"uri": self.tracking(served=served)},
        }
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    def tune(self, job: Path, **environment: str) -> "subprocess.Popen[bytes]":
        paths = [str(self.directory), *filter(None, sys.path)]
        with self.log(job).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tuner", "tune", str(job)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
            )
        self.started.append(process)
        return process

    def log(self, job: Path) -> Path:
        """What the job has said, since the command was last given."""
        return job.with_suffix(".log")

    def runs(self, job: str) -> list[Run]:
        client = MlflowClient(self.tracking())
        experiment = client.get_experiment_by_name(job)
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    def trials(self, job: str) -> list[Run]:
        found = [run for run in self.runs(job) if run.data.tags["pwiser.kind"] == "trial"]
        return sorted(found, key=lambda run: int(run.data.tags["pwiser.trial"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("chaos")
    synthesize(out=directory / "tiny", impressions=4_000, seed=0)
    (directory / "slow.py").write_text(SLOW)
    found = Place(directory)
    yield found
    for process in found.started:
        if process.poll() is None:  # a test has failed
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    no_process_is_left(found.killed)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Callable[[int, int], list[Run]]:
    """The trials of a job that nobody disturbs, by their number and the workers of a lane."""

    @cache
    def found(trials: int, workers: int) -> list[Run]:
        name = f"undisturbed-{trials}-{workers}"
        job = place.write_job(name, trials=trials, workers=workers)
        assert place.tune(job).wait(timeout=TIMEOUT_S) == 0, place.log(job).read_text()
        return place.trials(name)

    return found


class Server:
    """An MLflow server on the store that the other jobs use as a file."""

    def __init__(self, place: Place) -> None:
        self.place = place
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        (place.directory / "port").write_text(str(self.port))
        self.start()

    def start(self) -> None:
        store = ("--backend-store-uri", self.place.tracking())
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=self.place.directory,
        )
        deadline = time.monotonic() + 120
        while not self.answers():
            assert time.monotonic() < deadline, "the MLflow server does not start"
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[Callable[[], Server]]:
    """Give the server, from the first call on; it is killed in the end."""

    @cache
    def started() -> Server:
        return Server(place)

    yield started
    if started.cache_info().currsize:
        started().kill()


@pytest.fixture(scope="module")
def cluster(place: Place) -> Iterator[Callable[[], Cluster]]:
    """Give a cluster of two nodes, from the first call on, with room for a lane on each.

    It is stopped in the end.
    """

    @cache
    def started() -> Cluster:
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes.add_node(num_cpus=1)
        return nodes

    paths = [str(place.directory), *filter(None, sys.path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield started
    if started.cache_info().currsize:
        started().shutdown()


def facts(run: Run) -> tuple[dict[str, str], str, dict[str, float]]:
    """What must not depend on what was killed: all but the clock and the final test."""
    metrics = {
        name: value
        for name, value in run.data.metrics.items()
        if not name.startswith(("time/", "test/"))
    }
    return run.data.params, run.data.tags["pwiser.state"], metrics


def kill(process: "subprocess.Popen[bytes]", title: str) -> bool:
    """Kill one process of a job, the driver where there is no title; False if there is none."""
    if not title:
        process.kill()
        return True
    found = descendants(process.pid, title)
    if not found:
        return False
    os.kill(random.choice(found).pid, signal.SIGKILL)
    return True


def kill_node(nodes: Cluster) -> bool:
    """Kill the node beside the head and add another; False if there is no lane on it."""
    (node,) = nodes.worker_nodes
    (raylet,) = node.all_processes["raylet"]
    if not descendants(raylet.process.pid, VICTIMS["worker"]):
        return False
    nodes.remove_node(node, allow_graceful=False)
    nodes.add_node(num_cpus=1)
    return True


def disturb(
    process: "subprocess.Popen[bytes]",
    log: Path,
    kills: deque[float],
    kill_one: Callable[["subprocess.Popen[bytes]"], bool],
) -> None:
    """Kill something so many seconds after a trial has ended, the next after three more, and so on.

    By then those have ended that the first one hit: a trial may be hit by chance, but not at the
    same place twice (where the command is given again, all in hand are hit by every kill).
    """
    deadline = time.monotonic() + TIMEOUT_S
    due = 1
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        if kills and num_ended(log) >= due:
            time.sleep(kills.popleft())
            until = time.monotonic() + 60
            while not kill_one(process):
                assert time.monotonic() < until, "nothing to kill"
                time.sleep(0.05)
            due = num_ended(log) + 3
        time.sleep(0.05)


def num_ended(log: Path) -> int:
    return max(map(int, DONE.findall(log.read_text())), default=0)


def no_process_is_left(sessions: Sequence[int]) -> None:
    deadline = time.monotonic() + 120  # Ray's agents see after a minute that their raylet died
    while left := [p for p in psutil.process_iter() if is_of(p, sessions)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def is_of(process: psutil.Process, sessions: Sequence[int]) -> bool:
    try:
        return os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def kills_per_round(victim: str) -> int:
    return 1 if victim == "mlflow" else min(KILLS, KILLS_PER_ROUND)


def marks(victim: str, number: int) -> list[pytest.MarkDecorator]:
    return [] if victim in ALWAYS and number == 0 else [pytest.mark.chaos]


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param(victim, number, marks=marks(victim, number), id=f"{victim}-{number}")
        for victim in VICTIMS
        for number in range(-(-KILLS // kills_per_round(victim)))
    ],
)
def test_nothing_is_lost_and_nothing_runs_twice(
    place: Place,
    undisturbed: Callable[[int, int], list[Run]],
    server: Callable[[], Server],
    cluster: Callable[[], Cluster],
    victim: str,
    number: int,
) -> None:
    moments = random.Random(f"{victim}-{number}")
    num_kills = kills_per_round(victim)
    num_trials = TRIALS_PER_KILL.get(victim, 4) * num_kills + 4
    kills = deque(moments.uniform(0, 1.5) for _ in range(num_kills))
    name = f"{victim}-{number}"
    workers = 2 if victim == "worker-of-two" else 1
    expected_trials = undisturbed(num_trials, workers)
    mlflow = server() if victim == "mlflow" else None
    job = place.write_job(name, trials=num_trials, workers=workers, served=mlflow is not None)
    nodes = cluster() if victim == "node" else None
    environment = {} if nodes is None else {"RAY_ADDRESS": nodes.address}

    def kill_one(process: "subprocess.Popen[bytes]") -> bool:
        if nodes is not None:
            return kill_node(nodes)
        if mlflow is not None:
            mlflow.kill()
            time.sleep(AWAY_S)
            mlflow.start()
            return True
        return kill(process, VICTIMS[victim])

    sessions = []
    code = None
    while code != 0:
        process = place.tune(job, **environment)
        sessions.append(process.pid)
        disturb(process, place.log(job), kills, kill_one)
        said, code = place.log(job).read_text(), process.returncode
        assert "Traceback" not in said, said
        if code != 0:
            assert len(sessions) <= num_kills, said
            assert victim == "driver" or (code == 1 and GOES_ON.get(victim, "-") in said), said
    assert not kills, said
    if victim == "driver":
        place.killed.extend(sessions)  # looked for in the end, once for all
    else:
        no_process_is_left(sessions)
    trials = place.trials(name)
    assert [run.data.tags["pwiser.trial"] for run in trials] == [
        str(number) for number in range(num_trials)
    ]
    assert {run.info.status for run in place.runs(name)} <= {"FINISHED", "FAILED"}
    assert [facts(run) for run in trials] == [facts(run) for run in expected_trials]
    assert list(place.directory.glob(f"storage/{name}/*/*/*/*-state")) == []
