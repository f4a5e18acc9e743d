"""What is told to MLflow, as records that can be kept on disk, and their delivery.

A record names its run by the id of the study, trial or replicate that it belongs to, which every
run has as a tag, and has the moment when it was made: so it can be delivered by another process,
later, and also twice, when a process ends between the delivery and its note. What a process has
left that is older than the last start of its run, as of a trial that has begun again elsewhere, is
dropped.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import HTTP_STATUS_TO_ERROR_CODE, MlflowException, RestException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tuner.errors import StorageError, TrackingError, TrackingRefusedError
from tuner.outbox import Outbox
from tuner.results import DATASET_TAG, ID_TAG, WINNER_TAG, search_all, winners_of
from tuner.tracking_store import hide_password, http_status, single_attempts

__all__ = [
    "REFUSALS",
    "STARTED_TAG",
    "EndRun",
    "LogRun",
    "MarkWinner",
    "Record",
    "RecordWriter",
    "StartRun",
    "deliver_leftovers",
    "record_id",
]

STARTED_TAG = "pwiser.started"
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 30.0
CLOSE_TIMEOUT_S = 60.0
"""Seconds without one record written, at the end of a job, after which the rest stays on disk."""

ARTEFACT_PATIENCE_S = 45.0
"""Seconds that the store of artefacts may be away before artefacts are given up: less than
`CLOSE_TIMEOUT_S`, or a store that is never there would hold all other records back for good."""

CLOSE_POLL_S = 0.1
LAST_CALL_S = 5.0
"""Seconds that the call in hand has to end before the outbox is left open behind it."""

BUSY_STATUSES = {408, 429}  # below 500, and yet worth another try
REFUSALS = {401, 403}

logger = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    id: str
    time: int
    """When it was made, in milliseconds."""


class StartRun(_Record):
    """Open a run, or go on with the one of this id."""

    kind: Literal["start"] = "start"
    name: str
    tags: dict[str, str]
    parent: str | None = None
    params: dict[str, str] = {}
    dataset: str
    dataset_digest: str
    dataset_source: str
    artifacts: dict[str, str] = {}


class LogRun(_Record):
    """Log metrics, as (name, value, step), and tags."""

    kind: Literal["log"] = "log"
    metrics: tuple[tuple[str, float, int], ...] = ()
    tags: dict[str, str] = {}


class EndRun(_Record):
    """Close a run."""

    kind: Literal["end"] = "end"
    status: str
    tags: dict[str, str] = {}


class MarkWinner(_Record):
    """Mark the winner of a dataset, in place of an earlier one."""

    kind: Literal["winner"] = "winner"
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
        on_refused: called with the reason, from the thread, when the store refuses the
            user, or a run.
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
        self._runs: dict[str, str] = {}
        started: dict[str, int] = {}
        for run in search_all(client, experiment_id):
            known = record_id(run.data.tags)
            if known is not None:
                self._runs[known] = run.info.run_id
                started[known] = int(run.data.tags.get(STARTED_TAG, 0))
        self._uncertain: set[str] = set()
        self._no_artefacts_since: float | None = None
        self._records: queue.Queue[tuple[int | None, Record] | None] = queue.Queue()
        for number, text in outbox.waiting():
            record = RECORDS.validate_json(text)
            if record.time < started.get(record.id, 0):  # its trial has begun again elsewhere
                outbox.remove(number)
            else:
                self._records.put((number, record))
        self._num_written = 0
        self._closing = threading.Event()
        self._failure: TrackingError | None = None
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Keep a record on disk, and write it when its turn comes; one that no disk takes, too."""
        number = None
        try:
            number = self._outbox.put(record.model_dump_json())
        except StorageError as error:
            logger.warning("a record for MLflow is in memory alone: %s", error)
        self._records.put((number, record))

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            TrackingError: if the store refused a record for good, or the user; or if it has taken
                none for a minute: what it has not got stays in the outbox.
        """
        self._records.put(None)
        num_written, since = self._num_written, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < CLOSE_TIMEOUT_S:
            self._thread.join(CLOSE_POLL_S)
            if self._num_written != num_written:
                num_written, since = self._num_written, time.monotonic()
        self._closing.set()
        self._thread.join(LAST_CALL_S)
        num_waiting = len(self._outbox.waiting())
        if not self._thread.is_alive():
            self._outbox.close()
        if self._failure is not None:
            raise self._failure
        if num_waiting:
            raise TrackingError(
                f"tracking: the store does not answer; {num_waiting} records are kept in "
                f"{self._outbox.path}, and the same command delivers them"
            )

    @single_attempts()
    def _write(self) -> None:
        while (found := self._records.get()) is not None:
            number, record = found
            if not self._write_one(record) or self._closing.is_set():
                return
            self._num_written += 1
            if number is not None:
                try:
                    self._outbox.remove(number)
                except StorageError as error:  # it will be delivered again, to no effect
                    logger.warning(error)

    def _write_one(self, record: Record) -> bool:
        """Write a record, or find that it never can be; False if it has to wait on disk."""
        wait_s = RETRY_FIRST_S
        while True:
            try:
                self._deliver(record)
            except Exception as error:  # noqa: BLE001 - of a store of artefacts, whatever it is
                go_on = self._judge(record, error)
            else:
                return True
            if go_on is not None:
                return go_on
            if self._closing.wait(wait_s):
                return False
            wait_s = min(2 * wait_s, RETRY_LONGEST_S)

    def _judge(self, record: Record, error: Exception) -> bool | None:
        """Whether to go on with the next record or leave them all; None to try this one again."""
        if not isinstance(error, MlflowException):
            if self._no_artefacts_since is None:
                self._no_artefacts_since = time.monotonic()
            if time.monotonic() - self._no_artefacts_since < ARTEFACT_PATIENCE_S:
                logger.warning("an artefact cannot be written, trying again: %s", error)
                return None
            logger.error("tracking", exc_info=error)
            self._fail(f"tracking: an artefact cannot be written ({error})")
            return True
        status, reason = http_status(error), hide_password(error.message)
        if status in REFUSALS:
            self._refuse(reason)
            return False
        if _is_final(error):
            line = f"tracking: the store refused a record ({reason})"
            self._fail(line)
            if isinstance(record, StartRun) and record.id not in self._runs:
                self._failure = TrackingError(line)
                self._on_refused(line)  # all that would be told of this run is lost
            return True
        logger.warning("tracking store does not answer, trying again: %s", reason)
        self._uncertain.add(record.id)  # the run may be there although its answer was lost
        return None

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
                metrics = [
                    Metric(name, value, record.time, step) for name, value, step in record.metrics
                ]
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
        tags = record.tags | {ID_TAG: record.id, STARTED_TAG: str(record.time)}
        if record.parent is not None:
            tags["mlflow.parentRunId"] = self._run(record.parent)
        run = self._runs.get(record.id)
        if run is None and record.id in self._uncertain:
            found = search_all(self._client, self._experiment_id)
            run = next((r.info.run_id for r in found if record_id(r.data.tags) == record.id), None)
        if run is None:
            run = self._client.create_run(
                self._experiment_id, start_time=record.time, run_name=record.name, tags=tags
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
            self._no_artefacts_since = None

    def _mark(self, record: MarkWinner) -> None:
        run = self._run(record.id)
        tags = record.tags | {"pwiser.baseline_run": self._run(record.baseline)}
        self._client.log_batch(run, tags=_run_tags(tags | {WINNER_TAG: "true"}))
        for found in winners_of(self._client, self._experiment_id):
            if found.data.tags[DATASET_TAG] == record.dataset and found.info.run_id != run:
                self._client.set_tag(found.info.run_id, WINNER_TAG, "false")

    def _run(self, known: str) -> str:
        if known not in self._runs:
            raise MlflowException(
                f"no run has been opened for {known}", error_code=RESOURCE_DOES_NOT_EXIST
            )
        return self._runs[known]


def record_id(tags: Mapping[str, str]) -> str | None:
    """Tell from a run's tags which study, trial or replicate it is of; None for any other run.

    Runs of an earlier release have no id among their tags, but all that makes one.
    """
    if ID_TAG in tags:
        return tags[ID_TAG]
    kind, study = tags.get("pwiser.kind"), tags.get("pwiser.study")
    if kind == "study":
        return study
    if kind == "trial":
        return f"{study}/{tags['pwiser.trial']}"
    if kind == "replicate":
        return f"{study}/{tags['pwiser.trial']}/seed-{tags['pwiser.seed']}"
    return None


def deliver_leftovers(client: MlflowClient, experiment_id: str, path: Path) -> bool:
    """Write what an earlier process left in its outbox; return whether there was anything.

    Raises:
        TrackingError: if the store refuses, or takes nothing for a minute.
    """
    if not path.exists():
        return False
    outbox = Outbox(path)
    if not outbox.waiting():
        outbox.close()
        return False
    RecordWriter(client, experiment_id, outbox, on_refused=lambda _: None).close()
    return True


def _is_final(error: MlflowException) -> bool:
    """Whether MLflow itself refuses; a proxy whose server is away says 404 too, in its own words.

    Of such an answer MLflow's client knows the status alone, and raises the code of that status.
    """
    status = http_status(error)
    if status >= 500 or status in BUSY_STATUSES:
        return False
    return isinstance(error, RestException) or error.error_code != HTTP_STATUS_TO_ERROR_CODE[status]


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value) for name, value in tags.items()]
