"""Going on with a job that an earlier process left: what changed in its file, and its trials."""

import fcntl
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Run
from mlflow.tracking import MlflowClient

from datasets.filesystem import locate
from tuner.errors import JobFileError, StorageError
from tuner.job import Job
from tuner.messages import Report, Seconds
from tuner.records import STARTED_TAG, record_id
from tuner.results import METRICS, search_all
from tuner.storage import exists, join, local_path, upload
from tuner.study import PastTrial, TrialState
from tuner.tracking import SECONDS_METRICS

__all__ = [
    "check_unchanged",
    "only_driver",
    "read_ended_replicates",
    "read_past_trials",
    "store_job",
]

JOB_FILE = "job.json"
LOCK_FILE = "lock"
OWN_KEYS = ("search.space.", "model.")
"""Below these the keys are the job's own; another field that a stored job lacks was added later."""
MAY_GROW = ("search.trials", "search.replicates", "budget.hours", "budget.trial_hours")
MAY_CHANGE = ("budget.hang_minutes", "resources.autoscaled")


def store_job(job: Job, digests: Mapping[str, str], root: str) -> None:
    """Keep the job beside its checkpoints, for a later process to compare with.

    Raises:
        StorageError: if the storage cannot be written.
    """
    with tempfile.TemporaryDirectory() as directory:
        text = json.dumps(_fields(job, digests), indent=2)
        (Path(directory) / JOB_FILE).write_text(text, encoding="utf-8")
        upload(Path(directory), root)


def check_unchanged(job: Job, digests: Mapping[str, str], root: str) -> None:
    """Check that a job is the one that was begun, but for more trials or a longer budget.

    Args:
        job: as its file is now.
        digests: of its datasets' content now, by name.
        root: URI below which the job's checkpoints lie.

    Raises:
        JobFileError: naming every field that differs.
        StorageError: if what the job was cannot be read.
    """
    stored = join(root, JOB_FILE)
    if not exists(stored):
        raise JobFileError(
            f"storage: job {job.name!r} has trials in the tracking store, but none of its files "
            f"is in {root}; name the storage that it was begun with, or archive it with --fresh"
        )
    try:
        begun = json.loads(locate(stored).read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"storage: {stored} cannot be read ({error}); mend it, or archive the job with --fresh"
        ) from error
    now = _fields(job, digests)
    defaults = _fields(Job(name=job.name, datasets=job.datasets), {})
    changes = []
    for field in sorted(begun.keys() | now.keys()):
        since_added = defaults.get(field) if not field.startswith(OWN_KEYS) else None
        old, new = begun.get(field, since_added), now.get(field)
        grows = field in MAY_GROW and (new is None or (old is not None and new > old))
        if old != new and not grows and field not in MAY_CHANGE:
            changes.append(f"{field} was {old}, is {new}")
    if changes:
        raise JobFileError(
            f"name: job {job.name!r} was begun with other settings ({'; '.join(changes)}); "
            f"undo the change (only {', '.join(MAY_GROW)} may grow), choose another name, or "
            "archive the job with --fresh"
        )


@contextmanager
def only_driver(job: Job, root: str) -> Iterator[None]:
    """Hold a job's lock: on a local storage, one process at a time runs it.

    Raises:
        JobFileError: if another process runs the job now.
        StorageError: if the storage cannot be made.
    """
    path = local_path(root)
    if path is None:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock_file = (path / LOCK_FILE).open("w")
    except OSError as error:
        raise StorageError(
            f"storage: {path} cannot be made or written ({error.strerror}); "
            "name a directory of yours"
        ) from error
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobFileError(
                f"name: job {job.name!r} is running already; wait for it, or choose another name"
            ) from error
        yield


def read_past_trials(client: MlflowClient, experiment_id: str) -> dict[str, list[PastTrial]]:
    """Read the trials of an experiment, by study name.

    A trial that was running or stopped when its process ended has the state `RUNNING`.
    """
    past: dict[str, list[PastTrial]] = defaultdict(list)
    for run in search_all(client, experiment_id, "trial"):
        past[run.data.tags["pwiser.study"]].append(_past_trial(client, run))
    return past


def read_ended_replicates(client: MlflowClient, experiment_id: str) -> frozenset[str]:
    """Read the ids of an experiment's replicates that have ended for good."""
    return frozenset(
        record_id(run.data.tags) or ""
        for run in search_all(client, experiment_id, "replicate")
        if TrialState(run.data.tags.get("pwiser.state", TrialState.RUNNING)).final
    )


def _past_trial(client: MlflowClient, run: Run) -> PastTrial:
    tags = run.data.tags
    state = TrialState(tags.get("pwiser.state", "running"))
    if state is TrialState.STOPPED:
        state = TrialState.RUNNING
    return PastTrial(
        number=int(tags["pwiser.trial"]),
        params=json.loads(tags["pwiser.params"]),
        state=state,
        reports=_reports(client, run, all_attempts=not state.ended),
        failure=tags.get("pwiser.failure"),
    )


def _reports(client: MlflowClient, run: Run, *, all_attempts: bool) -> tuple[Report, ...]:
    """Read the evaluations since the trial's last start; with `all_attempts` those before, too."""
    started = 0 if all_attempts else int(run.data.tags.get(STARTED_TAG, 0))
    histories = {
        name: _by_step(client.get_metric_history(run.info.run_id, f"valid/{name}"), started)
        for name in METRICS
    }
    steps = sorted({step for history in histories.values() for step in history})
    return tuple(
        Report(
            index=index,
            last=index == len(steps),
            step=step,
            epoch=0.0,
            metrics={name: history.get(step) for name, history in histories.items()},
            seconds=_seconds(run.data.metrics) if index == len(steps) else Seconds(),
        )
        for index, step in enumerate(steps, start=1)
    )


def _by_step(history: list[Metric], started: int) -> dict[int, float]:
    """The value of each step, of the last time that the trial was run (milliseconds)."""
    return {metric.step: metric.value for metric in history if metric.timestamp >= started}


def _seconds(metrics: Mapping[str, float]) -> Seconds:
    setup, training, evaluation, overhead = (metrics.get(name, 0.0) for name in SECONDS_METRICS)
    return Seconds(
        setup=setup,
        training=training,
        evaluation=evaluation,
        lane=setup + training + evaluation + overhead,
    )


def _fields(job: Job, digests: Mapping[str, str]) -> dict[str, Any]:
    fields = _flatten(job.model_dump(mode="json"))
    return fields | {f"datasets.{name}.digest": digest for name, digest in digests.items()}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401 - JSON
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= _flatten(part, f"{prefix}.{name}" if prefix else name)
    return flat
