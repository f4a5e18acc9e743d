"""What a job found, read from MLflow alone: per dataset the winner and its baseline."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Experiment, Run
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict

from tuner.errors import JobNotFoundError
from tuner.evidence import Evidence, weigh
from tuner.objective import OBJECTIVES, Objective
from tuner.study import TrialState

__all__ = [
    "ID_TAG",
    "JOB_FILE",
    "JOB_TAG",
    "METRICS",
    "OBJECTIVES_TAG",
    "PLAIN_TAG",
    "WINNER_TRIAL_TAG",
    "BaselineResult",
    "DatasetResult",
    "JobResult",
    "find_experiment",
    "find_winners",
    "job_result",
    "objectives_of",
    "read_evidence",
    "read_job_file",
    "read_results",
    "search_all",
    "winners_of",
]

JOB_FILE = "job.yaml"
"""Artefact of every study's run."""

JOB_TAG = "pwiser.job"
"""Of an experiment: the job that has created it, whatever its name is by now."""
ID_TAG = "pwiser.id"
"""Of every run: the study, trial or replicate that it is of."""
DATASET_TAG = "pwiser.dataset"
WINNER_TAG = "pwiser.winner"
CHECKPOINT_TAG = "pwiser.checkpoint"
OBJECTIVES_TAG = "pwiser.objectives"
"""Of a study's run: what its search maximises."""
PLAIN_TAG = "pwiser.plain"
"""Of a replicate's run: whether it is trained with plain BCE in place of the winner's loss."""
WINNER_TRIAL_TAG = "pwiser.winner_trial"
"""Of a study's run: the number of its best trial, once it has ended."""

METRICS = ("ctr_auc", "ctr_logloss", "ctcvr_auc", "ctcvr_logloss", "cvr_auc")
Metrics = dict[str, float | None]


class BaselineResult(BaseModel):
    """The plain BCE trial of the winner's study."""

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, Metrics]


class DatasetResult(BaseModel):
    """The winner of one dataset.

    Attributes:
        model: a key of `MODELS` or `module:Class`.
        config: the winner's settings by section: `model`, `training`, `loss`.
        metrics: by split, `valid` and `test`; a metric is None where one class alone is there.
        baseline: the same of the baseline.
        checkpoint: directory URI.
        run_id: of the MLflow run.
        evidence: by model, what the replicates of each study of the dataset show on test; a study
            without enough of them is not there.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    config: dict[str, dict[str, Any]]
    metrics: dict[str, Metrics]
    baseline: BaselineResult
    checkpoint: str
    run_id: str
    evidence: dict[str, Evidence] = {}


class JobResult(BaseModel):
    """What `pwiser best` prints."""

    model_config = ConfigDict(frozen=True)

    job: str
    datasets: dict[str, DatasetResult]


def find_experiment(client: MlflowClient, job: str) -> Experiment:
    """Find a job's experiment.

    Raises:
        JobNotFoundError: if there is none of that name, or it is no job's.
    """
    found = client.get_experiment_by_name(job)
    if found is None or found.lifecycle_stage != "active" or JOB_TAG not in found.tags:
        jobs = client.search_experiments(filter_string=f"tags.`{JOB_TAG}` != ''")
        names = sorted(known.name for known in jobs if known.name == known.tags[JOB_TAG])
        raise JobNotFoundError(
            f"job {job!r}: not in the tracking store; it holds {', '.join(names) or 'no job'}"
        )
    return found


def find_winners(client: MlflowClient, experiment_id: str) -> dict[str, Run]:
    """Find the winners' runs of a job, by dataset, in the order of the job file."""
    return {run.data.tags[DATASET_TAG]: run for run in winners_of(client, experiment_id)}


