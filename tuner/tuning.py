"""`pwiser tune`: one job, from its file to its winners."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import ray
from mlflow.entities import Experiment, LifecycleStage
from mlflow.tracking import MlflowClient
from rich.console import Console

from datasets import Dataset, open_dataset
from datasets.manifest import SplitSummary
from tuner.cluster import (
    Lanes,
    alive_nodes,
    cluster_address,
    connected,
    free_resources,
    named_once,
    plan_lanes,
)
from tuner.description import describe_job, is_described, mark_described
from tuner.errors import JobFileError
from tuner.job import Job
from tuner.job_run import JobRun
from tuner.lanes import queue_actor
from tuner.objective import Objective, computable_objectives
from tuner.outbox import outbox_path
from tuner.preflight import check_nodes, job_check
from tuner.records import deliver_leftovers, record_id
from tuner.replicates import plan_replicates
from tuner.results import JOB_TAG, JobResult, find_winners, read_results
from tuner.resume import (
    check_unchanged,
    only_driver,
    read_ended_replicates,
    read_past_trials,
    store_job,
)
from tuner.search import StudySearch
from tuner.stopping import StopRequests
from tuner.stopwatch import Stopwatch
from tuner.storage import absolute_uri, join
from tuner.study import PastTrial, Study, choose_winners
from tuner.tables import evidence_tables, results_tables, time_table
from tuner.tracking import connect
from tuner.tracking_store import default_uri

__all__ = ["check_datasets", "run_job"]


def check_datasets(job: Job) -> dict[str, Dataset]:
    """Open a job's datasets and check that the search can be run on them.

    Raises:
        DatasetError: if one is missing or damaged.
        JobFileError: if one lacks a split, or an objective cannot be computed on valid.
    """
    datasets = {}
    for uri in job.datasets:
        dataset = open_dataset(absolute_uri(uri))
        splits = dataset.manifest.splits
        for split in ("train", "valid", "test"):
            if split not in splits or splits[split].impressions == 0:
                raise JobFileError(
                    f"datasets: {uri} has no {split} split; prepare it again with one "
                    "(nothing is ever searched on test)"
                )
        _check_objectives(job, uri, "valid", splits["valid"])
        if job.search.replicates:
            _check_objectives(job, uri, "test", splits["test"])
        if dataset.name in datasets:
            raise JobFileError(
                f"datasets: {uri} and another are both named {dataset.name!r}; names must differ"
            )
        datasets[dataset.name] = dataset
    return datasets


def _check_objectives(job: Job, uri: str, split: str, summary: SplitSummary) -> None:
    computable = computable_objectives(
        impressions=summary.impressions, clicks=summary.clicks, conversions=summary.conversions
    )
    for objective in job.search.objectives:
        if objective not in computable:
            without = ", or set search.replicates to 0" if split == "test" else ""
            raise JobFileError(
                f"search.objective: {objective} cannot be computed on the {split} split of "
                f"{uri}: {summary.impressions} impressions, {summary.clicks} clicks, "
                f"{summary.conversions} conversions; {_choices(computable)}prepare it with a "
                f"larger {split} split or another split seed{without}"
            )


def _choices(computable: list[Objective]) -> str:
    return f"choose from {', '.join(computable)}, or " if computable else ""


def run_job(
    job: Job, job_file: str, console: Console, *, fresh: bool = False, verbose: bool = False
) -> JobResult:
    """Search every study of a job, choose the winners and evaluate them on test, once.

    A job of this name that an earlier process left unfinished is gone on with: its ended trials
    stand, those without an end run again. A finished one is shown.

    Args:
        job: checked already.
        job_file: the text of the job file, kept with every study.
        console: for the progress and the tables.
        fresh: archive a job of the same name and start anew.
        verbose: show what Ray prints.

    Raises:
        PwiserError: if the job cannot be run as it is written; nothing has been trained then.
        JobFailedError: if it ended without winners.
    """
    stopwatch = Stopwatch()
    datasets = check_datasets(job)
    digests = {name: dataset.digest for name, dataset in datasets.items()}
    storage = absolute_uri(job.storage)
    with (
        only_driver(job, join(storage, job.name)),
        StopRequests() as requests,
        ExitStack() as session,
    ):
        # on a cluster the job's name is taken before anything of it is read
        queue = _start_ray(job, session, verbose=verbose) if cluster_address() else None
        client = connect(job.tracking.uri or default_uri(storage))
        past = _read_past(client, job, digests, storage, fresh=fresh)
        searches = _open_searches(job, datasets, past.trials)
        experiment = past.experiment
        finished = experiment is not None and _is_finished(client, experiment, job, searches, past)
        if experiment is None or not finished:
            console.print(_opening_line(job, searches), highlight=False)
            queue = queue or _start_ray(job, session, verbose=verbose)
            lanes = _check_cluster(job, datasets, str(client.tracking_uri))
            experiment = experiment or _create_experiment(client, job, storage)
            root = join(storage, job.name, experiment.experiment_id)
            store_job(job, digests, root)
            if past.described:
                mark_described(client, experiment.experiment_id, described=False)
            run = JobRun(
                job,
                job_file,
                datasets,
                client,
                experiment.experiment_id,
                root,
                past.ended_replicates,
            )
            run.search_and_test(searches, lanes, queue, requests, console, stopwatch)
        if not finished or past.delivered or not past.described:
            describe_job(client, experiment, console)
        results = read_results(client, experiment)
    console.print(*results_tables(results), *evidence_tables(results))
    console.print(time_table(searches))
    console.print(stopwatch.summary(), highlight=False)
    return results


@dataclass(frozen=True)
class _Past:
    """What earlier processes left of a job; nothing of one that begins.

    Attributes:
        delivered: whether MLflow has got some of it only now.
        described: whether MLflow says what came out of it.
    """

    experiment: Experiment | None = None
    trials: dict[str, list[PastTrial]] = field(default_factory=dict)
    ended_replicates: frozenset[str] = frozenset()
    delivered: bool = False
    described: bool = False


def _start_ray(job: Job, session: ExitStack, *, verbose: bool) -> ray.actor.ActorHandle:
    """Connect to Ray, or start it, and start the job's queue under its name."""
    session.enter_context(connected(verbose=verbose))
    return session.enter_context(named_once(job.name, queue_actor()))


