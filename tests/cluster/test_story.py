"""The service on a cluster of real hosts, from submission to export."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from service_cluster import CPUS_PER_NODE, SEARCH, Cluster
from services import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

METRICS = ("best/ctr_auc", "best/ctcvr_auc", "best/ctr_logloss", "best/ctcvr_logloss")
LATEST_S = 120.0
"""Until what is quick must have happened, however busy the machine; the time it took is printed."""


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line of a test that passes, too."""

    def print_line(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line} (load {os.getloadavg()[0]:.1f})\n")

    return print_line


@pytest.fixture(scope="module")
def dataset(cluster: Cluster) -> str:
    """A dataset in S3; its twin lies on the client's disk."""
    rows = ("--impressions", "6000", "--seed", "0")
    uri = f"{cluster.services.storage}/data/tiny"
    cluster.done("data", "synth", "--out", uri, *rows)
    cluster.done("data", "synth", "--out", "tiny", *rows)
    return uri


@pytest.fixture(scope="module")
def story(cluster: Cluster, dataset: str) -> str:
    """The job of the whole story, submitted and followed to its end; what its driver printed."""
    job_id = cluster.done("submit", cluster.write_job("story")).strip()
    assert re.fullmatch(r"story-\d{8}T\d{6}-[0-9a-f]{4}", job_id)
    return cluster.done("logs", job_id, "-f")


def runs(cluster: Cluster, job: str, tracking: str | None = None) -> list[dict[str, Any]]:
    """A job's trials as MLflow has them, in order."""
    script = (
        "import json, sys; from mlflow import MlflowClient; "
        "client = MlflowClient(sys.argv[1]); "
        "experiment = client.get_experiment_by_name(sys.argv[2]); "
        "found = client.search_runs([experiment.experiment_id], "
        "\"tags.`pwiser.kind` = 'trial'\") if experiment else []; "
        "print(json.dumps([{'status': r.info.status, 'start': r.info.start_time, "
        "'end': r.info.end_time, **r.data.to_dictionary()} for r in found]))"
    )
    uri = tracking or cluster.services.tracking
    asked = cluster.hosts["c"].run("python", "-c", script, uri, job, cwd=cluster.laptop)
    assert asked.returncode == 0, asked.stderr
    found: list[dict[str, Any]] = json.loads(asked.stdout.splitlines()[-1])
    return sorted(found, key=lambda run: int(run["tags"]["pwiser.trial"]))


