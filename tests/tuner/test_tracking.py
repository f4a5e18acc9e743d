import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

import tuner.records
from datasets import Dataset
from tuner.errors import TrackingError, TrackingRefusedError
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report, Seconds
from tuner.outbox import Outbox
from tuner.records import RecordWriter
from tuner.search import StudySearch
from tuner.study import Study, Trial
from tuner.tracking import Tracker, connect
from tuner.tracking_store import hide_password

JOB_FILE = "name: job\ndatasets: [tiny]\n"
METRICS = {"ctr_auc": 0.7, "ctr_logloss": 0.3, "ctcvr_auc": 0.8, "ctcvr_logloss": 0.1}
STORAGE = "/storage/job/1"


class LoggedJob:
    """A job whose trials end as a test says, and what its tracking store holds of it."""

    def __init__(
        self, client: MlflowClient, directory: Path, dataset: Dataset, **search: Any
    ) -> None:
        self.client = client
        settings = {"sampler": "random", "pruner": "none", "trials": 4} | search
        content = {"name": "job", "datasets": [dataset.uri], "search": settings}
        self.job = Job.model_validate(content)
        self.experiment_id = client.create_experiment(
            str(directory), artifact_location=str(directory / "artifacts")
        )
        self.outbox = directory / "outbox.db"
        self.tracker = self.open_tracker()
        study = Study(dataset=dataset.name, dataset_uri=dataset.uri, model="mmoe")
        study_search = StudySearch(study, self.job)
        self.tracker.start_study(study_search, dataset, JOB_FILE, num_lanes=2)
        self.search = JobSearch([study_search], [self.tracker])

    def open_tracker(self) -> Tracker:
        writer = RecordWriter(self.client, self.experiment_id, Outbox(self.outbox))
        return Tracker(writer, self.job, STORAGE)

    def next_trial(self) -> Trial:
        trial = self.search.next_trial()
        assert trial is not None
        return trial

    def run_trial(self, *values: float) -> Trial:
        trial = self.next_trial()
        for index, value in enumerate(values, start=1):
            if index < len(values):
                self.search.evaluated(trial, report(index, value))
            else:
                self.search.ended(trial, report(index, value, last=True))
        return trial

    def runs(self, kind: str) -> list[Run]:
        found = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.`pwiser.kind` = '{kind}'"
        )
        return sorted(found, key=lambda run: int(run.data.tags.get("pwiser.trial", 0)))

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        logged = self.client.get_metric_history(run.info.run_id, metric)
        return [(point.step, point.value) for point in logged]