def _check_cluster(job: Job, datasets: dict[str, Dataset], tracking_uri: str) -> Lanes:
    """Fit the lanes; on a cluster of somebody else's, look whether its nodes can do their part."""
    nodes = alive_nodes()
    lanes = plan_lanes(job.resources, nodes, free=free_resources())
    if cluster_address():
        check_nodes(job_check(job, datasets, tracking_uri, lanes), nodes)
    return lanes


def _open_searches(
    job: Job, datasets: dict[str, Dataset], past: dict[str, list[PastTrial]]
) -> list[StudySearch]:
    searches = []
    for name, dataset in datasets.items():
        for model in job.models:
            search = StudySearch(Study(dataset=name, dataset_uri=dataset.uri, model=model), job)
            search.restore(past.get(search.study.name, []))
            searches.append(search)
    return searches


def _read_past(
    client: MlflowClient, job: Job, digests: dict[str, str], storage: str, *, fresh: bool
) -> _Past:
    """Deliver what an earlier process could not, and read what it left, unless all begins anew."""
    experiment = _experiment_of(client, job)
    if experiment is None:
        return _Past()
    experiment_id = experiment.experiment_id
    root = join(storage, job.name, experiment_id)
    delivered = deliver_leftovers(client, experiment_id, outbox_path(root))
    if fresh:
        return _Past()
    trials = read_past_trials(client, experiment_id)
    if trials:
        check_unchanged(job, digests, root)
    return _Past(
        experiment=experiment,
        trials=trials,
        ended_replicates=read_ended_replicates(client, experiment_id),
        delivered=delivered,
        described=is_described(experiment),
    )


def _is_finished(
    client: MlflowClient,
    experiment: Experiment,
    job: Job,
    searches: list[StudySearch],
    past: _Past,
) -> bool:
    """Whether all trials and replicates have ended and every dataset's winner is marked."""
    if not all(search.ended for search in searches):
        return False
    planned = {found.id for found in plan_replicates(searches, job.search.replicates)}
    if not planned <= past.ended_replicates:
        return False
    runs = find_winners(client, experiment.experiment_id)
    marked = {dataset: record_id(run.data.tags) for dataset, run in runs.items()}
    winners = choose_winners(trial for search in searches for trial in search.trials)
    return all(
        dataset in winners and winners[dataset].id == marked.get(dataset)
        for dataset in {search.study.dataset for search in searches}
    )


def _experiment_of(client: MlflowClient, job: Job) -> Experiment | None:
    """The job's experiment, if it has one.

    One that was deleted in the MLflow UI keeps its name, under which nothing can be logged: it is
    archived, and stays deleted.

    Raises:
        JobFileError: if the one of its name is somebody else's.
    """
    found = client.get_experiment_by_name(job.name)
    if found is None:
        return None
    owner = found.tags.get(JOB_TAG)
    if owner != job.name:
        raise JobFileError(
            f"name: the experiment {job.name!r} in the tracking store is not this job's (its tag "
            f"{JOB_TAG} is {'missing' if owner is None else repr(owner)}); choose another name"
        )
    if found.lifecycle_stage == LifecycleStage.ACTIVE:
        return found
    client.restore_experiment(found.experiment_id)
    client.rename_experiment(found.experiment_id, _archive_name(job))
    client.delete_experiment(found.experiment_id)
    return None


def _archive_name(job: Job) -> str:
    return f"{job.name}-archived-{datetime.now(UTC):%Y%m%dT%H%M%S}"


def _create_experiment(client: MlflowClient, job: Job, storage: str) -> Experiment:
    """Create the job's experiment, archiving one of its name.

    Where MLflow runs on a file, artefacts lie in the storage.
    """
    existing = _experiment_of(client, job)
    if existing is not None:
        client.rename_experiment(existing.experiment_id, _archive_name(job))
    on_file = str(client.tracking_uri).startswith("sqlite:")
    experiment_id = client.create_experiment(
        job.name,
        artifact_location=join(storage, "mlflow-artifacts", job.name) if on_file else None,
        tags={JOB_TAG: job.name, "mlflow.experimentKind": "custom_model_development"},
    )
    return client.get_experiment(experiment_id)


def _opening_line(job: Job, searches: list[StudySearch]) -> str:
    num_ended = sum(search.num_ended for search in searches)
    num_trials = sum(search.num_trials for search in searches)
    num_left_out = sum(search.num_left_out for search in searches)
    line = f"job {job.name}: {len(searches)} studies, {num_trials} trials"
    if num_left_out:
        line += f" (search.trials leaves out {num_left_out} of the grid's points)"
    if num_ended:
        line += f", {num_ended} of which have ended already"
    return f"{line}; {'checking the cluster' if cluster_address() else 'starting Ray'}"
