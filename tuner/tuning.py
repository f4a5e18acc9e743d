"""`pwiser tune`: one job, from its file to its winners."""

from datetime import UTC, datetime

import ray
from mlflow.tracking import MlflowClient
from ray import tune
from rich.console import Console

from datasets import Dataset, open_dataset
from tuner.checkpoints import CheckpointKeeper
from tuner.cluster import Lanes, connected, plan_lanes
from tuner.errors import JobFailedError, JobFileError, JobInterruptedError
from tuner.export import ENCODER_DIRECTORY
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.lanes import open_lanes
from tuner.messages import Ended, TestTask, TrialTask
from tuner.objective import computable_objectives
from tuner.progress import Progress
from tuner.results import JobResult, read_results
from tuner.search import StudySearch
from tuner.stopping import StopRequests
from tuner.stopwatch import Stopwatch
from tuner.storage import absolute_uri, delete, join, local_path
from tuner.study import Study, Trial, TrialState, choose_winner
from tuner.tables import results_markdown, results_tables, time_table
from tuner.tracking import Tracker, connect
from tuner.tracking_store import default_uri
from tuner.trial import LaneTrial
from tuner.trial_queue import TrialQueue
from tuner.tune_adapters import JobScheduler, JobSearcher

__all__ = ["check_datasets", "run_job"]


RAY_DIRECTORY = "ray"
TRIAL_RESOURCES = {"memory": 1}  # a byte: Tune refuses none, and a share of a CPU can starve lanes


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
                    f"{valid.conversions} conversions; choose from "
                    f"{', '.join(computable) or 'none'}, or prepare it with a larger valid split"
                )
        datasets[dataset.name] = dataset
    return datasets