def report(index: int, value: float, *, last: bool = False) -> Report:
    return Report(
        index=index,
        last=last,
        step=10 * index,
        epoch=index / 2,
        metrics=METRICS | {"ctr_auc": value, "cvr_auc": None},
        train={"loss": 0.4, "bce": 0.3, "pwiser": 0.1},
        seconds=Seconds(setup=1.0, training=2.0 * index, evaluation=0.5, lane=2.0 * index + 2.0),
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """A SQLite store; every test has an experiment of its own in it."""
    return connect(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture
def logged(client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset) -> LoggedJob:
    return LoggedJob(client, tmp_path, tiny_dataset)


def test_there_is_one_run_per_trial_below_its_studys(logged: LoggedJob) -> None:
    for value in (0.5, 0.6):
        logged.run_trial(value)
    logged.tracker.close()
    (study,) = logged.runs("study")
    trials = logged.runs("trial")
    assert [run.data.tags["pwiser.trial"] for run in trials] == ["0", "1"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {study.info.run_id}
    assert study.info.run_name == "tiny/mmoe"
    assert trials[0].info.run_name == "tiny/mmoe baseline"
    assert trials[1].info.run_name == "tiny/mmoe alpha=0.3 m1=0.3 m2=0.1"


def test_a_run_says_what_its_trial_is(logged: LoggedJob, tiny_dataset: Dataset) -> None:
    baseline = logged.run_trial(0.5)
    logged.run_trial(0.6)
    logged.tracker.close()
    first, second = logged.runs("trial")
    expected = {
        "pwiser.job": "job",
        "pwiser.study": "tiny/mmoe",
        "pwiser.dataset": "tiny",
        "pwiser.dataset_digest": tiny_dataset.digest,
        "pwiser.model": "mmoe",
        "pwiser.kind": "trial",
        "pwiser.trial": "0",
        "pwiser.baseline": "true",
        "pwiser.state": "complete",
    }
    assert expected.items() <= first.data.tags.items()
    assert json.loads(first.data.tags["pwiser.configuration"]) == (
        baseline.configuration.model_dump(mode="json")
    )
    assert second.data.tags["pwiser.baseline"] == "false"
    assert first.data.params == {"alpha": "0.0", "m1": "0.3", "m2": "0.1"}
    assert second.data.params == {"alpha": "0.3", "m1": "0.3", "m2": "0.1"}


def test_further_dimensions_are_parameters_by_their_path(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    space = {"model.expert_units": {"values": [[8], [512, 256, 128]]}}
    logged = LoggedJob(client, tmp_path, tiny_dataset, space=space)
    logged.run_trial(0.5)
    logged.tracker.close()
    (run,) = logged.runs("trial")
    assert run.data.params == {
        "model.expert_units": "[512, 256, 128]",
        "alpha": "0.0",
        "m1": "0.3",
        "m2": "0.1",
    }


def test_a_run_names_its_dataset_as_input(logged: LoggedJob, tiny_dataset: Dataset) -> None:
    logged.run_trial(0.5)
    logged.tracker.close()
    for run in (*logged.runs("study"), *logged.runs("trial")):
        (found,) = run.inputs.dataset_inputs
        assert found.dataset.name == "tiny"
        assert tiny_dataset.digest.startswith(found.dataset.digest)
        assert len(found.dataset.digest) == 36
        assert json.loads(found.dataset.source) == {"uri": tiny_dataset.uri}
        assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_every_evaluation_is_logged_at_its_step_and_the_best_beside(logged: LoggedJob) -> None:
    logged.run_trial(0.5, 0.7, 0.6)
    logged.tracker.close()
    (run,) = logged.runs("trial")
    assert logged.history(run, "valid/ctr_auc") == [(10, 0.5), (20, 0.7), (30, 0.6)]
    assert logged.history(run, "valid/objective") == [(10, 0.65), (20, 0.75), (30, 0.7)]
    assert logged.history(run, "train/pwiser") == [(10, 0.1), (20, 0.1), (30, 0.1)]
    assert run.data.metrics["best/ctr_auc"] == 0.7
    assert run.data.metrics["best/objective"] == 0.75
    assert {name for name in run.data.metrics if name.endswith("cvr_auc")} == {
        "valid/ctcvr_auc",
        "best/ctcvr_auc",  # and no cvr_auc: what is undefined is not logged
    }


def test_a_trials_time_is_that_of_its_last_evaluation_and_a_studys_the_sum(
    logged: LoggedJob,
) -> None:
    for values in ((0.5, 0.6), (0.5, 0.6), (0.5,), (0.5,)):
        logged.run_trial(*values)
    logged.tracker.close()
    (study,) = logged.runs("study")
    trial = logged.runs("trial")[0]
    seconds = {name: trial.data.metrics[f"time/{name}_s"] for name in ("setup", "training")}
    assert seconds == {"setup": 1.0, "training": 4.0}
    assert trial.data.metrics["time/evaluation_s"] == 0.5
    assert trial.data.metrics["time/overhead_s"] == 0.5
    assert study.data.metrics == {
        "time/setup_s": 4.0,
        "time/training_s": 12.0,
        "time/evaluation_s": 2.0,
        "time/overhead_s": 2.0,
        "time/overhead_share": 0.1,
    }


def test_statuses_say_how_trials_ended(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    logged = LoggedJob(client, tmp_path, tiny_dataset, pruner="median", trials=9)
    search = logged.search
    for _ in range(6):
        trial = logged.next_trial()
        assert not search.evaluated(trial, report(1, 0.7))
        search.ended(trial, report(2, 0.7, last=True))
    assert search.evaluated(logged.next_trial(), report(1, 0.1))
    search.ended(logged.next_trial(), Ended(kind="failed", reason="x" * 6000))
    logged.next_trial()
    search.close()
    logged.tracker.close()
    *_, complete, pruned, failed, stopped = logged.runs("trial")
    ends = [
        (run.info.status, run.data.tags["pwiser.state"])
        for run in (complete, pruned, failed, stopped)
    ]
    assert ends == [
        ("FINISHED", "complete"),
        ("KILLED", "pruned"),
        ("FAILED", "failed"),
        ("KILLED", "stopped"),
    ]
    assert failed.data.tags["pwiser.failure"] == "x" * 5000
    assert all(run.info.end_time is not None for run in logged.runs("trial"))
    assert logged.runs("study")[0].info.status == "KILLED"


def test_a_running_trials_run_is_running(logged: LoggedJob) -> None:
    logged.run_trial(0.5)
    logged.search.evaluated(logged.next_trial(), report(1, 0.5))
    logged.tracker.close()
    assert [run.info.status for run in logged.runs("trial")] == ["FINISHED", "RUNNING"]
    assert logged.runs("study")[0].info.status == "RUNNING"


def test_a_study_keeps_its_job_file_and_says_which_checkpoints_are_kept(
    logged: LoggedJob, tmp_path: Path
) -> None:
    for value in (0.5, 0.9, 0.7, 0.6):
        logged.run_trial(value)
    logged.tracker.close()
    (study,) = logged.runs("study")
    assert study.info.status == "FINISHED"
    (kept,) = (tmp_path / "artifacts").rglob("job.yaml")
    assert kept.read_text() == JOB_FILE
    assert study.info.run_id in str(kept)
    checkpoints = [run.data.tags.get("pwiser.checkpoint") for run in logged.runs("trial")]
    place = f"{STORAGE}/tiny/mmoe/trial-"
    assert checkpoints == [f"{place}0000", f"{place}0001", None, None]


def test_the_winner_is_marked_and_names_its_baseline(logged: LoggedJob) -> None:
    baseline, winner = logged.run_trial(0.5), logged.run_trial(0.9)
    winner.test_metrics = METRICS | {"cvr_auc": None}
    logged.tracker.log_test(winner)
    logged.tracker.log_winner(winner, baseline)
    logged.tracker.close()
    first, second = logged.runs("trial")
    assert second.data.tags["pwiser.winner"] == "true"
    assert second.data.tags["pwiser.baseline_run"] == first.info.run_id
    assert "pwiser.winner" not in first.data.tags
    assert logged.history(second, "test/ctr_auc") == [(0, 0.7)]
    assert "test/cvr_auc" not in second.data.metrics


def test_a_new_winner_takes_the_place_of_the_one_before(logged: LoggedJob) -> None:
    baseline, former, winner = (logged.run_trial(value) for value in (0.5, 0.8, 0.9))
    logged.tracker.log_winner(former, baseline)
    logged.tracker.log_winner(winner, baseline)
    logged.tracker.close()
    marks = [run.data.tags.get("pwiser.winner") for run in logged.runs("trial")]
    assert marks == [None, "false", "true"]


def test_a_record_that_the_store_refuses_is_told_at_the_end(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    job = LoggedJob(client, tmp_path, tiny_dataset)
    refused = Tracker(
        RecordWriter(client, "987654", Outbox(tmp_path / "refused.db")), job.job, STORAGE
    )
    refused.start_study(job.search.searches[0], tiny_dataset, JOB_FILE, num_lanes=1)
    with pytest.raises(TrackingError, match=r"^tracking: the store refused a record \(.*987654"):
        refused.close()
    job.tracker.close()


def test_an_artefact_is_written_when_its_store_is_back(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "artifacts"
    in_the_way.write_text("away")
    logged = LoggedJob(client, tmp_path, tiny_dataset)
    while "an artefact cannot be written, trying again" not in caplog.text:
        time.sleep(0.05)
    in_the_way.unlink()
    logged.tracker.close()
    (study,) = logged.runs("study")
    assert [found.path for found in client.list_artifacts(study.info.run_id)] == ["job.yaml"]


def test_an_artefact_that_cannot_be_written_is_told_at_the_end(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.records, "ARTEFACT_PATIENCE_S", 0.0)
    (tmp_path / "artifacts").write_text("in the way")
    logged = LoggedJob(client, tmp_path, tiny_dataset)
    with pytest.raises(TrackingError, match=r"^tracking: an artefact cannot be written \("):
        logged.tracker.close()
    assert [run.info.status for run in logged.runs("study")] == ["RUNNING"]
    assert Outbox(logged.outbox).waiting() == []  # it holds nothing else back


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("runs.db", "is no URI; write sqlite:///PATH for a file, or http://HOST:PORT"),
        ("ftp://host/runs", "cannot be used (Model registry functionality is unavailable;"),
    ],
)
def test_a_store_that_cannot_be_used_is_told(uri: str, message: str) -> None:
    with pytest.raises(TrackingError) as caught:
        connect(uri)
    told = str(caught.value)
    assert told.startswith(f"tracking.uri {uri}: {message}")
    assert "\n" not in told


def test_a_file_that_is_no_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but long enough to look like one" * 20)
    with pytest.raises(TrackingError, match=r"cannot be used \(.*file is not a database\); check"):
        connect(f"sqlite:///{tmp_path / 'notes.txt'}")


class Outage:
    """A WSGI application that answers 503 as often as it is told, and MLflow's answers after."""

    def __init__(self, server: Callable[..., Any]) -> None:
        self.server = server
        self.num_left = 0
        self.num_refused = 0

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        if self.num_left:
            self.num_left -= 1
            self.num_refused += 1
            start("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"try later"]
        return self.server(environment, start)


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Outage]]:
    """A real MLflow server on a SQLite store, and the outage before it."""
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{tmp_path / 'server.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # ours are what is tested
    monkeypatch.setattr(tuner.records, "RETRY_FIRST_S", 0.01)
    from mlflow.server import app

    application = Outage(app)
    with make_server("127.0.0.1", 0, application, handler_class=QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", application
        server.shutdown()
        thread.join()


def test_a_store_that_is_away_for_a_while_loses_nothing(
    outage: tuple[str, Outage], tmp_path: Path, tiny_dataset: Dataset
) -> None:
    uri, store = outage
    logged = LoggedJob(connect(uri), tmp_path, tiny_dataset, trials=2)
    store.num_left = 3
    logged.run_trial(0.5, 0.6)
    store.num_left += 3
    logged.run_trial(0.7)
    logged.tracker.close()
    assert store.num_refused == 6
    first, second = logged.runs("trial")
    assert logged.history(first, "valid/ctr_auc") == [(10, 0.5), (20, 0.6)]
    assert logged.history(second, "valid/ctr_auc") == [(10, 0.7)]
    statuses = [run.info.status for run in (first, second, *logged.runs("study"))]
    assert statuses == ["FINISHED"] * 3


def test_a_server_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with make_server("127.0.0.1", 0, lambda *_: []) as server:
        uri = f"http://127.0.0.1:{server.server_port}"
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(
            TrackingError, match=r"cannot be used \(.*\); check the address and the cred"
        ),
    ):
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        connect(uri)


@pytest.mark.parametrize("password", ["open-sesame", "open/sesame"])
def test_a_password_in_the_uri_of_a_store_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with make_server("127.0.0.1", 0, lambda *_: []) as server:
        address = f"127.0.0.1:{server.server_port}"
    with pytest.raises(TrackingError) as caught:
        connect(f"http://admin:{password}@{address}")
    told = str(caught.value)
    assert "sesame" not in told
    assert told.startswith(f"tracking.uri http://{address}: cannot be used (")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://admin:secret@mlflow:5000/x", "http://mlflow:5000/x"),
        ("to postgresql://u:pass/word@db/runs failed", "to postgresql://db/runs failed"),
        ("http://admin@mlflow:5000", "http://admin@mlflow:5000"),
        ("http://mlflow:5000/a and b@c", "http://mlflow:5000/a and b@c"),
        ("sqlite:///pwiser/mlflow.db", "sqlite:///pwiser/mlflow.db"),
        (
            "to postgresql://db/runs?user=u&password=a/b@c failed",
            "to postgresql://db/runs?user=u failed",
        ),
        ("mysql://db:3306/runs?passwd=p@ss&charset=utf8", "mysql://db:3306/runs?charset=utf8"),
        ("postgresql://db/runs?pass%77ord=secret", "postgresql://db/runs"),
        ("mssql://db/runs?odbc_connect=UID%3Dsa%3BPWD%3Dc", "mssql://db/runs"),
        ("abfs://box/dir?sas_token=sig&client_secret=x&tenant_id=y", "abfs://box/dir?tenant_id=y"),
        (
            "s3://bucket/jobs?region=eu-west-1&scheme=http",
            "s3://bucket/jobs?region=eu-west-1&scheme=http",
        ),
        ("is ?password=x asked for", "is ?password=x asked for"),
    ],
)
def test_passwords_are_left_out_of_uris_alone(text: str, shown: str) -> None:
    assert hide_password(text) == shown


def test_a_server_that_refuses_the_user_is_told_apart() -> None:
    def refuse(_environment: object, start: Callable[..., Any]) -> Any:
        start("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"Permission denied"]

    with make_server("127.0.0.1", 0, refuse, handler_class=QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(TrackingRefusedError) as caught:
            connect(uri)
        server.shutdown()
        thread.join()
    assert str(caught.value) == (
        f"tracking.uri {uri}: refuses us (API request to endpoint "
        "/api/2.0/mlflow/experiments/search failed with error code 403 != 200); set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    )


def test_a_study_says_how_many_trials_and_lanes_there_will_be(logged: LoggedJob) -> None:
    logged.tracker.close()
    (study,) = logged.runs("study")
    assert (study.data.tags["pwiser.trials"], study.data.tags["pwiser.lanes"]) == ("4", "2")
