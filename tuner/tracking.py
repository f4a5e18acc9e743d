"""MLflow, written: an experiment per job, a parent run per study, a child run per trial.

One thread writes, in order, so that SQLite has one writer and a slow or absent server delays
nothing but its own log. Names of metrics: `valid/*` at every evaluation's step, `best/*` of the
best evaluation, `test/*` of winners, baselines and replicates, `train/*`, `time/*` in seconds,
`evidence/*` on a study's run.
"""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from datasets import Dataset
from tuner.checkpoints import kept_trials
from tuner.errors import TrackingError, TrackingRefusedError
from tuner.evidence import Evidence
from tuner.job import Job
from tuner.messages import Report, Seconds
from tuner.replicates import Replicate
from tuner.results import JOB_FILE, OBJECTIVES_TAG, WINNER_TRIAL_TAG
from tuner.search import StudySearch
from tuner.storage import join
from tuner.study import Study, Trial, TrialState, choose_winner
from tuner.tracking_store import hide_password
from tuner.versions import installed_versions

__all__ = [
    "LANES_TAG",
    "SECONDS_METRICS",
    "STARTED_TAG",
    "STATUSES",
    "TRIALS_TAG",
    "VERSIONS_TAG",
    "Tracker",
    "connect",
    "log_evidence",
]

STATUSES = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.STOPPED: "KILLED",
    TrialState.FAILED: "FAILED",
}

MLFLOW_RETRIES = "2"  # MLflow's own 7 keep a user waiting for minutes; a tracker tries for ever
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 30.0
BUSY_STATUSES = {408, 429}  # below 500, and yet worth another try
REFUSALS = {401, 403}
MAX_TAG_LENGTH = 5000
SUMMARY_STEP = 0  # one step, so that of a trial that was run again the last summary is shown
STARTED_TAG = "pwiser.started"
TRIALS_TAG = "pwiser.trials"
LANES_TAG = "pwiser.lanes"
VERSIONS_TAG = "pwiser.versions"
SECONDS_METRICS = ("time/setup_s", "time/training_s", "time/evaluation_s", "time/overhead_s")
DIGEST_LENGTH = 36  # MLflow keeps no longer digest of an input; the tag has all of it

logger = logging.getLogger(__name__)


def connect(uri: str) -> MlflowClient:
    """Open a tracking store, creating a SQLite file where there is none.

    Raises:
        TrackingError: if it cannot be reached or used.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", MLFLOW_RETRIES)
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
        if isinstance(error, MlflowException) and _http_status(error) in REFUSALS:
            raise TrackingRefusedError(
                f"tracking.uri {uri}: refuses us ({reason}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            ) from error
        raise TrackingError(
            f"tracking.uri {uri}: cannot be used ({reason}); check the address and the credentials"
        ) from error
    return client


def _http_status(error: MlflowException) -> int:
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def log_evidence(client: MlflowClient, run_id: str, evidence: Evidence) -> None:
    """Write what the replicates of a study show on the study's run."""
    shown = evidence.objective
    interval = f"{shown.difference:+.4f} [{shown.low:+.4f}, {shown.high:+.4f}]"
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric("evidence/difference", shown.difference, now, SUMMARY_STEP)],
        tags=[
            RunTag("pwiser.verdict", evidence.verdict),
            RunTag("pwiser.evidence", f"{interval} over {len(evidence.seeds)} seeds"),
        ],
    )


