"""MLflow, written: an experiment per job, a parent run per study, a child run per trial.

What is told becomes records (`tuner.records`), which one thread writes in order, so that SQLite
has one writer and a slow or absent server delays nothing but its own log. Names of metrics:
`valid/*` at every evaluation's step, `best/*` of the best evaluation, `test/*` of winners,
baselines and replicates, `train/*`, `time/*` in seconds, `evidence/*` on a study's run.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from datasets import Dataset
from tuner.checkpoints import kept_trials
from tuner.errors import TrackingError, TrackingRefusedError
from tuner.evidence import Evidence
from tuner.job import Job
from tuner.messages import Report, Seconds
from tuner.records import REFUSALS, EndRun, LogRun, MarkWinner, RecordWriter, StartRun
from tuner.replicates import Replicate, plan_replicates
from tuner.results import (
    CHECKPOINT_TAG,
    DATASET_TAG,
    JOB_FILE,
    OBJECTIVES_TAG,
    PLAIN_TAG,
    WINNER_TRIAL_TAG,
)
from tuner.search import StudySearch
from tuner.storage import join
from tuner.study import Study, Trial, TrialState, choose_winner
from tuner.tracking_store import RETRIES_VARIABLE, hide_password, http_status
from tuner.versions import installed_versions

__all__ = [
    "LANES_TAG",
    "REPLICATES_TAG",
    "SECONDS_METRICS",
    "STATUSES",
    "TRIALS_TAG",
    "VERSIONS_TAG",
    "Tracker",
    "connect",
    "log_evidence",
    "wait_longer",
]

STATUSES = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.STOPPED: "KILLED",
    TrialState.FAILED: "FAILED",
}

FEW_RETRIES = "2"
"""Of a call while a store is looked for."""

MANY_RETRIES = "7"
"""MLflow's own number, which keeps a caller waiting for minutes."""

MAX_TAG_LENGTH = 5000
SUMMARY_STEP = 0  # one step, so that of a trial that was run again the last summary is shown
TRIALS_TAG = "pwiser.trials"
LANES_TAG = "pwiser.lanes"
REPLICATES_TAG = "pwiser.replicates"
"""Of a study's run: how many replicates of its winner there will be, once it has ended."""
VERSIONS_TAG = "pwiser.versions"
SECONDS_METRICS = ("time/setup_s", "time/training_s", "time/evaluation_s", "time/overhead_s")
DIGEST_LENGTH = 36  # MLflow keeps no longer digest of an input; the tag has all of it


_own_settings: set[str] = set()
"""Environment variables that `connect` has set, and not the user."""


def connect(uri: str) -> MlflowClient:
    """Open a tracking store, creating a SQLite file where there is none.

    Raises:
        TrackingError: if it cannot be reached or used.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    if RETRIES_VARIABLE not in os.environ or RETRIES_VARIABLE in _own_settings:
        os.environ[RETRIES_VARIABLE] = FEW_RETRIES
        _own_settings.add(RETRIES_VARIABLE)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if "://" not in uri:
        raise TrackingError(
            f"tracking.uri {uri}: is no URI; write sqlite:///PATH for a file, or http://HOST:PORT"
        )
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        reason = hide_password(str(error).strip().splitlines()[0].partition(". ")[0])
        uri = hide_password(uri)
        if isinstance(error, MlflowException) and http_status(error) in REFUSALS:
            raise TrackingRefusedError(
                f"tracking.uri {uri}: refuses us ({reason}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            ) from error
        raise TrackingError(
            f"tracking.uri {uri}: cannot be used ({reason}); check the address and the credentials"
        ) from error
    return client


def wait_longer() -> None:
    """Let the calls to a store that `connect` has opened wait for it, unless the user has said."""
    if RETRIES_VARIABLE in _own_settings:
        os.environ[RETRIES_VARIABLE] = MANY_RETRIES


def log_evidence(client: MlflowClient, run_id: str, evidence: Evidence) -> None:
    """Write what the replicates of a study show on the study's run."""
    shown = evidence.objective
    interval = f"{shown.difference:+.4f} [{shown.low:+.4f}, {shown.high:+.4f}]"
    failures = f"; {evidence.failures}" if evidence.failures else ""
    client.log_batch(
        run_id,
        metrics=[Metric("evidence/difference", shown.difference, _now(), SUMMARY_STEP)],
        tags=[
            RunTag("pwiser.verdict", evidence.verdict),
            RunTag("pwiser.evidence", f"{interval} over {len(evidence.seeds)} seeds{failures}"),
        ],
    )


