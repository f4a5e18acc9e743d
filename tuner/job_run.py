"""One process's run of a job on Ray: lanes, Tune's search over them, winners' test, replicates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ray
from mlflow.tracking import MlflowClient
from ray import tune
from ray.exceptions import RayActorError
from rich.console import Console

from datasets import Dataset
from tuner.checkpoints import CheckpointKeeper
from tuner.cluster import Lanes
from tuner.errors import JobFailedError, JobInterruptedError, TrackingError
from tuner.export import ENCODER_DIRECTORY, save_encoder
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.lane_watch import watched_lanes
from tuner.lanes import QUEUE_DIED, open_lanes
from tuner.messages import Ended, Reading, TestTask, TrialTask
from tuner.outbox import Outbox, outbox_path
from tuner.progress import Progress, ReplicateProgress
from tuner.records import RecordWriter, record_id
from tuner.replicate_run import ReplicateRun
from tuner.replicates import plan_replicates
from tuner.results import winners_of
from tuner.search import StudySearch
from tuner.stopping import SECONDS_PER_HOUR, StopRequests
from tuner.stopwatch import Stopwatch
from tuner.storage import discard, join
from tuner.study import Trial, choose_winners
from tuner.tracking import Tracker
from tuner.trial import LaneTrial
from tuner.tune_adapters import JobScheduler, JobSearcher, keep_credentials

__all__ = ["JobRun"]

RAY_DIRECTORY = ".ray"
MIB = 1024**2
SECONDS_PER_MINUTE = 60
TRIAL_RESOURCES = {"memory": 1}  # a byte: Tune refuses none, and a share of a CPU can starve lanes


@dataclass(frozen=True)
class _Told:
    """Who hears of trials and of replicates alike."""

    tracker: Tracker
    keeper: CheckpointKeeper
    progress: Progress


class JobRun:
    """Runs what is left of a job.

    Args:
        job: the job.
        job_file: its text, kept with every study.
        datasets: by name.
        client: of the tracking store.
        experiment_id: of the job.
        root: URI below which the job's checkpoints lie.
        ended_replicates: ids of those that an earlier process has brought to their end.
    """

    def __init__(
        self,
        job: Job,
        job_file: str,
        datasets: dict[str, Dataset],
        client: MlflowClient,
        experiment_id: str,
        root: str,
        ended_replicates: frozenset[str],
    ) -> None:
        self._job = job
        self._job_file = job_file
        self._datasets = datasets
        self._client = client
        self._experiment_id = experiment_id
        self._root = root
        self._ended_replicates = ended_replicates
        self._hang_s = job.budget.hang_minutes * SECONDS_PER_MINUTE
        self._reading = Reading(mode=job.data.mode, buffer_bytes=job.data.buffer_mib * MIB)

    def search_and_test(
        self,
        searches: list[StudySearch],
        lanes: Lanes,
        queue: ray.actor.ActorHandle,
        requests: StopRequests,
        console: Console,
        stopwatch: Stopwatch,
    ) -> None:
        """Run every trial that has no end, choose and test the winners, weigh them by replicates.

        Raises:
            JobInterruptedError: if a signal came; every run is closed, and the job can be resumed.
            JobFailedError: if no lane is left, or a dataset has no winner.
        """
        for name, dataset in self._datasets.items():
            save_encoder(dataset, join(self._root, name, ENCODER_DIRECTORY))
        keeper = CheckpointKeeper(self._root, self._job.keep_checkpoints)
        marked = winners_of(self._client, self._experiment_id)
        keeper.restore(
            (trial for search in searches for trial in search.trials),
            marked=filter(None, (record_id(run.data.tags) for run in marked)),
        )
        with self._open_tracker(requests, console) as tracker:
            for found in searches:
                dataset = self._datasets[found.study.dataset]
                tracker.start_study(found, dataset, self._job_file, lanes.num_lanes)
            told = _Told(tracker, keeper, Progress(console, searches, lanes.num_lanes))
            search = JobSearch(searches, [tracker, keeper, told.progress, stopwatch])
            try:
                winners = self._search_on_lanes(lanes, queue, search, requests, told, console)
            except RayActorError as error:
                raise JobFailedError(
                    f"job {self._job.name!r}: {QUEUE_DIED}; the same command goes on with it"
                ) from error
            finally:
                search.close()
                discard(join(self._root, RAY_DIRECTORY))
        for winner in winners:
            keeper.winner_marked(winner)

    @contextmanager
    def _open_tracker(self, requests: StopRequests, console: Console) -> Iterator[Tracker]:
        """Open a tracker, and wait in the end until all is written.

        Raises:
            TrackingError: if it cannot be. An error that ends the job all the same goes before it.
        """
        outbox = Outbox(outbox_path(self._root))
        writer = RecordWriter(self._client, self._experiment_id, outbox, on_refused=requests.fail)
        tracker = Tracker(writer, self._job, self._root)
        try:
            yield tracker
        except BaseException:
            try:
                tracker.close()
            except TrackingError as error:
                if str(error) != requests.failure:
                    console.print(error, soft_wrap=True, highlight=False, markup=False)
            raise
        tracker.close()

    def _search_on_lanes(
        self,
        lanes: Lanes,
        queue: ray.actor.ActorHandle,
        search: JobSearch,
        requests: StopRequests,
        told: "_Told",
        console: Console,
    ) -> list[Trial]:
        if requests.interrupted:
            raise JobInterruptedError(_interrupted_line(self._job, search))

        def stop(reason: str) -> None:
            search.stop(reason)
            with suppress(RayActorError):  # that it died is told already
                ray.get(queue.cancel_all.remote(reason))

        def lose(reason: str, num_left: int) -> None:
            if num_left:
                line = f"lanes are given up, {num_left} are left: {reason}"
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            else:
                requests.fail(f"no lane is left: {reason}")

        with open_lanes(
            lanes,
            queue,
            job=self._job.name,
            storage_path=join(self._root, RAY_DIRECTORY),
            on_lost=lose,
        ):
            begun = time.monotonic()
            with (
                requests.passed_to(stop, self._job.budget.hours),
                watched_lanes(lanes, queue, console),
                told.progress,
            ):
                self._run_tune(search, queue, lanes.num_lanes, requests)
            search.close()
            self._check_requests(search, requests)
            with requests.passed_to(stop):
                try:
                    winners = self._test_winners(search, queue, told.tracker)
                except JobFailedError:
                    self._check_requests(search, requests)
                    raise
            hours_left = self._hours_left(begun)
            with requests.passed_to(stop, hours_left):
                num_left = self._replicate(search, queue, lanes.num_lanes, told, console)
            self._check_requests(search, requests)
            if search.stop_reason is not None:
                trials_left = sum(one.num_trials - one.num_ended for one in search.searches)
                console.print(
                    f"{search.stop_reason}: {trials_left} trials and {num_left} replicates are "
                    "left; the same command goes on with them",
                    soft_wrap=True,
                    highlight=False,
                )
            return winners

    def _hours_left(self, begun: float) -> float | None:
        hours = self._job.budget.hours
        return None if hours is None else hours - (time.monotonic() - begun) / SECONDS_PER_HOUR

    def _replicate(
        self,
        search: JobSearch,
        queue: ray.actor.ActorHandle,
        num_lanes: int,
        told: "_Told",
        console: Console,
    ) -> int:
        """Repeat winners for the evidence, as far as the budget allows; count what is left."""
        planned = plan_replicates(search.searches, self._job.search.replicates)
        missing = [one for one in planned if one.id not in self._ended_replicates]
        told.keeper.remove_replicates_but(missing)
        if missing and search.stop_reason is None:
            with ReplicateProgress(console, len(missing)) as progress:
                run = ReplicateRun(
                    queue,
                    trial_task=self._make_task,
                    test_task=self._make_test,
                    observers=[told.tracker, told.keeper, progress],
                )
                run.run(missing, num_lanes)
        return sum(not replicate.state.final for replicate in missing)

    def _check_requests(self, search: JobSearch, requests: StopRequests) -> None:
        if requests.interrupted:
            raise JobInterruptedError(_interrupted_line(self._job, search))
        if requests.failure is not None:
            raise JobFailedError(
                f"job {self._job.name!r}: {requests.failure}; the same command goes on with it"
            )

    def _run_tune(
        self,
        search: JobSearch,
        queue: ray.actor.ActorHandle,
        num_lanes: int,
        requests: StopRequests,
    ) -> None:
        if search.stop_reason is not None or all(found.ended for found in search.searches):
            return

        def cancel(trial: Trial) -> bool:
            try:
                ray.get(queue.cancel.remote(trial.id))
            except RayActorError:
                search.stop(QUEUE_DIED)
                requests.fail(QUEUE_DIED)
                return False
            return True

        searcher = JobSearcher(search, self._make_task, cancel)
        trainable = tune.with_resources(
            tune.with_parameters(LaneTrial, queue=queue), TRIAL_RESOURCES
        )
        keep_credentials()
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
                storage_path=join(self._root, RAY_DIRECTORY),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()

    def _make_task(self, trial: Trial) -> TrialTask:
        hours = self._job.budget.trial_hours
        return TrialTask(
            id=trial.id,
            dataset=trial.study.dataset_uri,
            reading=self._reading,
            configuration=trial.configuration.model_dump(mode="json"),
            objectives=trial.objectives,
            checkpoint=join(self._root, trial.directory),
            state=join(self._root, trial.state_directory),
            limit_s=None if hours is None else hours * SECONDS_PER_HOUR,
            hang_s=self._hang_s,
        )

    def _test_winners(
        self, search: JobSearch, queue: ray.actor.ActorHandle, tracker: Tracker
    ) -> list[Trial]:
        """Test and mark every dataset's winner, then complain of those that have none."""
        winners = choose_winners(search.trials)
        missing = []
        for dataset in self._datasets:
            trials = [trial for trial in search.trials if trial.study.dataset == dataset]
            winner = winners.get(dataset)
            if winner is None:
                reasons = {trial.failure or str(trial.state) for trial in trials} or {"none ran"}
                missing.append(f"{dataset}: no trial ended well ({'; '.join(sorted(reasons))})")
                continue
            baseline = next(
                trial for trial in trials if trial.study == winner.study and trial.baseline
            )
            for trial in (winner,) if winner is baseline else (winner, baseline):
                if trial.usable:
                    trial.test_metrics = self._test(trial, queue)
                    tracker.log_test(trial)
            tracker.log_winner(winner, baseline)
        if missing:
            raise JobFailedError("; ".join(missing))
        return list(winners.values())

    def _make_test(self, trial: Trial) -> TestTask:
        return TestTask(
            id=f"test/{trial.id}",
            dataset=trial.study.dataset_uri,
            reading=self._reading,
            checkpoint=join(self._root, trial.directory),
            hang_s=self._hang_s,
        )

    def _test(self, trial: Trial, queue: ray.actor.ActorHandle) -> dict[str, float | None]:
        task = self._make_test(trial)
        ray.get(queue.submit.remote(task))
        message = ray.get(queue.next_message.remote(task.id))
        if isinstance(message, Ended):
            raise JobFailedError(f"{trial.id}: test evaluation {message.kind}: {message.reason}")
        metrics: dict[str, float | None] = message.metrics
        return metrics


def _interrupted_line(job: Job, search: JobSearch) -> str:
    num_ended = sum(found.num_ended for found in search.searches)
    return (
        f"job {job.name!r} was interrupted after {num_ended} trials; "
        "the same command goes on with it, --fresh starts anew"
    )
