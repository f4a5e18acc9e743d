"""Ray Tune's side of a trial on a real Ray; the test itself is the lane."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import tune

from tuner.cluster import connected
from tuner.job import Job
from tuner.job_search import MAX_RESTARTS, JobSearch
from tuner.lanes import queue_actor
from tuner.messages import Generation, Report, TrialTask
from tuner.search import StudySearch
from tuner.study import Study, Trial, TrialState
from tuner.trial import LaneTrial
from tuner.trial_queue import CLOSED
from tuner.tune_adapters import TUNE_ACTOR_DIED, JobScheduler, JobSearcher, keep_credentials

SECRET = "a-secret-that-no-log-may-hold"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connected():
        yield


def make_task(trial: Trial) -> TrialTask:
    return TrialTask(
        id=trial.id,
        dataset=trial.study.dataset_uri,
        configuration={},
        objectives=trial.objectives,
        checkpoint="/nowhere",
        state="/nowhere-state",
    )


def evaluation(index: int, *, last: bool) -> Report:
    metrics = {"ctr_auc": 0.5, "ctcvr_auc": 0.5}
    return Report(index=index, last=last, step=index, epoch=index, metrics=metrics)


def kill_tune_actor() -> None:
    """Kill it once it waits in `train`: Ray names the process only then."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] == ["ray::ResourceTrainable.train"]:
                    os.kill(process.pid, signal.SIGKILL)
                    return
        time.sleep(0.05)


def serve(queue: ray.actor.ActorHandle, told: list[tuple[str, bool]], num_deaths: int) -> None:
    """Be a lane; Tune actors die while they wait for the first so many tasks' evaluation."""
    lane = ray.get(queue.join.remote("lane"))
    while (task := ray.get(queue.take.remote(lane, timeout_s=60))) != CLOSED:
        if task is None:
            continue
        dies = len(told) < num_deaths
        if dies:
            kill_tune_actor()
        told.append((task.id, ray.get(queue.report.remote(lane, evaluation(1, last=not dies)))))
        ray.get(queue.finish.remote(lane))


def serve_in_step(queue: ray.actor.ActorHandle, told: list[str]) -> None:
    """Be two lanes: a Tune actor dies, and the other trial ends before a new one can be up."""
    lanes = [ray.get(queue.join.remote(name)) for name in ("one", "two")]
    for lane in lanes:
        assert ray.get(queue.take.remote(lane, timeout_s=60)) is not None
    kill_tune_actor()
    time.sleep(0.5)
    for lane in lanes:
        ray.get(queue.report.remote(lane, evaluation(1, last=True)))
        ray.get(queue.finish.remote(lane))
    threads = [threading.Thread(target=serve_slowly, args=(queue, lane, told)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve_slowly(queue: ray.actor.ActorHandle, lane: Generation, told: list[str]) -> None:
    """Be a lane whose trials last until every Tune actor that has been started is up."""
    while (task := ray.get(queue.take.remote(lane, timeout_s=60))) != CLOSED:
        if task is None:
            continue
        told.append(task.id)
        for index in range(1, 10):
            time.sleep(0.4)
            if not ray.get(queue.report.remote(lane, evaluation(index, last=index == 9))):
                break
        ray.get(queue.finish.remote(lane))


def make_search(num_trials: int) -> JobSearch:
    settings = {"sampler": "random", "pruner": "none", "trials": num_trials}
    job = Job.model_validate(
        {"name": "job", "datasets": ["us"], "models": ["dnn"], "search": settings}
    )
    study = Study(dataset="us", dataset_uri="/data/us", model="dnn")
    return JobSearch([StudySearch(study, job)], [])


def run_tune(search: JobSearch, queue: ray.actor.ActorHandle, storage: Path, lanes: int) -> None:
    """Run the search as a job does."""

    def cancel(trial: Trial) -> bool:
        ray.get(queue.cancel.remote(trial.id))
        return True

    searcher = JobSearcher(search, make_task, cancel)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(LaneTrial, queue=queue), {"memory": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=JobScheduler(searcher, search),
            num_samples=-1,
            max_concurrent_trials=lanes,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    ray.get(queue.close.remote())


@pytest.mark.parametrize(
    ("num_deaths", "failure"), [(1, None), (MAX_RESTARTS + 1, TUNE_ACTOR_DIED)]
)
def test_a_trial_whose_tune_actor_dies_is_proposed_again_a_few_times(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_deaths: int,
    failure: str | None,
) -> None:
    search = make_search(3)
    queue, told = queue_actor().remote(), list[tuple[str, bool]]()
    lane = threading.Thread(target=serve, args=(queue, told, num_deaths), daemon=True)
    lane.start()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    keep_credentials()
    run_tune(search, queue, tmp_path, lanes=1)
    lane.join()
    first, *others = search.trials
    assert (first.state, first.failure) == (
        TrialState.COMPLETE if failure is None else TrialState.FAILED,
        failure,
    )
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    assert told[:num_deaths] == [(first.id, False)] * num_deaths  # each is told to stop
    assert [name for name, _ in told].count(first.id) == num_deaths + (failure is None)
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    assert "runtime env" in (logs / "runtime_env_agent.log").read_text().lower()
    assert [path for path in logs.rglob("*") if path.is_file() and SECRET in path.read_text()] == []


@pytest.mark.timeout(120)
def test_a_tune_actor_that_is_started_in_vain_takes_no_trial_from_another(
    ray_session: None, tmp_path: Path
) -> None:
    search = make_search(5)
    queue, told = queue_actor().remote(), list[str]()
    lanes = threading.Thread(target=serve_in_step, args=(queue, told), daemon=True)
    lanes.start()
    run_tune(search, queue, tmp_path, lanes=2)
    lanes.join()
    assert [trial.state for trial in search.trials] == [TrialState.COMPLETE] * 5
    assert len(told) == len(set(told)) == 4  # all but the one that ended beside the dead actor
