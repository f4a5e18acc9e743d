import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from datasets import Dataset
from tuner import __version__
from tuner.cli import run
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Report
from tuner.outbox import Outbox
from tuner.records import RecordWriter
from tuner.search import StudySearch
from tuner.study import Study
from tuner.submission import Submission
from tuner.tracking import Tracker, connect

COMMANDS = (
    ("tune",),
    ("best",),
    ("export",),
    ("report",),
    ("predict",),
    ("register",),
    ("ui",),
    ("schema",),
    ("submit",),
    ("resume",),
    ("jobs",),
    ("status",),
    ("logs",),
    ("stop",),
    ("plan",),
    ("data", "synth"),
    ("data", "stats"),
    ("data", "prepare", "table"),
    ("data", "prepare", "aliexpress"),
)


class Ending(NamedTuple):
    code: int
    out: str
    err: str


Pwiser = Callable[..., Ending]


@pytest.fixture
def pwiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pwiser:
    """Run a command in an empty directory; give its exit code and what it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Ending:
        monkeypatch.setattr(sys, "argv", ["pwiser", *map(str, arguments)])
        code = run()
        return Ending(code, *capsys.readouterr())

    return call


def refused(ending: Ending) -> str:
    """Check that a fault of the user's was told on one line; give the line."""
    assert ending.code == 2
    assert ending.out == ""
    assert re.fullmatch(r"pwiser: [^\n]+\n", ending.err), ending.err
    return ending.err.removeprefix("pwiser: ").rstrip("\n")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> str:
    """A tracking store with a finished job whose checkpoints are gone."""
    directory = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    client = connect(uri)
    job = Job.model_validate(
        {"name": "demo", "datasets": [tiny_dataset.uri], "search": {"trials": 1}}
    )
    experiment = client.create_experiment(
        "demo", artifact_location=str(directory / "artifacts"), tags={"pwiser.job": "demo"}
    )
    writer = RecordWriter(client, experiment, Outbox(directory / "outbox.db"))
    tracker = Tracker(writer, job, "/storage/demo")
    study = Study(dataset="tiny", dataset_uri=tiny_dataset.uri, model="mmoe")
    study_search = StudySearch(study, job)
    tracker.start_study(study_search, tiny_dataset, "", num_lanes=1)
    search = JobSearch([study_search], [tracker])
    trial = search.next_trial()
    assert trial is not None
    metrics = {"ctr_auc": 0.7, "ctcvr_auc": 0.8}
    search.ended(trial, Report(index=1, last=True, step=1, epoch=1, metrics=metrics))
    trial.test_metrics = dict(metrics)
    tracker.log_test(trial)
    tracker.log_winner(trial, trial)
    tracker.close()
    return uri


def test_the_version_is_shown(pwiser: Pwiser) -> None:
    assert pwiser("--version") == (0, f"pwiser {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(pwiser: Pwiser, command: tuple[str, ...]) -> None:
    for option in ("--help", "-h"):
        ending = pwiser(*command, option)
        assert (ending.code, ending.err) == (0, "")
        assert f"Example: pwiser {' '.join(command)}" in ending.out


def test_help_names_every_command(pwiser: Pwiser) -> None:
    ending = pwiser("--help")
    assert ending.code == 0
    for command, *_ in COMMANDS:
        assert f" {command} " in ending.out
    assert "Example: pwiser tune" in ending.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bost",), "No such command 'bost'"),
        (("best",), "Missing argument 'JOB_NAME'"),
        (("best", "demo", "--jsn"), "No such option: --jsn"),
        (("ui", "--port", "0"), "Invalid value for '--port': Input should be greater"),
        (("export", "demo"), "Missing option '--dataset'"),
    ],
)
def test_wrong_usage_is_told_with_exit_code_2(
    pwiser: Pwiser, arguments: tuple[str, ...], message: str
) -> None:
    ending = pwiser(*arguments)
    assert ending.code == 2
    assert message in ending.err
    assert "Traceback" not in ending.err


