"""A job as its report shows it, read from MLflow alone."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from mlflow.entities import Experiment, Run
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict

from tuner.errors import JobNotFoundError
from tuner.evidence import Evidence
from tuner.objective import objective_values
from tuner.results import (
    METRICS,
    JobResult,
    Metrics,
    find_winners,
    job_result,
    objectives_of,
    read_evidence,
    read_job_file,
    search_all,
)
from tuner.tracking import LANES_TAG, SECONDS_METRICS, VERSIONS_TAG

__all__ = ["JobReport", "StudyReport", "TrialRow", "read_report"]

MS_PER_HOUR = 3_600_000
SECONDS_PER_HOUR = 3600
OBJECTIVE = "valid/objective"


class TrialRow(BaseModel):
    """One trial.

    Attributes:
        params: what the search chose, by dotted path.
        score: of its best evaluation on valid; None before the first.
        values: each objective of that evaluation.
        metrics: of that evaluation.
        hours: that a lane was with it.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    state: str
    params: dict[str, Any]
    score: float | None
    values: tuple[float, ...]
    metrics: Metrics
    hours: float
    failure: str | None
    run_id: str

    @property
    def baseline(self) -> bool:
        """Whether this is the study's plain BCE trial."""
        return self.number == 0

    @property
    def usable(self) -> bool:
        """Whether the trial has an evaluation that counts."""
        return self.score is not None and self.state != "failed"


class StudyReport(BaseModel):
    """One study.

    Attributes:
        winner: number of its best trial; None where there is none yet.
        curves: the score at each evaluation's step, of the baseline and of the winner.
        states: how many trials ended how.
        hours: that lanes were with its trials and replicates.
        evidence: what its replicates show on test; None where there are none.
        seed: of its trials' weights and order of the data.
    """

    model_config = ConfigDict(frozen=True)

    dataset: str
    digest: str
    model: str
    objectives: tuple[str, ...]
    trials: tuple[TrialRow, ...]
    winner: int | None
    curves: dict[str, tuple[tuple[int, float], ...]]
    states: dict[str, int]
    hours: float
    lanes: int
    seed: int
    evidence: Evidence | None
    run_id: str

    @property
    def name(self) -> str:
        """`dataset/model`."""
        return f"{self.dataset}/{self.model}"


class JobReport(BaseModel):
    """A job.

    Attributes:
        job_file: its text.
        versions: of the packages that ran it.
        results: the winners; None before there are any.
        hours: on the wall, from the first run to the end of the last.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    job_file: str
    versions: dict[str, str]
    studies: tuple[StudyReport, ...]
    results: JobResult | None
    hours: float

    @property
    def lane_hours(self) -> float:
        """Hours of all lanes."""
        return sum(study.hours for study in self.studies)

    @property
    def num_trials(self) -> int:
        """Trials of all studies."""
        return sum(len(study.trials) for study in self.studies)

    @property
    def pruned_share(self) -> float:
        """Share of the trials that were pruned."""
        pruned = sum(study.states.get("pruned", 0) for study in self.studies)
        return pruned / self.num_trials if self.num_trials else 0.0


def read_report(client: MlflowClient, experiment: Experiment) -> JobReport:
    """Read all that a report shows; a job that is still running is shown as far as it is.

    Raises:
        JobNotFoundError: if the job has no trial yet.
    """
    job, experiment_id = experiment.name, experiment.experiment_id
    all_trials = search_all(client, experiment_id, "trial")
    if not all_trials:
        raise JobNotFoundError(f"job {job!r}: has no trial yet; wait for its first one")
    trials = _by_study(all_trials)
    runs = sorted(search_all(client, experiment_id, "study"), key=lambda run: run.info.start_time)
    winners, evidence = find_winners(client, experiment_id), read_evidence(client, experiment_id)
    all_replicates = search_all(client, experiment_id, "replicate")
    replicates = _by_study(all_replicates)
    studies = tuple(
        _study(
            client,
            run,
            trials[run.data.tags["pwiser.study"]],
            replicates[run.data.tags["pwiser.study"]],
            evidence,
        )
        for run in runs
        if trials[run.data.tags["pwiser.study"]]
    )
    everything = [*all_trials, *all_replicates]
    ends = [run.info.end_time for run in everything if run.info.end_time]
    begun = min(run.info.start_time for run in everything)
    return JobReport(
        job=job,
        job_file=_job_file(client, experiment),
        versions=json.loads(runs[0].data.tags.get(VERSIONS_TAG, "{}")),
        studies=studies,
        results=job_result(client, job, winners, evidence) if winners else None,
        hours=(max(ends) - begun) / MS_PER_HOUR if ends else 0.0,
    )


def _by_study(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.data.tags["pwiser.study"]].append(run)
    return found


def _job_file(client: MlflowClient, experiment: Experiment) -> str:
    """The job's file, or a comment in its place: a job may have ended well without it."""
    try:
        return read_job_file(client, experiment)
    except JobNotFoundError as error:
        return f"# {error}"


def _study(
    client: MlflowClient,
    run: Run,
    trials: list[Run],
    replicates: list[Run],
    evidence: dict[str, dict[str, Evidence]],
) -> StudyReport:
    tags = run.data.tags
    objectives = objectives_of(run)
    rows = sorted((_trial(trial, objectives) for trial in trials), key=lambda row: row.number)
    usable = [row for row in rows if row.usable]
    winner = max(usable, key=lambda row: (row.score or 0.0, -row.number), default=None)
    shown = {"BCE": next((row for row in rows if row.baseline), None), "winner": winner}
    configuration = json.loads(trials[0].data.tags["pwiser.configuration"])
    return StudyReport(
        dataset=tags["pwiser.dataset"],
        digest=tags["pwiser.dataset_digest"],
        model=tags["pwiser.model"],
        objectives=objectives,
        trials=tuple(rows),
        winner=None if winner is None else winner.number,
        curves={name: _curve(client, row.run_id) for name, row in shown.items() if row is not None},
        states=dict(Counter(row.state for row in rows)),
        hours=sum(_hours(found) for found in [*trials, *replicates]),
        lanes=int(tags.get(LANES_TAG, 1)),
        seed=configuration["training"]["seed"],
        evidence=evidence.get(tags["pwiser.dataset"], {}).get(tags["pwiser.model"]),
        run_id=run.info.run_id,
    )


def _trial(run: Run, objectives: tuple[Any, ...]) -> TrialRow:
    tags, logged = run.data.tags, run.data.metrics
    metrics: Metrics = {name: logged.get(f"best/{name}") for name in METRICS}
    score = logged.get("best/objective")
    return TrialRow(
        number=int(tags["pwiser.trial"]),
        state=tags.get("pwiser.state", "running"),
        params=json.loads(tags["pwiser.params"]),
        score=score,
        values=() if score is None else objective_values(metrics, objectives),
        metrics=metrics,
        hours=_hours(run),
        failure=tags.get("pwiser.failure"),
        run_id=run.info.run_id,
    )


def _hours(run: Run) -> float:
    """Hours that a lane was with a trial or replicate."""
    return sum(run.data.metrics.get(name, 0.0) for name in SECONDS_METRICS) / SECONDS_PER_HOUR


def _curve(client: MlflowClient, run_id: str) -> tuple[tuple[int, float], ...]:
    """The score by step; of a trial that was run again the last value of each step."""
    history = sorted(client.get_metric_history(run_id, OBJECTIVE), key=lambda m: m.timestamp)
    return tuple(sorted({metric.step: metric.value for metric in history}.items()))
