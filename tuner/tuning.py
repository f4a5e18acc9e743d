"""`pwiser tune`: one job, from its file to its winners."""

from contextlib import ExitStack
from datetime import UTC, datetime

import ray
from mlflow.entities import Experiment
from mlflow.tracking import MlflowClient
from rich.console import Console

from datasets import Dataset, open_dataset
from tuner.cluster import (
    Lanes,
    alive_nodes,
    cluster_address,
    connected,
    free_resources,
    named_once,
    plan_lanes,
    resource_limits,
)
from tuner.errors import JobFileError
from tuner.job import Job
from tuner.job_run import JobRun
from tuner.lanes import queue_actor
from tuner.objective import Objective, computable_objectives
from tuner.preflight import check_nodes, job_check
from tuner.replicates import plan_replicates
from tuner.results import JobResult, find_winners, read_results
from tuner.resume import (
    check_unchanged,
    only_driver,
    read_past_trials,
    read_replicate_runs,
    store_job,
)
from tuner.search import StudySearch
from tuner.stopping import StopRequests
from tuner.stopwatch import Stopwatch
from tuner.storage import absolute_uri, join
from tuner.study import PastTrial, Study
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
        valid = splits["valid"]
        computable = computable_objectives(
            impressions=valid.impressions, clicks=valid.clicks, conversions=valid.conversions
        )
        for objective in job.search.objectives:
            if objective not in computable:
                raise JobFileError(
                    f"search.objective: {objective} cannot be computed on the valid split of "
                    f"{uri}: {valid.impressions} impressions, {valid.clicks} clicks, "
                    f"{valid.conversions} conversions; {_choices(computable)}prepare it with a "
                    "larger valid split or another split seed"
                )
        if dataset.name in datasets:
            raise JobFileError(
                f"datasets: {uri} and another are both named {dataset.name!r}; names must differ"
            )
        datasets[dataset.name] = dataset
    return datasets


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
        experiment = None if fresh else client.get_experiment_by_name(job.name)
        past = {} if experiment is None else read_past_trials(client, experiment.experiment_id)
        if experiment is not None and past:
            check_unchanged(job, digests, join(storage, job.name, experiment.experiment_id))
        searches = _open_searches(job, datasets, past)
        if experiment is None or not _is_finished(client, experiment, job, searches):
            console.print(_opening_line(job, searches), highlight=False)
            queue = queue or _start_ray(job, session, verbose=verbose)
            lanes = _check_cluster(job, datasets, str(client.tracking_uri))
            if experiment is None:
                experiment = _create_experiment(client, job, storage)
            root = join(storage, job.name, experiment.experiment_id)
            store_job(job, digests, root)
            run = JobRun(job, job_file, datasets, client, experiment.experiment_id, root)
            run.search_and_test(searches, lanes, queue, requests, console, stopwatch)
        results = read_results(client, job.name)
    console.print(*results_tables(results), *evidence_tables(results))
    console.print(time_table(searches))
    console.print(stopwatch.summary(), highlight=False)
    return results


def _start_ray(job: Job, session: ExitStack, *, verbose: bool) -> ray.actor.ActorHandle:
    """Connect to Ray, or start it, and start the job's queue under its name."""
    session.enter_context(connected(verbose=verbose))
    return session.enter_context(named_once(job.name, queue_actor()))


def _check_cluster(job: Job, datasets: dict[str, Dataset], tracking_uri: str) -> Lanes:
    """Fit the lanes; on a cluster of somebody else's, look whether its nodes can do their part."""
    nodes = alive_nodes()
    lanes = plan_lanes(job.resources, nodes, free=free_resources(), limits=resource_limits())
    if cluster_address():
        check_nodes(job_check(job, datasets, tracking_uri), nodes)
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


def _is_finished(
    client: MlflowClient, experiment: Experiment, job: Job, searches: list[StudySearch]
) -> bool:
    """Whether all trials and replicates have ended and every dataset has its winner."""
    if not all(search.ended for search in searches):
        return False
    _, ended = read_replicate_runs(client, experiment.experiment_id)
    if not {found.id for found in plan_replicates(searches, job.search.replicates)} <= ended:
        return False
    return {search.study.dataset for search in searches} <= find_winners(client, job.name).keys()


def _create_experiment(client: MlflowClient, job: Job, storage: str) -> Experiment:
    """Create the job's experiment, archiving one of its name.

    Where MLflow runs on a file, artefacts lie in the storage.
    """
    existing = client.get_experiment_by_name(job.name)
    if existing is not None:
        archived = f"{job.name}-archived-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        client.rename_experiment(existing.experiment_id, archived)
    on_file = str(client.tracking_uri).startswith("sqlite:")
    experiment_id = client.create_experiment(
        job.name,
        artifact_location=join(storage, "mlflow-artifacts", job.name) if on_file else None,
        tags={"pwiser.job": job.name, "mlflow.experimentKind": "custom_model_development"},
    )
    return client.get_experiment(experiment_id)


def _opening_line(job: Job, searches: list[StudySearch]) -> str:
    num_ended = sum(trial.state.ended for search in searches for trial in search.trials)
    num_trials = sum(search.num_trials for search in searches)
    line = f"job {job.name}: {len(searches)} studies, {num_trials} trials"
    if num_ended:
        line += f", {num_ended} of which have ended already"
    return f"{line}; {'checking the cluster' if cluster_address() else 'starting Ray'}"
