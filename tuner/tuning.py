"""`pwiser tune`: one job, from its file to its winners."""

from datetime import UTC, datetime

from mlflow.tracking import MlflowClient
from rich.console import Console

from datasets import Dataset, open_dataset
from tuner.errors import JobFileError
from tuner.job import Job
from tuner.job_run import JobRun
from tuner.objective import Objective, computable_objectives
from tuner.results import JobResult, find_winners, read_results
from tuner.resume import check_unchanged, only_driver, read_past_trials, store_job
from tuner.search import StudySearch
from tuner.stopwatch import Stopwatch
from tuner.storage import absolute_uri, join, local_path
from tuner.study import Study
from tuner.tables import results_markdown, results_tables, time_table
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
    client = _open_store(job.tracking.uri or default_uri(storage), storage)
    experiment_id = _open_experiment(client, job, storage, fresh=fresh)
    root = join(storage, job.name, experiment_id)
    with only_driver(job, root):
        check_unchanged(job, digests, root)
        store_job(job, digests, root)
        searches = _open_searches(job, datasets, client, experiment_id)
        if not _is_finished(client, job, searches):
            run = JobRun(job, job_file, datasets, client, experiment_id, root)
            run.search_and_test(searches, console, stopwatch, verbose=verbose)
        results = read_results(client, job.name)
        note = results_markdown(results)
        client.set_experiment_tag(experiment_id, "mlflow.note.content", note)
    console.print(*results_tables(results))
    console.print(time_table(searches))
    console.print(stopwatch.summary(), highlight=False)
    return results


def _open_searches(
    job: Job, datasets: dict[str, Dataset], client: MlflowClient, experiment_id: str
) -> list[StudySearch]:
    past = read_past_trials(client, experiment_id)
    searches = []
    for name, dataset in datasets.items():
        for model in job.models:
            search = StudySearch(Study(dataset=name, dataset_uri=dataset.uri, model=model), job)
            search.restore(past.get(search.study.name, []))
            searches.append(search)
    return searches


def _is_finished(client: MlflowClient, job: Job, searches: list[StudySearch]) -> bool:
    """Whether all trials have ended and every dataset has its winner."""
    if not all(search.ended for search in searches):
        return False
    return {search.study.dataset for search in searches} <= find_winners(client, job.name).keys()


def _open_store(tracking_uri: str, storage: str) -> MlflowClient:
    path = local_path(storage)
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
    return connect(tracking_uri)


def _open_experiment(client: MlflowClient, job: Job, storage: str, *, fresh: bool) -> str:
    """Find the job's experiment or create it, its artefacts in the storage if MLflow is a file."""
    existing = client.get_experiment_by_name(job.name)
    if existing is not None and not fresh:
        return str(existing.experiment_id)
    if existing is not None:
        archived = f"{job.name}-archived-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        client.rename_experiment(existing.experiment_id, archived)
    on_file = str(client.tracking_uri).startswith("sqlite:")
    return str(
        client.create_experiment(
            job.name,
            artifact_location=join(storage, "mlflow-artifacts", job.name) if on_file else None,
            tags={"pwiser.job": job.name, "mlflow.experimentKind": "custom_model_development"},
        )
    )