class Tracker:
    """Logs one job. Every method returns at once; `close` waits for what is not yet written.

    Args:
        client: of the tracking store.
        experiment_id: of the job's experiment.
        job: the job.
        storage: URI below which the job's checkpoints lie.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, job: Job, storage: str) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._job = job
        self._storage = storage
        self._runs: dict[str, str] = {}
        self._tried: set[str] = set()
        self._winners: dict[str, str] = {}
        self._datasets: dict[str, Dataset] = {}
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()
        self.failure: str | None = None

    def restore(self, runs: Mapping[str, str]) -> None:
        """Go on with the runs of an earlier process, by study name and trial id."""
        self._runs.update(runs)

    def restore_winner(self, dataset: str, run_id: str) -> None:
        """Remember the winner of an earlier process; it stays one until there is a new one."""
        self._winners[dataset] = run_id

    def start_study(
        self, search: StudySearch, dataset: Dataset, job_file: str, num_lanes: int
    ) -> None:
        """Open a study's parent run; it says how many trials and lanes there will be."""
        study = search.study
        self._datasets[study.name] = dataset
        tags = {
            **self._tags(study),
            "pwiser.kind": "study",
            TRIALS_TAG: str(search.num_trials),
            LANES_TAG: str(num_lanes),
            VERSIONS_TAG: json.dumps(installed_versions()),
            OBJECTIVES_TAG: ", ".join(self._job.search.objectives),
        }

        def call() -> None:
            self._start(study.name, study.name, tags, dataset)
            self._client.log_text(self._runs[study.name], job_file, JOB_FILE)

        self._calls.put(call)

    def trial_started(self, trial: Trial) -> None:
        """Open a trial's run, a child of its study's."""
        study = trial.study
        tags = {
            **self._tags(study),
            "pwiser.kind": trial.kind,
            "pwiser.trial": str(trial.number),
            "pwiser.baseline": str(trial.baseline).lower(),
            "pwiser.configuration": trial.configuration.model_dump_json(),
            "pwiser.params": json.dumps(trial.params),
            STARTED_TAG: str(int(time.time() * 1000)),
        }
        if isinstance(trial, Replicate):
            tags["pwiser.seed"] = str(trial.seed)
        params = [
            Param(path.removeprefix("loss."), str(value)) for path, value in _params(trial).items()
        ]

        def call() -> None:
            parent = {"mlflow.parentRunId": self._runs[study.name]}
            self._start(trial.id, _run_name(trial), tags | parent, self._datasets[study.name])
            self._client.log_batch(self._runs[trial.id], params=params)

        self._calls.put(call)

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
            tags["pwiser.failure"] = trial.failure[:MAX_TAG_LENGTH]
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
            self._tag(trial.id, {"pwiser.checkpoint": join(self._storage, trial.directory)})
        status = (
            "KILLED" if any(t.state is TrialState.STOPPED for t in search.trials) else "FINISHED"
        )
        winner = choose_winner(search.trials)
        tags = {} if winner is None else {WINNER_TRIAL_TAG: str(winner.number)}
        self._end(search.study.name, status, tags)

    def log_test(self, trial: Trial) -> None:
        """Log the test metrics of a trial that was tested."""
        metrics = {f"test/{name}": value for name, value in trial.test_metrics.items()}
        self._log(trial.id, metrics, SUMMARY_STEP)

    def log_winner(self, winner: Trial, baseline: Trial) -> None:
        """Mark a dataset's winner in place of an earlier one, and say which run is its baseline."""
        dataset = winner.study.dataset

        def call() -> None:
            run_id = self._runs[winner.id]
            tags = {
                "pwiser.checkpoint": join(self._storage, winner.directory),
                "pwiser.baseline_run": self._runs[baseline.id],
                "pwiser.winner": "true",
            }
            run_tags = [RunTag(name, value) for name, value in tags.items()]
            self._client.log_batch(run_id, tags=run_tags)
            former = self._winners.get(dataset, run_id)
            if former != run_id:
                self._client.set_tag(former, "pwiser.winner", "false")
            self._winners[dataset] = run_id

        self._calls.put(call)

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            TrackingError: if the store refused for good.
        """
        self._calls.put(None)
        self._thread.join()
        if self.failure is not None:
            raise TrackingError(self.failure)

    def _tags(self, study: Study) -> dict[str, str]:
        return {
            "pwiser.job": self._job.name,
            "pwiser.study": study.name,
            "pwiser.dataset": study.dataset,
            "pwiser.dataset_digest": self._datasets[study.name].digest,
            "pwiser.model": study.model,
            "mlflow.source.name": "pwiser tune",
        }

    def _adopt(self, key: str, tags: Mapping[str, str]) -> None:
        names = ("pwiser.kind", "pwiser.study", "pwiser.trial", "pwiser.seed")
        wanted = [f"tags.`{name}` = '{tags[name]}'" for name in names if name in tags]
        found = self._client.search_runs([self._experiment_id], filter_string=" and ".join(wanted))
        if found:
            self._runs[key] = found[0].info.run_id

    def _start(self, key: str, name: str, tags: dict[str, str], dataset: Dataset) -> None:
        if key in self._tried:  # the run may be there although its answer was lost
            self._adopt(key, tags)
        self._tried.add(key)
        if key in self._runs:  # of an earlier process, or of a call that failed half-way
            self._client.update_run(self._runs[key], status="RUNNING")
            run_tags = [RunTag(name, value) for name, value in tags.items()]
            self._client.log_batch(self._runs[key], tags=run_tags)
        else:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
            self._runs[key] = run.info.run_id
        source = json.dumps({"uri": dataset.uri})
        logged = LoggedDataset(
            dataset.name,
            dataset.digest[:DIGEST_LENGTH],
            "pwiser",
            source,
            schema=None,
            profile=None,
        )
        self._client.log_inputs(
            self._runs[key], [DatasetInput(logged, [InputTag("mlflow.data.context", "training")])]
        )

    def _log(self, key: str, metrics: Mapping[str, float | None], step: int) -> None:
        now = int(time.time() * 1000)
        batch = [
            Metric(name, value, now, step) for name, value in metrics.items() if value is not None
        ]
        self._calls.put(lambda: self._client.log_batch(self._runs[key], metrics=batch))

    def _tag(self, key: str, tags: Mapping[str, str]) -> None:
        run_tags = [RunTag(name, value) for name, value in tags.items()]
        self._calls.put(lambda: self._client.log_batch(self._runs[key], tags=run_tags))

    def _end(self, key: str, status: str, tags: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        self._tag(key, tags)
        self._calls.put(lambda: self._client.set_terminated(self._runs[key], status, end_time=now))

    def _write(self) -> None:
        while (call := self._calls.get()) is not None:
            self._write_one(call)

    def _write_one(self, call: Callable[[], object]) -> None:
        wait_s = RETRY_FIRST_S
        while True:
            try:
                call()
            except MlflowException as error:
                status = _http_status(error)
                if status < 500 and status not in BUSY_STATUSES:
                    self.failure = (
                        self.failure
                        or f"tracking: the store refused a record ({hide_password(error.message)})"
                    )
                    logger.error(self.failure)
                    return
                reason = hide_password(error.message)
                logger.warning("tracking store does not answer, trying again: %s", reason)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_LONGEST_S)
            except Exception as error:
                self.failure = self.failure or f"tracking: an artefact cannot be written ({error})"
                logger.exception(self.failure)
                return
            else:
                return


def _run_name(trial: Trial) -> str:
    seed = f" seed {trial.seed}" if isinstance(trial, Replicate) else ""
    if trial.baseline:
        return f"{trial.study.name} baseline{seed}"
    values = (
        f"{path.rpartition('.')[2]}={value:.4g}" if isinstance(value, float) else f"{path}={value}"
        for path, value in trial.params.items()
    )
    return f"{trial.study.name} {' '.join(values)}{seed}"


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