def winners_of(client: MlflowClient, experiment_id: str) -> list[Run]:
    """Find the runs that are marked as winners, in the order of their start."""
    return list(
        client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{WINNER_TAG}` = 'true'",
            order_by=["attributes.start_time ASC"],
        )
    )


def search_all(client: MlflowClient, experiment_id: str, kind: str | None = None) -> list[Run]:
    """Read all runs, or those of one kind, `study`, `trial` or `replicate`, page by page.

    Of runs with the same id one is read: creating a run may have been repeated before its answer
    came, and then one of them is left as it was created.
    """
    runs: list[Run] = []
    token = None
    wanted = "" if kind is None else f"tags.`pwiser.kind` = '{kind}'"
    while True:
        page = client.search_runs([experiment_id], filter_string=wanted, page_token=token)
        runs += page
        token = page.token
        if not token:
            return _one_per_id(runs)


def _one_per_id(runs: list[Run]) -> list[Run]:
    """Leave out all but the furthest of the runs with the same id; those without one stay."""
    furthest: dict[str, Run] = {}
    for run in runs:
        known = run.data.tags.get(ID_TAG, run.info.run_id)
        furthest[known] = max(furthest.get(known, run), run, key=_progress)
    return list(furthest.values())


def _progress(run: Run) -> tuple[bool, bool, int]:
    state = TrialState(run.data.tags.get("pwiser.state", TrialState.RUNNING))
    return state.final, run.info.status != "RUNNING", len(run.data.metrics)


def read_results(client: MlflowClient, experiment: Experiment) -> JobResult:
    """Read the winners of a finished job.

    Raises:
        JobNotFoundError: if it has no winner yet.
    """
    winners = find_winners(client, experiment.experiment_id)
    if not winners:
        raise JobNotFoundError(
            f"job {experiment.name!r}: has no winner yet; it is still running or was stopped (see "
            "pwiser ui)"
        )
    evidence = read_evidence(client, experiment.experiment_id)
    return job_result(client, experiment.name, winners, evidence)


def job_result(
    client: MlflowClient,
    job: str,
    winners: Mapping[str, Run],
    evidence: Mapping[str, dict[str, Evidence]],
) -> JobResult:
    """Put winners, as `find_winners` gives them, and evidence, as `read_evidence`, together."""
    return JobResult(
        job=job,
        datasets={
            name: _dataset_result(client, run, evidence.get(name, {}))
            for name, run in winners.items()
        },
    )


def read_evidence(client: MlflowClient, experiment_id: str) -> dict[str, dict[str, Evidence]]:
    """Weigh the replicates of a job, by dataset and model."""
    replicates: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in search_all(client, experiment_id, "replicate"):
        tags = run.data.tags
        if tags.get("pwiser.state") in ("complete", "failed"):
            replicates[tags["pwiser.study"], tags["pwiser.trial"]].append(run)
    evidence: dict[str, dict[str, Evidence]] = defaultdict(dict)
    studies = search_all(client, experiment_id, "study")
    for study in sorted(studies, key=lambda run: run.info.start_time):
        tags = study.data.tags
        winner = tags.get(WINNER_TRIAL_TAG, "0")
        runs = replicates[tags["pwiser.study"], winner]
        plain = [run for run in runs if run.data.tags.get(PLAIN_TAG) == "true"]
        own = [run for run in runs if run not in plain]
        if not own:
            continue
        loss = json.loads(own[0].data.tags["pwiser.configuration"])["loss"]
        found = weigh(
            model=tags["pwiser.model"],
            winner=int(winner),
            loss=loss,
            objectives=objectives_of(study),
            baselines=_test_metrics(plain if loss["alpha"] else own),
            winners=_test_metrics(own),
            failed_baselines=_failed_seeds(plain),
            failed_winners=_failed_seeds(own),
        )
        if found is not None:
            evidence[tags[DATASET_TAG]][tags["pwiser.model"]] = found
    return evidence


def objectives_of(study: Run) -> tuple[Objective, ...]:
    """Read what a study's search maximises from its run, in the order of `OBJECTIVES`."""
    names = study.data.tags.get(OBJECTIVES_TAG, "mean_auc").split(", ")
    return tuple(objective for objective in OBJECTIVES if objective in names)


def _test_metrics(runs: list[Run]) -> dict[int, Metrics]:
    """The test metrics of one trial's replicates by seed, of those that did not fail."""
    return {_seed(run): _metrics(run.data.metrics)["test"] for run in runs if not _has_failed(run)}


def _failed_seeds(runs: list[Run]) -> list[int]:
    return [_seed(run) for run in runs if _has_failed(run)]


def _seed(replicate: Run) -> int:
    return int(replicate.data.tags["pwiser.seed"])


def _has_failed(replicate: Run) -> bool:
    return replicate.data.tags["pwiser.state"] == "failed"


def read_job_file(client: MlflowClient, experiment: Experiment) -> str:
    """Read the text of a job's file, as it was when the job was last started.

    Raises:
        JobNotFoundError: if its file is not there.
    """
    for run in search_all(client, experiment.experiment_id, "study"):
        with tempfile.TemporaryDirectory() as directory:
            try:
                path = client.download_artifacts(run.info.run_id, JOB_FILE, directory)
            except Exception:  # noqa: BLE001 - of any store of artefacts: another study has it too
                continue
            return Path(path).read_text(encoding="utf-8")
    raise JobNotFoundError(
        f"job {experiment.name!r}: its job file is not in the tracking store; submit it"
    )


def _dataset_result(client: MlflowClient, run: Run, evidence: dict[str, Evidence]) -> DatasetResult:
    tags = run.data.tags
    configuration = json.loads(tags["pwiser.configuration"])
    baseline = client.get_run(tags["pwiser.baseline_run"])
    return DatasetResult(
        model=tags["pwiser.model"],
        config={
            "model": configuration["model_settings"],
            "training": configuration["training"],
            "loss": configuration["loss"],
        },
        metrics=_metrics(run.data.metrics),
        baseline=BaselineResult(metrics=_metrics(baseline.data.metrics)),
        checkpoint=tags[CHECKPOINT_TAG],
        run_id=run.info.run_id,
        evidence=evidence,
    )


def _metrics(logged: Mapping[str, float]) -> dict[str, Metrics]:
    return {
        "valid": {name: logged.get(f"best/{name}") for name in METRICS},
        "test": {name: logged.get(f"test/{name}") for name in METRICS},
    }
