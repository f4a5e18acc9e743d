"""Records that a store cannot take: what is told, what is kept, and that nothing is lost."""

import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tuner import records
from tuner.errors import StorageError, TrackingError, TrackingRefusedError
from tuner.outbox import Outbox
from tuner.records import (
    STARTED_TAG,
    EndRun,
    LogRun,
    MarkWinner,
    Record,
    RecordWriter,
    StartRun,
    deliver_leftovers,
    record_id,
)
from tuner.results import ID_TAG
from tuner.tracking import connect


def start(name: str, parent: str | None = None) -> StartRun:
    return StartRun(
        id=name,
        time=500,
        name=name,
        tags={"pwiser.dataset": "bob's"},
        parent=parent,
        params={"alpha": "0.3"},
        dataset="us",
        dataset_digest="abc",
        dataset_source='{"uri": "/data/us"}',
        artifacts={} if parent else {"job.yaml": "name: job\n"},
    )


RECORDS: list[Record] = [
    start("us/mmoe"),
    start("us/mmoe/0", "us/mmoe"),
    LogRun(id="us/mmoe/0", time=1_000, metrics=(("valid/ctr_auc", 0.5, 10),)),
    LogRun(id="us/mmoe/0", time=2_000, metrics=(("valid/ctr_auc", 0.7, 20),), tags={"a": "b"}),
    EndRun(id="us/mmoe/0", time=3_000, status="FINISHED"),
    MarkWinner(id="us/mmoe/0", time=3_500, baseline="us/mmoe/0", dataset="bob's"),
    EndRun(id="us/mmoe", time=4_000, status="FINISHED"),
]


