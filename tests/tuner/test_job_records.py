import socket
from pathlib import Path

import pytest

import tuner.look
from datasets import Dataset
from tuner.errors import JobNotFoundError, TrackingError
from tuner.job import Job
from tuner.job_progress import JobProgress, StudyProgress
from tuner.job_records import ProgressReader, read_progress
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report, Seconds
from tuner.outbox import Outbox
from tuner.records import RecordWriter
from tuner.replicates import Replicate, plan_replicates
from tuner.results import find_experiment, read_job_file
from tuner.search import StudySearch
from tuner.study import Study, Trial, TrialState
from tuner.tracking import Tracker, connect
from tuner.tracking_store import open_existing

JOB_FILE = "name: job\ndatasets: [tiny]\n# ☃\n"


class TrackedJob:
    """A job of two studies whose trials end as a test says, and its tracking store."""

    def __init__(self, uri: str, name: str, directory: Path, dataset: Dataset) -> None:
        self.uri = uri
        self.client = connect(uri)
        content = {
            "name": name,
            "datasets": [dataset.uri],
            "models": ["mmoe", "dnn"],
            "search": {"sampler": "random", "pruner": "median", "trials": 9},
        }
        self.dataset = dataset
        self.job = Job.model_validate(content)
        self.experiment_id = self.client.create_experiment(
            name, artifact_location=str(directory / "artifacts"), tags={"pwiser.job": name}
        )
        self.outbox = directory / "outbox.db"
        self.tracker = self.open_tracker()
        self.studies = []
        for model in self.job.models:
            study = Study(dataset=dataset.name, dataset_uri=dataset.uri, model=model)
            self.studies.append(StudySearch(study, self.job))
            self.tracker.start_study(self.studies[-1], dataset, JOB_FILE, num_lanes=2)
        self.search = JobSearch(self.studies, [self.tracker])

    def open_tracker(self) -> Tracker:
        writer = RecordWriter(self.client, self.experiment_id, Outbox(self.outbox))
        return Tracker(writer, self.job, "/storage/job")

    def next_trial(self) -> Trial:
        trial = self.search.next_trial()
        assert trial is not None
        return trial

    def complete(self, value: float) -> Trial:
        trial = self.next_trial()
        self.search.evaluated(trial, report(1, value))
        self.search.ended(trial, report(2, value, last=True))
        return trial

    def replicate(self, replicate: Replicate) -> None:
        self.tracker.replicate_started(replicate)
        replicate.state = TrialState.COMPLETE
        self.tracker.replicate_ended(replicate)

    def progress(self) -> JobProgress:
        self.tracker.close()
        return read_progress(self.client, self.job.name)


def report(index: int, value: float, *, last: bool = False) -> Report:
    seconds = Seconds(setup=1.0, training=2.0 * index, evaluation=1.0, lane=2.0 * index + 4.0)
    return Report(
        index=index,
        last=last,
        step=10 * index,
        epoch=index / 2,
        metrics={"ctr_auc": value, "ctcvr_auc": value},
        seconds=seconds,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store; every test has a job of its own in it."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def tracked(
    store: str, tmp_path: Path, tiny_dataset: Dataset, request: pytest.FixtureRequest
) -> TrackedJob:
    return TrackedJob(store, request.node.name, tmp_path, tiny_dataset)


def of_model(progress: JobProgress, model: str) -> StudyProgress:
    (found,) = [study for study in progress.studies if study.model == model]
    return found


def test_a_job_that_has_just_begun_has_no_best_and_no_time_left(tracked: TrackedJob) -> None:
    progress = tracked.progress()
    assert [(study.dataset, study.model) for study in progress.studies] == [
        ("tiny", "mmoe"),
        ("tiny", "dnn"),
    ]
    assert progress.studies[0] == StudyProgress(
        dataset="tiny",
        model="mmoe",
        trials=9,
        done=0,
        replicates=0,
        planned_replicates=0,
        running=0,
        pruned=0,
        failed=0,
        best=None,
        best_trial=None,
        time_left_s=None,
    )
    assert (progress.job, progress.trials, progress.done) == (tracked.job.name, 18, 0)
    assert (progress.best, progress.time_left_s) == (None, None)


def test_trials_are_counted_by_what_became_of_them(tracked: TrackedJob) -> None:
    for _ in range(6):
        tracked.complete(0.7)
    pruned = tracked.next_trial()
    assert tracked.search.evaluated(pruned, report(1, 0.1))
    tracked.search.ended(tracked.next_trial(), Ended(kind="failed", reason="out of memory"))
    tracked.next_trial()
    study = of_model(tracked.progress(), "mmoe")
    assert (study.done, study.running, study.pruned, study.failed) == (8, 1, 1, 1)


def test_the_best_may_be_of_a_trial_that_still_runs(tracked: TrackedJob) -> None:
    tracked.complete(0.7)
    tracked.search.evaluated(tracked.next_trial(), report(1, 0.8))
    progress = tracked.progress()
    study = of_model(progress, "mmoe")
    assert (study.best, study.best_trial, progress.best) == (0.8, 1, 0.8)


def test_of_equal_trials_the_earlier_is_the_best(tracked: TrackedJob) -> None:
    for value in (0.6, 0.7, 0.7):
        tracked.complete(value)
    study = of_model(tracked.progress(), "mmoe")
    assert (study.best, study.best_trial) == (0.7, 1)