def run_job(
    job: Job, job_file: str, console: Console, *, fresh: bool = False, verbose: bool = False
) -> JobResult:
    """Search every study of a job, choose the winners and evaluate them on test, once.

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
    storage = absolute_uri(job.storage)
    tracking_uri = job.tracking.uri or default_uri(storage)
    num_studies = len(datasets) * len(job.models)
    console.print(
        f"job {job.name}: {num_studies} studies of {job.search.trials} trials, starting Ray",
        highlight=False,
    )
    with connected(verbose=verbose):
        resources = ray.cluster_resources()
        lanes = plan_lanes(
            job.resources, cpus=resources.get("CPU", 0), gpus=resources.get("GPU", 0)
        )
        client = _open_store(tracking_uri, storage)
        experiment_id = _create_experiment(client, job, storage, fresh=fresh)
        root = join(storage, job.name, experiment_id)
        tracker = Tracker(client, experiment_id, job, root)
        searches = _start_studies(job, job_file, datasets, root, tracker)
        progress = Progress(console, searches, lanes.num_lanes)
        keeper = CheckpointKeeper(root, job.keep_checkpoints)
        search = JobSearch(searches, [tracker, keeper, progress, stopwatch])
        try:
            _search_and_test(job, lanes, search, root, tracker, progress)
        finally:
            search.close()
            tracker.close()
            delete(join(root, RAY_DIRECTORY))
    results = read_results(client, job.name)
    client.set_experiment_tag(experiment_id, "mlflow.note.content", results_markdown(results))
    console.print(*results_tables(results))
    console.print(time_table(searches))
    console.print(stopwatch.summary(lanes.num_lanes), highlight=False)
    return results


def _start_studies(
    job: Job, job_file: str, datasets: dict[str, Dataset], root: str, tracker: Tracker
) -> list[StudySearch]:
    searches = []
    for name, dataset in datasets.items():
        dataset.encoder().save(join(root, name, ENCODER_DIRECTORY))
        for model in job.models:
            study = Study(dataset=name, dataset_uri=dataset.uri, model=model)
            tracker.start_study(study, dataset, job_file)
            searches.append(StudySearch(study, job))
    return searches


def _search_and_test(
    job: Job, lanes: Lanes, search: JobSearch, root: str, tracker: Tracker, progress: Progress
) -> None:
    queue = ray.remote(num_cpus=0)(TrialQueue).remote()

    def stop(reason: str) -> None:
        search.stop(reason)
        ray.get(queue.cancel_all.remote(reason))

    storage_path = join(root, RAY_DIRECTORY)
    with (
        StopRequests(stop, job.budget.hours) as requests,
        open_lanes(
            lanes, queue, job=job.name, storage_path=storage_path, on_all_lost=requests.fail
        ),
    ):
        with progress:
            _run_tune(search, queue, root, lanes.num_lanes)
        search.close()
        if requests.interrupted:
            raise JobInterruptedError(_interrupted_message(job, search))
        if requests.failure is not None:
            raise JobFailedError(f"job {job.name!r}: no lane is left: {requests.failure}")
        _evaluate_winners(search, queue, root, tracker)


def _run_tune(search: JobSearch, queue: ray.actor.ActorHandle, root: str, num_lanes: int) -> None:
    def make_task(trial: Trial) -> TrialTask:
        return TrialTask(
            id=trial.id,
            dataset=trial.study.dataset_uri,
            configuration=trial.configuration.model_dump(mode="json"),
            objectives=trial.objectives,
            checkpoint=join(root, trial.directory),
        )

    searcher = JobSearcher(search, make_task)
    trainable = tune.with_resources(tune.with_parameters(LaneTrial, queue=queue), TRIAL_RESOURCES)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=JobScheduler(searcher, search),
            num_samples=-1,
            max_concurrent_trials=num_lanes,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=join(root, RAY_DIRECTORY),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()


def _evaluate_winners(
    search: JobSearch, queue: ray.actor.ActorHandle, root: str, tracker: Tracker
) -> None:
    for dataset in dict.fromkeys(found.study.dataset for found in search.searches):
        trials = [trial for trial in search.trials if trial.study.dataset == dataset]
        winner = choose_winner(trials)
        if winner is None:
            reasons = {trial.failure or str(trial.state) for trial in trials}
            raise JobFailedError(
                f"{dataset}: no trial ended well ({'; '.join(sorted(reasons)) or 'none ran'})"
            )
        baseline = next(trial for trial in trials if trial.study == winner.study and trial.baseline)
        for trial in (winner,) if winner is baseline else (winner, baseline):
            trial.test_metrics = _evaluate_test(trial, queue, root)
            tracker.log_test(trial)
        tracker.log_winner(winner, baseline)


def _evaluate_test(
    trial: Trial, queue: ray.actor.ActorHandle, root: str
) -> dict[str, float | None]:
    task = TestTask(
        id=f"test/{trial.id}",
        dataset=trial.study.dataset_uri,
        checkpoint=join(root, trial.directory),
    )
    ray.get(queue.submit.remote(task))
    message = ray.get(queue.next_message.remote(task.id))
    if isinstance(message, Ended):
        raise JobFailedError(f"{trial.id}: test evaluation {message.kind}: {message.reason}")
    metrics: dict[str, float | None] = message.metrics
    return metrics


def _open_store(tracking_uri: str, storage: str) -> MlflowClient:
    path = local_path(storage)
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
    return connect(tracking_uri)


def _create_experiment(client: MlflowClient, job: Job, storage: str, *, fresh: bool) -> str:
    """Create the job's experiment; its artefacts lie in the storage where MLflow runs on a file.

    Raises:
        JobFileError: if there is one of that name, and it is not to be archived.
    """
    existing = client.get_experiment_by_name(job.name)
    if existing is not None and not fresh:
        raise JobFileError(
            f"name: job {job.name!r} is in the tracking store already; choose another name, "
            "or archive it with --fresh"
        )
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


def _interrupted_message(job: Job, search: JobSearch) -> str:
    num_done = sum(trial.state is TrialState.COMPLETE for trial in search.trials)
    return (
        f"job {job.name!r} was interrupted with {num_done} trials complete; they are in MLflow. "
        "Start it anew with --fresh"
    )
