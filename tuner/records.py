"""What is told to MLflow, as records that can be kept on disk, and their delivery.

A record names its run by the id of the study, trial or replicate that it belongs to, which every
run has as a tag, and its times by the moment when it was made: so it can be delivered by another
process, later, and also twice, when a process ends between the delivery and its note.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tuner.errors import TrackingError, TrackingRefusedError
from tuner.outbox import Outbox
from tuner.results import search_all
from tuner.tracking_store import hide_password, http_status

__all__ = [
    "ID_TAG",
    "EndRun",
    "LogRun",
    "MarkWinner",
    "Record",
    "RecordWriter",
    "StartRun",
    "deliver_leftovers",
]

ID_TAG = "pwiser.id"
DATASET_TAG = "pwiser.dataset"
WINNER_TAG = "pwiser.winner"
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 30.0
CLOSE_TIMEOUT_S = 60.0
"""Seconds that a store may be away at the end of a job before its records stay on disk."""

BUSY_STATUSES = {408, 429}  # below 500, and yet worth another try
REFUSALS = {401, 403}

logger = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class StartRun(_Record):
    """Open a run, or go on with the one of this id."""

    kind: Literal["start"] = "start"
    id: str
    name: str
    tags: dict[str, str]
    parent: str | None = None
    params: dict[str, str] = {}
    dataset: str
    dataset_digest: str
    dataset_source: str
    artifacts: dict[str, str] = {}


class LogRun(_Record):
    """Log metrics, as (name, value, time in milliseconds, step), and tags."""

    kind: Literal["log"] = "log"
    id: str
    metrics: tuple[tuple[str, float, int, int], ...] = ()
    tags: dict[str, str] = {}


class EndRun(_Record):
    """Close a run."""

    kind: Literal["end"] = "end"
    id: str
    status: str
    time: int
    tags: dict[str, str] = {}


class MarkWinner(_Record):
    """Mark the winner of a dataset, in place of an earlier one."""

    kind: Literal["winner"] = "winner"
    id: str
    baseline: str
    dataset: str
    tags: dict[str, str] = {}


Record = StartRun | LogRun | EndRun | MarkWinner
RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


class RecordWriter:
    """Writes records in their order, in a thread of its own, for as long as it takes.

    Args:
        client: of the tracking store.
        experiment_id: of the job's experiment.
        outbox: keeps what is not yet written; what an earlier process left in it comes first.
        on_refused: called with the reason, from the thread, when the store refuses the user.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        outbox: Outbox,
        on_refused: Callable[[str], None] = logger.error,
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._outbox = outbox
        self._on_refused = on_refused
        self._runs: dict[str, str] = {
            run.data.tags[ID_TAG]: run.info.run_id
            for run in search_all(client, experiment_id)
            if ID_TAG in run.data.tags  # somebody's own run beside ours has none
        }
        self._uncertain: set[str] = set()
        self._records: queue.Queue[tuple[int, Record] | None] = queue.Queue()
        for number, text in outbox.waiting():
            self._records.put((number, RECORDS.validate_json(text)))
        self._closing = threading.Event()
        self._failure: TrackingError | None = None
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Keep a record on disk, and write it when its turn comes."""
        number = self._outbox.put(record.model_dump_json())
        self._records.put((number, record))

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            TrackingError: if the store refused a record for good, or the user; or if it has been
                away for a minute: what it has not got stays in the outbox.
        """
        self._records.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._closing.set()
        num_waiting = len(self._outbox.waiting())
        self._outbox.close()
        if self._failure is not None:
            raise self._failure
        if num_waiting:
            raise TrackingError(
                f"tracking: the store does not answer; {num_waiting} records are kept in "
                f"{self._outbox.path}, and the same command delivers them"
            )

    def _write(self) -> None:
        while (found := self._records.get()) is not None:
            number, record = found
            if not self._write_one(record) or self._closing.is_set():
                return
            self._outbox.remove(number)

    def _write_one(self, record: Record) -> bool:
        """Write a record, or find that it never can be; False if it has to wait on disk."""
        wait_s = RETRY_FIRST_S
        while True:
            try:
                self._deliver(record)
            except MlflowException as error:
                status, reason = http_status(error), hide_password(error.message)
                if status in REFUSALS:
                    self._refuse(reason)
                    return False
                if status < 500 and status not in BUSY_STATUSES:
                    self._fail(f"tracking: the store refused a record ({reason})")
                    return True
                logger.warning("tracking store does not answer, trying again: %s", reason)
                self._uncertain.add(record.id)  # the run may be there although its answer was lost
                if self._closing.wait(wait_s):
                    return False
                wait_s = min(2 * wait_s, RETRY_LONGEST_S)
            except Exception as error:
                logger.exception("tracking")
                self._fail(f"tracking: an artefact cannot be written ({error})")
                return True
            else:
                return True

    def _fail(self, line: str) -> None:
        logger.error(line)
        self._failure = self._failure or TrackingError(line)

    def _refuse(self, reason: str) -> None:
        line = (
            f"tracking: the store refuses us ({reason}); set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD: the records are kept in {self._outbox.path}, and the same "
            "command delivers them"
        )
        self._failure = TrackingRefusedError(line)
        self._on_refused(line)

    def _deliver(self, record: Record) -> None:
        match record:
            case StartRun():
                self._start(record)
            case LogRun():
                metrics = [Metric(*metric) for metric in record.metrics]
                self._client.log_batch(
                    self._run(record.id), metrics=metrics, tags=_run_tags(record.tags)
                )
            case EndRun():
                run = self._run(record.id)
                self._client.log_batch(run, tags=_run_tags(record.tags))
                self._client.set_terminated(run, record.status, end_time=record.time)
            case MarkWinner():
                self._mark(record)

    def _start(self, record: StartRun) -> None:
        tags = record.tags | {ID_TAG: record.id}
        if record.parent is not None:
            tags["mlflow.parentRunId"] = self._run(record.parent)
        run = self._runs.get(record.id)
        if run is None and record.id in self._uncertain:
            found = self._search(f"tags.`{ID_TAG}` = '{record.id}'")
            run = found[0].info.run_id if found else None
        if run is None:
            run = self._client.create_run(
                self._experiment_id, run_name=record.name, tags=tags
            ).info.run_id
        else:
            self._client.update_run(run, status="RUNNING")
        self._runs[record.id] = run
        params = [Param(name, value) for name, value in record.params.items()]
        self._client.log_batch(run, params=params, tags=_run_tags(tags))
        logged = LoggedDataset(
            record.dataset,
            record.dataset_digest,
            "pwiser",
            record.dataset_source,
            schema=None,
            profile=None,
        )
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run, [DatasetInput(logged, [context])])
        for path, text in record.artifacts.items():
            self._client.log_text(run, text, path)

    def _mark(self, record: MarkWinner) -> None:
        run = self._run(record.id)
        tags = record.tags | {"pwiser.baseline_run": self._run(record.baseline)}
        self._client.log_batch(run, tags=_run_tags(tags | {WINNER_TAG: "true"}))
        wanted = f"tags.`{WINNER_TAG}` = 'true' and tags.`{DATASET_TAG}` = '{record.dataset}'"
        for found in self._search(wanted):
            if found.info.run_id != run:
                self._client.set_tag(found.info.run_id, WINNER_TAG, "false")

    def _run(self, record_id: str) -> str:
        if record_id not in self._runs:
            raise MlflowException(
                f"no run has been opened for {record_id}", error_code=RESOURCE_DOES_NOT_EXIST
            )
        return self._runs[record_id]

    def _search(self, wanted: str) -> list[Run]:
        return list(self._client.search_runs([self._experiment_id], filter_string=wanted))


def deliver_leftovers(client: MlflowClient, experiment_id: str, path: Path) -> None:
    """Write what an earlier process left in its outbox, if it has one.

    Raises:
        TrackingError: if the store refuses, or does not answer for a minute.
    """
    if path.exists():
        RecordWriter(client, experiment_id, Outbox(path)).close()


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value) for name, value in tags.items()]