@dataclass
class Store:
    """A WSGI application: MLflow's server, or an answer of its own where that is set.

    Attributes:
        status: of the answer now; None for MLflow's own.
        refused: what the writers said of being refused.
    """

    server: Callable[..., Any]
    directory: Path
    status: str | None = None
    uri: str = ""
    refused: list[str] = field(default_factory=list)

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        if self.status is not None:
            start(self.status, [("Content-Type", "text/plain")])
            return [b"not now"]
        return self.server(environment, start)

    @property
    def outbox(self) -> Path:
        return self.directory / "outbox.db"

    def create_experiment(self) -> str:
        found: str = self.client.create_experiment(str(self.directory))
        return found

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def write(self, experiment: str, written: list[Record], *, then: str | None = None) -> None:
        """Write records; the store gives the answer `then` from the writer's start to its end."""
        writer = RecordWriter(self.client, experiment, Outbox(self.outbox), self.refused.append)
        self.status = then
        try:
            with pytest.MonkeyPatch.context() as patch:
                if then is not None:
                    patch.setattr(records, "CLOSE_TIMEOUT_S", 0.3)
                for record in written:
                    writer.put(record)
                writer.close()
        finally:
            self.status = None

    def runs(self, experiment: str) -> list[Run]:
        found = self.client.search_runs([experiment])
        return sorted(found, key=lambda run: run.data.tags[ID_TAG])


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A real MLflow server on a SQLite store, which can be told to be away."""
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{tmp_path / 'server.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(records, "RETRY_FIRST_S", 0.01)
    from mlflow.server import app

    application = Store(app, tmp_path)
    with make_server("127.0.0.1", 0, application, handler_class=QuietHandler) as server:
        application.uri = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        connect(application.uri)
        yield application
        server.shutdown()
        thread.join()


def check(store: Store, experiment: str) -> None:
    """Check that the store holds exactly what the records say, once."""
    study, trial = store.runs(experiment)
    assert [study.info.status, trial.info.status] == ["FINISHED", "FINISHED"]
    assert [study.info.start_time, trial.info.start_time] == [500, 500]
    assert [study.info.end_time, trial.info.end_time] == [4_000, 3_000]
    assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert trial.data.tags["pwiser.winner"] == "true"
    assert trial.data.tags["pwiser.baseline_run"] == trial.info.run_id
    assert trial.data.tags["a"] == "b"
    assert trial.data.params == {"alpha": "0.3"}
    history = store.client.get_metric_history(trial.info.run_id, "valid/ctr_auc")
    assert [(one.step, one.value, one.timestamp) for one in history] == [
        (10, 0.5, 1_000),
        (20, 0.7, 2_000),
    ]
    (found,) = trial.inputs.dataset_inputs
    assert found.dataset.name == "us"


@pytest.mark.parametrize("num_before", range(len(RECORDS)))
def test_records_of_a_store_that_stays_away_are_kept_for_the_next_process(
    store: Store, num_before: int
) -> None:
    experiment = store.create_experiment()
    store.write(experiment, RECORDS[:num_before])
    num_kept = len(RECORDS) - num_before
    with pytest.raises(TrackingError) as caught:
        store.write(experiment, RECORDS[num_before:], then="503 Service Unavailable")
    assert str(caught.value) == (
        f"tracking: the store does not answer; {num_kept} records are kept in {store.outbox}, "
        "and the same command delivers them"
    )
    deliver_leftovers(store.client, experiment, store.outbox)
    check(store, experiment)


@pytest.mark.parametrize("answer", ["404 Not Found", "400 Bad Request", "409 Conflict"])
def test_a_proxy_whose_server_is_away_refuses_nothing_for_good(store: Store, answer: str) -> None:
    experiment = store.create_experiment()
    store.write(experiment, RECORDS[:1])
    with pytest.raises(TrackingError, match="does not answer; 6 records are kept"):
        store.write(experiment, RECORDS[1:], then=answer)
    assert store.refused == []
    deliver_leftovers(store.client, experiment, store.outbox)
    check(store, experiment)


def test_records_that_were_delivered_before_their_note_are_delivered_again_to_no_effect(
    store: Store,
) -> None:
    experiment = store.create_experiment()
    with pytest.raises(TrackingError):
        store.write(experiment, RECORDS, then="503 Service Unavailable")
    for _ in range(2):
        shutil.copy(store.outbox, store.directory / "again.db")
        deliver_leftovers(store.client, experiment, store.outbox)
        check(store, experiment)
        shutil.copy(store.directory / "again.db", store.outbox)


def test_what_is_older_than_the_last_start_of_its_run_says_nothing_any_more(store: Store) -> None:
    experiment = store.create_experiment()
    with pytest.raises(TrackingError):
        store.write(
            experiment,
            [start("us/mmoe"), EndRun(id="us/mmoe", time=600, status="KILLED")],
            then="503 Service Unavailable",
        )
    elsewhere = RecordWriter(store.client, experiment, Outbox(store.directory / "elsewhere.db"))
    elsewhere.put(start("us/mmoe").model_copy(update={"time": 700}))
    elsewhere.close()
    deliver_leftovers(store.client, experiment, store.outbox)
    (run,) = store.runs(experiment)
    assert (run.info.status, run.data.tags[STARTED_TAG]) == ("RUNNING", "700")


def test_a_store_that_is_slow_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = store.create_experiment()
    serve = store.server

    def slowly(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        time.sleep(0.1)
        return serve(environment, start)

    store.server = slowly
    monkeypatch.setattr(records, "CLOSE_TIMEOUT_S", 1.0)
    begun = time.monotonic()
    store.write(experiment, RECORDS)
    assert time.monotonic() - begun > 1.0
    store.server = serve
    check(store, experiment)


def test_a_run_whose_answer_was_lost_is_not_created_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # what a user says, too
    experiment = store.create_experiment()
    serve, lost = store.server, []

    def lose_an_answer(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        if lost or not environment["PATH_INFO"].endswith("/runs/create"):
            return serve(environment, start)
        lost.append(b"".join(serve(environment, lambda *_: None)))
        start("502 Bad Gateway", [("Content-Type", "text/plain")])
        return [b"not now"]

    store.server = lose_an_answer
    store.write(experiment, RECORDS)
    assert len(lost) == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    check(store, experiment)


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        ({"pwiser.id": "us/mmoe/3"}, "us/mmoe/3"),
        ({"pwiser.kind": "study", "pwiser.study": "us/mmoe"}, "us/mmoe"),
        ({"pwiser.kind": "trial", "pwiser.study": "us/mmoe", "pwiser.trial": "3"}, "us/mmoe/3"),
        (
            {
                "pwiser.kind": "replicate",
                "pwiser.study": "us/mmoe",
                "pwiser.trial": "3",
                "pwiser.seed": "5",
            },
            "us/mmoe/3/seed-5",
        ),
        ({"mlflow.runName": "mine"}, None),
    ],
)
def test_runs_of_an_earlier_release_are_known_by_their_other_tags(
    tags: dict[str, str], known: str | None
) -> None:
    assert record_id(tags) == known


def test_a_disk_that_takes_nothing_does_not_stop_the_records(store: Store) -> None:
    experiment = store.create_experiment()
    outbox = Outbox(store.outbox)
    writer = RecordWriter(store.client, experiment, outbox)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = store.outbox.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            for _ in range(1000):
                outbox.put("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for number, _ in outbox.waiting():
        outbox.remove(number)
    for record in RECORDS:
        writer.put(record)
    writer.close()
    check(store, experiment)


def test_somebody_elses_run_in_the_experiment_is_let_be(store: Store) -> None:
    experiment = store.create_experiment()
    own = store.client.create_run(experiment).info.run_id
    store.write(experiment, RECORDS)
    store.client.delete_run(own)
    check(store, experiment)


def test_where_an_earlier_process_left_nothing_there_is_nothing_to_deliver(store: Store) -> None:
    deliver_leftovers(store.client, "no such experiment", store.directory / "missing.db")
    assert not (store.directory / "missing.db").exists()


def test_a_store_that_refuses_the_user_ends_the_job_and_loses_nothing(store: Store) -> None:
    experiment = store.create_experiment()
    with pytest.raises(TrackingRefusedError) as caught:
        store.write(experiment, RECORDS, then="401 Unauthorized")
    told = str(caught.value)
    assert told.startswith("tracking: the store refuses us (")
    assert told.endswith(
        "); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: the records are kept in "
        f"{store.outbox}, and the same command delivers them"
    )
    assert store.refused == [told]
    deliver_leftovers(store.client, experiment, store.outbox)
    check(store, experiment)


def test_a_record_that_the_store_refuses_is_told_and_the_others_are_written(store: Store) -> None:
    experiment = store.create_experiment()
    unknown = LogRun(id="us/mmoe/9", time=1_000, metrics=(("valid/ctr_auc", 0.5, 10),))
    message = r"^tracking: the store refused a record \(no run has been opened for us/mmoe/9\)$"
    with pytest.raises(TrackingError, match=message):
        store.write(experiment, [*RECORDS[:2], unknown, *RECORDS[2:]])
    check(store, experiment)


def test_a_run_that_the_store_refuses_ends_the_job_at_once(store: Store) -> None:
    experiment = store.create_experiment()
    store.write(experiment, RECORDS[:1])
    store.client.delete_experiment(experiment)
    with pytest.raises(TrackingError) as caught:
        store.write(experiment, RECORDS[1:2])
    assert str(caught.value).startswith("tracking: the store refused a record (")
    assert store.refused == [str(caught.value)]
    assert not deliver_leftovers(store.client, experiment, store.outbox)


def test_metrics_are_kept_on_disk_to_the_last_bit() -> None:
    values = [0.1 + 0.2, 5e-324, 1.7e308, float("inf")]
    metrics = tuple(("x", value, step) for step, value in enumerate(values))
    kept = LogRun(id="us/mmoe", time=1, metrics=metrics)
    assert records.RECORDS.validate_json(kept.model_dump_json()) == kept