def test_a_failed_trial_is_never_the_best(tracked: TrackedJob) -> None:
    tracked.complete(0.6)
    failed = tracked.next_trial()
    tracked.search.evaluated(failed, report(1, 0.9))
    tracked.search.ended(failed, Ended(kind="failed", reason="out of memory"))
    study = of_model(tracked.progress(), "mmoe")
    assert (study.best, study.best_trial) == (0.6, 0)


def test_the_time_left_is_at_the_pace_of_the_trials_so_far(tracked: TrackedJob) -> None:
    """8 seconds of a lane each, 2 lanes; the second study has no trial yet, so that the job's time
    is unknown."""
    for _ in range(3):
        tracked.complete(0.7)
    progress = tracked.progress()
    assert of_model(progress, "mmoe").time_left_s == pytest.approx(6 * 8 / 2)
    assert of_model(progress, "dnn").time_left_s is None
    assert progress.time_left_s is None


def test_one_trial_that_is_left_takes_one_lane(tracked: TrackedJob) -> None:
    for _ in range(8):
        tracked.complete(0.7)
    assert of_model(tracked.progress(), "mmoe").time_left_s == pytest.approx(8)


def test_a_job_that_is_searched_has_replicates_left_until_all_have_ended(
    tracked: TrackedJob,
) -> None:
    for _ in range(18):
        tracked.complete(0.7)
    replicates = plan_replicates(tracked.studies, tracked.job.search.replicates)
    assert len(replicates) == 10  # of each study's baseline, which is its winner
    for replicate in replicates[:7]:
        tracked.replicate(replicate)
    progress = tracked.progress()
    assert [(study.done, study.running) for study in progress.studies] == [(9, 0), (9, 0)]
    assert [(study.replicates, study.time_left_s) for study in progress.studies] == [
        (5, 0.0),
        (2, None),
    ]
    assert (progress.done, progress.time_left_s) == (18, None)
    assert progress.left == "7 of 10 replicates done"


def test_a_job_that_is_done_has_no_time_left(tracked: TrackedJob) -> None:
    for _ in range(18):
        tracked.complete(0.7)
    for replicate in plan_replicates(tracked.studies, tracked.job.search.replicates):
        tracked.replicate(replicate)
    progress = tracked.progress()
    assert [study.time_left_s for study in progress.studies] == [0.0, 0.0]
    assert (progress.replicates, progress.planned_replicates) == (10, 10)
    assert (progress.done, progress.time_left_s, progress.left) == (18, 0.0, "00:00 left")


def test_trials_that_failed_at_once_say_nothing_of_the_time_left(tracked: TrackedJob) -> None:
    tracked.search.ended(tracked.next_trial(), Ended(kind="failed", reason="no such column"))
    study = of_model(tracked.progress(), "mmoe")
    assert (study.done, study.failed, study.time_left_s) == (1, 1, None)


def test_stopped_trials_are_neither_done_nor_running_until_they_run_again(
    tracked: TrackedJob,
) -> None:
    tracked.complete(0.7)
    stopped = tracked.next_trial()
    tracked.search.evaluated(stopped, report(1, 0.8))
    tracked.search.close()
    study = of_model(tracked.progress(), "mmoe")
    assert (study.done, study.running, study.best) == (1, 0, 0.8)

    again = tracked.open_tracker()
    again.start_study(tracked.studies[0], tracked.dataset, JOB_FILE, num_lanes=2)
    again.trial_started(stopped)
    again.close()
    study = of_model(read_progress(tracked.client, tracked.job.name), "mmoe")
    assert (study.done, study.running) == (1, 1)


def test_an_unknown_job_is_told(tracked: TrackedJob) -> None:
    tracked.tracker.close()
    with pytest.raises(JobNotFoundError) as caught:
        read_progress(tracked.client, "jib")
    told = str(caught.value)
    assert told.startswith("job 'jib': not in the tracking store; it holds ")
    assert tracked.job.name in told.rpartition(" holds ")[2].split(", ")


def test_the_job_file_is_read_back_as_it_was(tracked: TrackedJob) -> None:
    tracked.tracker.close()
    client = open_existing(tracked.uri)
    assert read_job_file(client, find_experiment(client, tracked.job.name)) == JOB_FILE


def test_a_job_file_that_is_out_of_reach_is_told(tracked: TrackedJob, tmp_path: Path) -> None:
    tracked.tracker.close()
    (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
    with pytest.raises(JobNotFoundError) as caught:
        read_job_file(tracked.client, find_experiment(tracked.client, tracked.job.name))
    assert str(caught.value) == (
        f"job {tracked.job.name!r}: its job file is not in the tracking store; submit it"
    )


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(TrackingError) as caught:
        open_existing(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert str(caught.value) == (
        f"{tmp_path / 'mlflow.db'}: no tracking store on this machine; pwiser tune makes one here, "
        "that of a job elsewhere is named by --tracking or MLFLOW_TRACKING_URI"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_a_record_is_no_fault_of_its_store(tracked: TrackedJob) -> None:
    tracked.tracker.close()
    reader = ProgressReader()
    assert reader.read(tracked.uri, "jib") is None
    found = reader.read(tracked.uri, tracked.job.name)
    assert found is not None
    assert found.job == tracked.job.name


def test_a_store_that_never_answers_is_asked_once_for_all_of_its_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuner.look, "LOOK_TIMEOUT_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    reader = ProgressReader()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for job in ("a", "b"):
            with pytest.raises(TrackingError) as caught:
                reader.read(uri, job)
            assert str(caught.value) == (
                f"tracking.uri {uri}: does not answer; name the store as it is seen from here by "
                "--tracking or MLFLOW_TRACKING_URI"
            )
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()