def same_results(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Check that two lists of trials are the same trials with the same metrics, within 1e-4."""
    assert [run["tags"]["pwiser.params"] for run in ours] == [
        run["tags"]["pwiser.params"] for run in others
    ]
    for run, other in zip(ours, others, strict=True):
        for name in METRICS:
            assert run["metrics"][name] == pytest.approx(other["metrics"][name], abs=1e-4)


def test_a_submitted_job_runs_to_its_winner(cluster: Cluster, story: str) -> None:
    assert "tiny/mmoe baseline complete" in story
    found = cluster.status("story")
    assert found["job"]["state"] == "succeeded"
    (study,) = found["progress"]["studies"]
    assert (study["done"], study["trials"], study["running"], study["failed"]) == (6, 6, 0, 0)
    best = json.loads(cluster.done("best", "story", "--json"))
    assert best["datasets"]["tiny"]["metrics"]["valid"]["ctr_auc"] is not None
    assert "story" in cluster.done("jobs")


def test_lanes_are_placed_on_both_workers(cluster: Cluster, story: str) -> None:
    nodes = {run["tags"]["pwiser.nodes"] for run in runs(cluster, "story")}
    assert nodes == {cluster.hosts["a"].address, cluster.hosts["b"].address}


def test_the_export_predicts_on_the_client(cluster: Cluster, story: str) -> None:
    cluster.done("export", "story", "--dataset", "tiny", "--out", "exported")
    script = (
        "import trainables, json; "
        "print(json.dumps(trainables.load('exported').configuration.model_dump(mode='json')))"
    )
    loaded = cluster.hosts["c"].run("python", "-c", script, cwd=cluster.laptop)
    best = json.loads(cluster.done("best", "story", "--json"))
    assert json.loads(loaded.stdout)["loss"] == best["datasets"]["tiny"]["config"]["loss"]


def test_one_machine_gives_the_same_trials_and_metrics(cluster: Cluster, story: str) -> None:
    job = cluster.write_job(
        "alone",
        datasets=["tiny"],
        storage="storage",
        tracking={},
        resources={"lanes": 1, "cpus_per_worker": 1},
    )
    ended = cluster.pwiser(
        *("tune", job),
        environment={"HOME": str(cluster.laptop)},  # where Ray leaves the token of its own cluster
        without=(
            *("MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"),
            *cluster.services.environment,
        ),
    )
    assert ended.returncode == 0, ended.stderr
    alone = runs(cluster, "alone", f"sqlite:///{cluster.laptop}/storage/mlflow.db")
    same_results(runs(cluster, "story"), alone)


def test_a_lane_of_two_workers_spans_both_nodes(cluster: Cluster, story: str) -> None:
    resources = {"lanes": 1, "workers_per_lane": 2, "cpus_per_worker": CPUS_PER_NODE}
    search = SEARCH | {"trials": 3}
    job = cluster.write_job("pair", resources=resources, search=search)
    cluster.done("submit", job, "--wait")
    pair = runs(cluster, "pair")
    both = f"{cluster.hosts['a'].address}, {cluster.hosts['b'].address}"
    assert {run["tags"]["pwiser.nodes"] for run in pair} == {both}
    same_results(pair, runs(cluster, "story")[:3])


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "Authentication required: Unauthorized: Missing authentication token"),
        ("x" * 40, "Authentication failed: Forbidden: Invalid authentication token"),
    ],
)
def test_ray_refuses_whoever_has_no_token(
    cluster: Cluster, dataset: str, token: str | None, reason: str
) -> None:
    job = cluster.write_job("intruder")
    for command in (("submit", job), ("jobs",), ("stop", "story"), ("logs", "story")):
        ended = cluster.pwiser(
            *command,
            environment={} if token is None else {"RAY_AUTH_TOKEN": token},
            without=() if token else ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"),
        )
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == (
            f"pwiser: --address {cluster.dashboard}: the cluster refuses the token ({reason}); set "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it\n"
        )


@pytest.mark.parametrize("command", ["best", "submit"])
def test_mlflow_refuses_whoever_has_no_password(cluster: Cluster, story: str, command: str) -> None:
    argument = "story" if command == "best" else cluster.write_job("intruder")
    ended = cluster.pwiser(command, argument, without=("MLFLOW_TRACKING_PASSWORD",))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(
        rf"pwiser: tracking\.uri {cluster.services.tracking}: refuses us \([^\n]+\); set "
        r"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\n",
        ended.stderr,
    )


def test_stop_is_quick_frees_the_cluster_and_resume_finishes(
    cluster: Cluster, dataset: str, say: Callable[[str], None]
) -> None:
    search = SEARCH | {"trials": 8}
    training = {"epochs": 12, "batch_size": 64, "evaluate_every": 1.0, "precision": "float32"}
    job = cluster.write_job("halted", search=search, training=training)
    job_id = cluster.done("submit", job).strip()
    wait_until(lambda: num_done(cluster, job_id) > 0, "a trial", 400)
    secrets_are_nowhere(cluster)
    second = cluster.pwiser("submit", job)
    assert second.returncode == 2
    assert f"job 'halted' is running already, as {job_id}" in second.stderr
    asked = time.time()
    assert cluster.done("stop", "halted") == (
        f"{job_id}: stopped; pwiser resume halted goes on with it\n"
    )
    stopped = datetime.fromisoformat(cluster.status(job_id)["job"]["ended"]).timestamp()
    assert stopped - asked < LATEST_S
    wait_until(lambda: is_idle(cluster), "a free cluster", LATEST_S)
    say(f"stop ended the job in {stopped - asked:.1f} s, free {time.time() - asked:.1f} s after it")
    before = runs(cluster, "halted")
    assert {run["status"] for run in before} == {"FINISHED", "KILLED"}
    cluster.done("resume", "halted", "--wait", timeout=600)
    after = runs(cluster, "halted")
    assert [run["tags"]["pwiser.trial"] for run in after] == [str(number) for number in range(8)]
    assert {run["status"] for run in after} == {"FINISHED"}
    for run, again in zip(before, after, strict=False):
        assert again["tags"]["pwiser.params"] == run["tags"]["pwiser.params"]
        if run["status"] == "FINISHED":
            metrics = again["metrics"]
            kept = {name: value for name, value in metrics.items() if "test/" not in name}
            assert kept == run["metrics"]


def test_two_jobs_share_the_cluster(cluster: Cluster, dataset: str) -> None:
    resources = {"lanes": 1, "cpus_per_worker": CPUS_PER_NODE}
    jobs = [cluster.write_job(name, resources=resources) for name in ("left", "right")]
    ids = [cluster.done("submit", job).strip() for job in jobs]
    for job_id in ids:
        log = cluster.done("logs", job_id, "-f", timeout=600)
        found = cluster.status(job_id)["job"]
        assert found["state"] == "succeeded", f"{found}\n{log}"
    left, right = runs(cluster, "left"), runs(cluster, "right")
    for trials in (left, right):
        assert [run["status"] for run in trials] == ["FINISHED"] * 6
        assert len({run["tags"]["pwiser.nodes"] for run in trials}) == 1
    assert left[0]["tags"]["pwiser.nodes"] != right[0]["tags"]["pwiser.nodes"]
    assert left[0]["start"] < right[-1]["end"]
    assert right[0]["start"] < left[-1]["end"]
    same_results(left, right)


def test_a_node_without_storage_is_named_within_a_minute(
    cluster: Cluster, dataset: str, say: Callable[[str], None]
) -> None:
    host = cluster.hosts["d"]
    host.lose_route_to(cluster.services.s3_address)
    cluster.start_worker("d")
    wait_until(lambda: host.address in cluster.resources()["nodes"], "the fourth node")
    ended = cluster.pwiser("submit", cluster.write_job("astray"), "--wait")
    assert ended.returncode == 2
    found = cluster.status("astray")["job"]
    took = datetime.fromisoformat(found["ended"]) - datetime.fromisoformat(found["submitted"])
    assert took.total_seconds() < LATEST_S
    say(f"the node was named in {took.total_seconds():.1f} s")
    last_line = cluster.done("logs", "astray").splitlines()[-1]
    assert re.match(
        rf"pwiser: cluster: node {host.address}: storage {cluster.services.storage}/jobs ",
        last_line,
    )
    assert cluster.hosts["a"].address not in last_line
    host.end_processes()
    wait_until(lambda: host.address not in cluster.resources()["nodes"], "its end", 120)


def test_a_secret_is_found_nowhere(cluster: Cluster, story: str) -> None:
    secrets_are_nowhere(cluster)


def num_done(cluster: Cluster, job: str) -> int:
    progress = cluster.status(job)["progress"]
    return sum(study["done"] for study in progress["studies"]) if progress else 0


def is_idle(cluster: Cluster) -> bool:
    found = cluster.resources()
    return bool(found["free"]["CPU"] == found["total"]["CPU"] and not found["groups"])


def secrets_are_nowhere(cluster: Cluster) -> None:
    """Look for secrets where people look: logs, job descriptions, records, the process list."""
    aws = cluster.services.environment["AWS_SECRET_ACCESS_KEY"]
    secrets = {"Ray's token": cluster.token, "MLflow's password": cluster.password, "AWS's": aws}
    places = {
        "processes": subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout
    }
    logs = [path for path in cluster.directory.glob("*.log") if path.is_file()]
    for host in cluster.hosts.values():
        logs += [path for path in host.own_directory.glob("session_*/logs/**/*") if path.is_file()]
    assert len(logs) > 20
    places |= {str(path): path.read_bytes() for path in logs}
    listing = (
        "from ray.job_submission import JobSubmissionClient as C; import sys; "
        "print([vars(job) for job in C(sys.argv[1]).list_jobs()])"
    )
    described = cluster.hosts["c"].run("python", "-c", listing, cluster.dashboard)
    assert "halted" in described.stdout or "story" in described.stdout, described.stderr
    places["job descriptions"] = described.stdout.encode()
    for job in {found["job"]["name"] for found in json.loads(cluster.done("jobs", "--json"))}:
        places[f"records of {job}"] = json.dumps(runs(cluster, job)).encode()
    found = [
        f"{name} in {place}: {line.decode(errors='replace').replace(secret, '***')[:2000]}"
        for place, content in places.items()
        for name, secret in secrets.items()
        for line in content.splitlines()
        if secret.encode() in line
    ]
    assert found == []