def test_a_place_that_cannot_be_written_is_told_on_one_line(pwiser: Pwiser) -> None:
    ending = pwiser("data", "synth", "--out", "/dev/null/rows", "--impressions", "1000")
    assert "/dev/null" in refused(ending)


def test_a_faulty_job_file_is_told_on_one_line(pwiser: Pwiser, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    assert refused(pwiser("tune", job)) == (
        f"{job}: cannot be read (No such file or directory); name a job file"
    )
    job.write_text("name: a\ndatasets: [d]\nsearch: {sampler: cmaes}\n")
    assert refused(pwiser("tune", job)) == (
        f"{job}: search.sampler: must be one of 'tpe', 'random', 'grid' or 'gp', got 'cmaes'"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "export demo --dataset tiny --out {uri}",
        "report demo --out {uri}",
        "predict {uri} --input rows.csv --out scores.parquet",
        "tune {uri}",
        "submit {uri} --address http://head:8265",
        "plan {uri}",
        "plan job.yaml --working-dir {uri}",
        "data prepare table --input rows.csv --schema {uri} --out data",
        "data prepare aliccp --input {uri} --out data",
        "data prepare aliexpress --raw --country nl --input {uri} --out data",
    ],
)
def test_a_uri_where_a_local_path_is_needed_is_refused(
    pwiser: Pwiser, tmp_path: Path, arguments: str
) -> None:
    ending = pwiser(*arguments.format(uri="s3://bucket/place").split())
    assert refused(ending) == (
        "s3://bucket/place: is a URI, where a path on this machine is needed; name one, and copy "
        "from or to the URI with its storage's own tools"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset_is_told_before_anything_starts(pwiser: Pwiser, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: a\ndatasets: [missing]\n")
    assert refused(pwiser("tune", "job.yaml")) == (
        f"{tmp_path / 'missing'}: no such dataset; "
        "make one with 'pwiser data prepare' or 'pwiser data synth'"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


def test_best_prints_the_winner(pwiser: Pwiser, store: str) -> None:
    ending = pwiser("best", "demo", "--tracking", store)
    assert (ending.code, ending.err) == (0, "")
    assert "tiny: mmoe, baseline (BCE) against winner (alpha 0, m1 0.3, m2 0.1)" in ending.out
    assert "tiny: checkpoint /storage/demo/tiny/mmoe/trial-0000\n" in ending.out


def test_best_prints_json(pwiser: Pwiser, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    ending = pwiser("best", "demo", "--json")
    assert (ending.code, ending.err) == (0, "")
    content = json.loads(ending.out)
    assert list(content) == ["job", "datasets"]
    winner = content["datasets"]["tiny"]
    keys = ["model", "config", "metrics", "baseline", "checkpoint", "run_id", "evidence"]
    assert list(winner) == keys
    names = ["ctr_auc", "ctr_logloss", "ctcvr_auc", "ctcvr_logloss", "cvr_auc"]
    for metrics in (winner["metrics"], winner["baseline"]["metrics"]):
        assert {split: list(values) for split, values in metrics.items()} == {
            "valid": names,
            "test": names,
        }
    assert winner["metrics"]["test"]["ctr_auc"] == 0.7
    assert winner["metrics"]["test"]["cvr_auc"] is None


@pytest.mark.parametrize("command", [("best", "demo"), ("ui",), ("export", "demo")], ids=str)
def test_reading_without_a_store_is_told(
    pwiser: Pwiser, tmp_path: Path, command: tuple[str, ...]
) -> None:
    options = ("--dataset", "tiny", "--out", "out") if command[0] == "export" else ()
    assert refused(pwiser(*command, *options)) == (
        f"{tmp_path / 'pwiser' / 'mlflow.db'}: no tracking store on this machine; pwiser tune "
        "makes one here, that of a job elsewhere is named by --tracking or MLFLOW_TRACKING_URI"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_a_message_quotes_stays_on_its_line(pwiser: Pwiser, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text('name: us\n"a\\n\\e[31mb\\u2028": 1\ndatasets: [us]\n')
    line = refused(pwiser("tune", "job.yaml"))
    assert r"a\n\x1b[31mb\u2028: unknown key; the known ones are" in line


def test_an_unknown_job_or_dataset_is_told(pwiser: Pwiser, store: str) -> None:
    assert refused(pwiser("best", "damo", "--tracking", store)) == (
        "job 'damo': not in the tracking store; it holds demo"
    )
    export = ("export", "demo", "--out", "out", "--tracking", store)
    assert refused(pwiser(*export, "--dataset", "us")) == (
        "--dataset us: no such dataset in job 'demo'; it has tiny"
    )
    assert refused(pwiser(*export, "--dataset", "tiny")) == (
        "storage: /storage/demo/tiny/mmoe/trial-0000 is not there; was it moved or deleted?"
    )
    assert not Path("out").exists()


def test_what_a_store_cannot_do_is_told_on_one_line(
    pwiser: Pwiser, store: str, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.db"
    shutil.copy(store.removeprefix("sqlite:///"), damaged)
    with sqlite3.connect(damaged) as database:
        database.execute("DROP TABLE latest_metrics")
    ending = pwiser("best", "demo", "--tracking", f"sqlite:///{damaged}")
    assert ending.code == 2
    line = ending.err.splitlines()[-1].removeprefix("pwiser: ")  # below what MLflow has logged
    assert line.startswith("tracking: the store does not do it (")
    assert "latest_metrics" in line
    assert line.endswith("); check that it is up, and your permissions")


def test_the_ui_of_a_server_is_the_servers_own(pwiser: Pwiser) -> None:
    ending = pwiser("ui", "--tracking", "http://mlflow:5000")
    assert ending == (0, "the store is a server with a UI of its own: http://mlflow:5000\n", "")


def test_the_ui_gets_its_store_where_no_process_list_shows_it(
    pwiser: Pwiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    uri = "postgresql://user:secret@db/mlflow"
    ending = pwiser("ui", "--tracking", uri)
    assert "secret" not in ending.out + " ".join(commands[0])
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == uri


def test_a_ui_that_cannot_start_has_failed(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database" * 100)
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "ui", "--tracking", "sqlite:///notes.db"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "file is not a database" in done.stderr


@pytest.mark.parametrize(
    "command",
    [("submit", "job.yaml"), ("resume", "a"), ("jobs",), ("status", "a"), ("logs", "a")],
    ids=" ".join,
)
def test_a_command_that_needs_a_cluster_and_has_none_is_told(
    pwiser: Pwiser, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    for name in ("PWISER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert refused(pwiser(*command)) == (
        "--address: no cluster is named; give the URL of its Ray dashboard, such as "
        "http://HEAD:8265, here or in PWISER_ADDRESS"
    )


def test_driving_outside_of_a_submission_is_told(
    pwiser: Pwiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert refused(pwiser("drive")) == ("drive: this process is no submission's; use pwiser submit")
    assert " drive " not in pwiser("--help").out


def test_a_submission_of_another_version_is_refused(
    pwiser: Pwiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = Submission(
        job="us", job_file="name: us\n", storage="/storage", code="image", version="0.0.1"
    )
    config = json.dumps({"metadata": submission.metadata()})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    assert refused(pwiser("drive")) == (
        f"cluster: its image has pwiser-tuner {__version__}, 'us' was submitted by 0.0.1; install "
        "the same version, or submit with --code ship"
    )


def test_the_schema_of_job_files_is_json(pwiser: Pwiser) -> None:
    ending = pwiser("schema")
    assert json.loads(ending.out) == Job.model_json_schema()


def test_a_foreign_datasets_package_is_told(tmp_path: Path) -> None:
    foreign = tmp_path / "datasets"
    foreign.mkdir()
    (foreign / "__init__.py").write_text('"""Another library, by another name: 🤗."""\n')
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "--version"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"pwiser: the package 'datasets' on the path is not pwiser-tuner's ({foreign}); the "
        "Hugging Face library of that name cannot share an environment with it: install ours "
        "into its own\n"
    )


def test_a_foreign_datasets_module_is_told(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("rows = []\n")
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "--version"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pwiser: the package 'datasets' on the path is not pwiser-tuner")


def test_the_installed_command_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"pwiser {__version__}\n"