class Tracker:
    """Tells MLflow of one job. Every method returns as soon as its records are on disk.

    Args:
        writer: writes the records.
        job: the job.
        storage: URI below which the job's checkpoints lie.
    """

    def __init__(self, writer: RecordWriter, job: Job, storage: str) -> None:
        self._writer = writer
        self._job = job
        self._storage = storage
        self._datasets: dict[str, Dataset] = {}

    def start_study(
        self, search: StudySearch, dataset: Dataset, job_file: str, num_lanes: int
    ) -> None:
        """Open a study's parent run; it says how many trials and lanes there will be."""
        study = search.study
        self._datasets[study.name] = dataset
        tags = {
            "pwiser.kind": "study",
            TRIALS_TAG: str(search.num_trials),
            LANES_TAG: str(num_lanes),
            VERSIONS_TAG: json.dumps(installed_versions()),
            OBJECTIVES_TAG: ", ".join(self._job.search.objectives),
        }
        self._start(study, study.name, study.name, tags, artifacts={JOB_FILE: job_file})

    def trial_started(self, trial: Trial) -> None:
        """Open a trial's run, a child of its study's."""
        tags = {
            "pwiser.kind": trial.kind,
            "pwiser.trial": str(trial.number),
            "pwiser.baseline": str(trial.baseline).lower(),
            "pwiser.configuration": trial.configuration.model_dump_json(),
            "pwiser.params": json.dumps(trial.params),
        }
        if isinstance(trial, Replicate):
            tags["pwiser.seed"] = str(trial.seed)
            tags[PLAIN_TAG] = str(trial.plain).lower()
        params = {path.removeprefix("loss."): str(value) for path, value in _params(trial).items()}
        name, study = _run_name(trial), trial.study
        self._start(study, trial.id, name, tags, parent=study.name, params=params)

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        """Log one evaluation at its step."""
        metrics = {
            **{f"valid/{name}": value for name, value in report.metrics.items()},
            "valid/objective": trial.score_of(report),
            **{f"train/{name}": value for name, value in report.train.items()},
        }
        self._log(trial.id, metrics, report.step)

    def trial_ended(self, trial: Trial) -> None:
        """Log a trial's best evaluation and its time, and close its run."""
        if trial.best is not None and trial.last is not None:
            metrics = {f"best/{name}": value for name, value in trial.best.metrics.items()}
            metrics["best/objective"] = trial.best_score
            metrics.update(_seconds(trial.last.seconds))
            self._log(trial.id, metrics, SUMMARY_STEP)
        tags = {"pwiser.state": str(trial.state)}
        if trial.last is not None:
            tags["pwiser.nodes"] = ", ".join(trial.last.nodes)
        if trial.failure is not None:
            shown = trial.failure.encode(errors="replace").decode()  # a path may be no text
            tags["pwiser.failure"] = shown[:MAX_TAG_LENGTH]
        self._end(trial.id, STATUSES[trial.state], tags)

    def replicate_started(self, replicate: Replicate) -> None:
        """Open a replicate's run, a child of its study's."""
        self.trial_started(replicate)

    def replicate_evaluated(self, replicate: Replicate, report: Report) -> None:
        """Log one evaluation at its step."""
        self.trial_evaluated(replicate, report)

    def replicate_ended(self, replicate: Replicate) -> None:
        """Log a replicate's test metrics and its end."""
        self.log_test(replicate)
        self.trial_ended(replicate)

    def study_ended(self, search: StudySearch) -> None:
        """Log a study's time and its kept checkpoints, and close its parent run."""
        seconds = search.seconds
        metrics = _seconds(seconds)
        metrics["time/overhead_share"] = seconds.overhead / seconds.lane if seconds.lane else None
        self._log(search.study.name, metrics, SUMMARY_STEP)
        for trial in kept_trials(search.trials, self._job.keep_checkpoints):
            checkpoint = join(self._storage, trial.directory)
            self._writer.put(LogRun(id=trial.id, time=_now(), tags={CHECKPOINT_TAG: checkpoint}))
        status = (
            "KILLED" if any(t.state is TrialState.STOPPED for t in search.trials) else "FINISHED"
        )
        winner = choose_winner(search.trials)
        replicates = plan_replicates([search], self._job.search.replicates)
        tags = {REPLICATES_TAG: str(len(replicates))}
        if winner is not None:
            tags[WINNER_TRIAL_TAG] = str(winner.number)
        self._end(search.study.name, status, tags)

    def log_test(self, trial: Trial) -> None:
        """Log the test metrics of a trial that was tested."""
        metrics = {f"test/{name}": value for name, value in trial.test_metrics.items()}
        self._log(trial.id, metrics, SUMMARY_STEP)

    def log_winner(self, winner: Trial, baseline: Trial) -> None:
        """Mark a dataset's winner in place of an earlier one, and say which run is its baseline."""
        checkpoint = join(self._storage, winner.directory)
        self._writer.put(
            MarkWinner(
                id=winner.id,
                time=_now(),
                baseline=baseline.id,
                dataset=winner.study.dataset,
                tags={CHECKPOINT_TAG: checkpoint},
            )
        )

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            TrackingError: if the store refused, or has been away for a minute.
        """
        self._writer.close()

    def _start(
        self,
        study: Study,
        record_id: str,
        name: str,
        tags: Mapping[str, str],
        *,
        parent: str | None = None,
        params: Mapping[str, str] | None = None,
        artifacts: Mapping[str, str] | None = None,
    ) -> None:
        dataset = self._datasets[study.name]
        common = {
            "pwiser.job": self._job.name,
            "pwiser.study": study.name,
            DATASET_TAG: study.dataset,
            "pwiser.dataset_digest": dataset.digest,
            "pwiser.model": study.model,
            "mlflow.source.name": "pwiser tune",
        }
        self._writer.put(
            StartRun(
                id=record_id,
                time=_now(),
                name=name,
                tags=common | dict(tags),
                parent=parent,
                params=dict(params or {}),
                dataset=dataset.name,
                dataset_digest=dataset.digest[:DIGEST_LENGTH],
                dataset_source=json.dumps({"uri": dataset.uri}),
                artifacts=dict(artifacts or {}),
            )
        )

    def _log(self, record_id: str, metrics: Mapping[str, float | None], step: int) -> None:
        found = ((name, value, step) for name, value in metrics.items() if value is not None)
        self._writer.put(LogRun(id=record_id, time=_now(), metrics=tuple(found)))

    def _end(self, record_id: str, status: str, tags: Mapping[str, str]) -> None:
        self._writer.put(EndRun(id=record_id, status=status, time=_now(), tags=dict(tags)))


def _now() -> int:
    return int(time.time() * 1000)


def _run_name(trial: Trial) -> str:
    again = ""
    if isinstance(trial, Replicate):
        again = f"{' plain BCE' if trial.plain else ''} seed {trial.seed}"
    if trial.baseline:
        return f"{trial.study.name} baseline{again}"
    values = (
        f"{path.rpartition('.')[2]}={value:.4g}" if isinstance(value, float) else f"{path}={value}"
        for path, value in trial.params.items()
    )
    return f"{trial.study.name} {' '.join(values)}{again}"


def _params(trial: Trial) -> dict[str, Any]:
    loss = trial.configuration.loss
    return {
        **trial.params,
        "loss.alpha": loss.alpha,
        "loss.m1": loss.m1,
        "loss.m2": loss.m2,
    }


def _seconds(seconds: Seconds) -> dict[str, float | None]:
    parts = (seconds.setup, seconds.training, seconds.evaluation, seconds.overhead)
    return dict(zip(SECONDS_METRICS, parts, strict=True))
