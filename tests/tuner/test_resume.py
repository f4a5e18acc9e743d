import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from datasets import Dataset
from tuner.errors import JobFileError, StorageError
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report, Seconds
from tuner.outbox import Outbox
from tuner.records import RecordWriter
from tuner.results import search_all
from tuner.resume import (
    check_unchanged,
    only_driver,
    read_past_trials,
    store_job,
)
from tuner.search import StudySearch
from tuner.study import Study, Trial, TrialState
from tuner.tracking import Tracker, connect

SECONDS = Seconds(setup=1.0, training=2.0, evaluation=0.5, lane=4.0)


def make_job(**content: Any) -> Job:
    return Job.model_validate({"name": "job", "datasets": ["shop"]} | content)


def report(index: int, value: float, *, last: bool = False) -> Report:
    metrics = {"ctr_auc": value, "ctcvr_auc": value, "cvr_auc": None}
    return Report(
        index=index, last=last, step=10 * index, epoch=index, metrics=metrics, seconds=SECONDS
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """One SQLite store; every `Store` has an experiment of its own in it."""
    return connect(f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}")


class Store:
    """A tracking store in which one process after another works at the same job."""

    def __init__(self, client: MlflowClient, directory: Path, dataset: Dataset, job: Job) -> None:
        self.client = client
        self.directory = directory
        self.job = job
        self.dataset = dataset
        self.study = Study(dataset=dataset.name, dataset_uri=dataset.uri, model="mmoe")
        self.experiment_id = client.create_experiment(
            str(directory), artifact_location=str(directory / "artifacts")
        )

    def open_search(self) -> StudySearch:
        search = StudySearch(self.study, self.job)
        past = read_past_trials(self.client, self.experiment_id)
        search.restore(past.get(self.study.name, []))
        return search

    def work(
        self, search: StudySearch, num_trials: int, *, leave_open: int = 0, evaluations: int = 0
    ) -> list[Trial]:
        """Run trials to their end, and leave some without one, as a killed process does."""
        outbox = Outbox(self.directory / "outbox.db")
        writer = RecordWriter(self.client, self.experiment_id, outbox)
        tracker = Tracker(writer, self.job, "/storage")
        tracker.start_study(search, self.dataset, "name: job", num_lanes=1)
        job_search = JobSearch([search], [tracker])
        trials = []
        for index in range(num_trials + leave_open):
            trial = job_search.next_trial()
            assert trial is not None
            trials.append(trial)
            if index < num_trials:
                run_trial(job_search, trial)
                continue
            for number in range(1, evaluations + 1):
                job_search.evaluated(trial, report(number, 0.5))
        tracker.close()
        return trials


def run_trial(search: JobSearch, trial: Trial) -> None:
    """Give an evaluation that depends on the trial alone."""
    value = 0.5 + trial.configuration.loss.m1 / 2
    if trial.number == 3:
        search.ended(trial, Ended(kind="failed", reason="as planned"))
    elif not search.evaluated(trial, report(1, value)):
        search.ended(trial, report(2, value + 0.01, last=True))


def outcome(trials: list[Trial]) -> list[tuple[int, dict[str, Any], TrialState, float | None]]:
    return [(trial.number, trial.params, trial.state, trial.best_score) for trial in trials]


@pytest.mark.parametrize(
    ("sampler", "pruner"), [("tpe", "asha"), ("random", "median"), ("gp", "none")]
)
def test_two_processes_propose_and_prune_what_one_does(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset, sampler: str, pruner: str
) -> None:
    job = make_job(search={"sampler": sampler, "pruner": pruner, "trials": 14})
    one = Store(client, tmp_path / "one", tiny_dataset, job)
    undisturbed = one.open_search()
    one.work(undisturbed, 14)

    two = Store(client, tmp_path / "two", tiny_dataset, job)
    two.work(two.open_search(), 7)
    resumed = two.open_search()
    two.work(resumed, 7)

    assert outcome(resumed.trials) == outcome(undisturbed.trials)
    assert resumed.ended


def test_trials_without_an_end_are_proposed_first_with_their_number_and_run(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    store = Store(
        client, tmp_path, tiny_dataset, make_job(search={"trials": 6, "sampler": "random"})
    )
    left = store.work(store.open_search(), 2, leave_open=2)[2:]
    resumed = store.open_search()
    again = store.work(resumed, 2)
    assert [(trial.number, trial.params) for trial in again] == [
        (trial.number, trial.params) for trial in left
    ]
    runs = store.client.search_runs(
        [store.experiment_id], filter_string="tags.`pwiser.kind` = 'trial'"
    )
    assert len(runs) == 4
    assert all(run.info.status != "RUNNING" for run in runs)


def test_a_trial_that_runs_again_has_the_evaluations_of_every_attempt(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    store = Store(client, tmp_path, tiny_dataset, make_job(search={"trials": 4}))
    for num_evaluations in (2, 1, 0):  # each process begins the trial anew, and is killed
        (trial,) = store.work(store.open_search(), 0, leave_open=1, evaluations=num_evaluations)
        (found,) = read_past_trials(store.client, store.experiment_id)[store.study.name]
        assert (found.number, found.state) == (trial.number, TrialState.RUNNING)
        assert [one.step for one in found.reports] == [10, 20]


def test_a_past_trial_has_its_evaluations_and_its_time(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    store = Store(client, tmp_path, tiny_dataset, make_job(search={"trials": 4, "pruner": "none"}))
    store.work(store.open_search(), 4)
    past = read_past_trials(store.client, store.experiment_id)[store.study.name]
    baseline = next(trial for trial in past if trial.number == 0)
    assert baseline.state is TrialState.COMPLETE
    assert [found.step for found in baseline.reports] == [10, 20]
    assert baseline.reports[0].metrics["cvr_auc"] is None
    assert baseline.reports[-1].seconds == SECONDS
    failed = next(trial for trial in past if trial.number == 3)
    assert (failed.state, failed.failure) == (TrialState.FAILED, "as planned")


@pytest.mark.parametrize("later_s", [-1, 1])
def test_of_a_run_that_was_created_twice_the_one_that_has_ended_counts(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset, later_s: int
) -> None:
    store = Store(client, tmp_path, tiny_dataset, make_job(search={"trials": 4}))
    store.work(store.open_search(), 1)
    (run,) = search_all(client, store.experiment_id, "trial")
    tags = {name: value for name, value in run.data.tags.items() if name != "pwiser.state"}
    started = run.info.start_time + 1000 * later_s
    client.create_run(store.experiment_id, start_time=started, tags=tags)
    (found,) = read_past_trials(client, store.experiment_id)[store.study.name]
    assert (found.number, found.state) == (0, TrialState.COMPLETE)


def test_more_trials_go_on_with_a_finished_study(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    store = Store(client, tmp_path, tiny_dataset, make_job(search={"trials": 3}))
    store.work(store.open_search(), 3)
    assert store.open_search().ended
    store.job = make_job(search={"trials": 5})
    grown = store.open_search()
    assert not grown.ended
    assert [trial.number for trial in store.work(grown, 2)] == [3, 4]


def test_an_unchanged_or_larger_job_is_accepted(tmp_path: Path) -> None:
    store_job(make_job(budget={"hours": 1}), {"shop": "abc"}, str(tmp_path))
    unchanged = {"budget": {"hours": 1}}
    longer = {"budget": {"hours": 2}}
    endless: dict[str, Any] = {}
    more_trials = unchanged | {"search": {"trials": 41}}
    for content in (unchanged, longer, endless, more_trials):
        check_unchanged(make_job(**content), {"shop": "abc"}, str(tmp_path))


def test_a_field_that_came_after_the_job_was_begun_counts_as_its_default(tmp_path: Path) -> None:
    store_job(make_job(), {}, str(tmp_path))
    stored = tmp_path / "job.json"
    fields = json.loads(stored.read_text())
    del fields["data.buffer_mib"]
    stored.write_text(json.dumps(fields))
    check_unchanged(make_job(), {}, str(tmp_path))
    with pytest.raises(JobFileError, match=r"data\.buffer_mib was 512, is 64"):
        check_unchanged(make_job(data={"buffer_mib": 64}), {}, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "digest", "message"),
    [
        ({"search": {"trials": 39}}, "abc", "search.trials was 40, is 39"),
        ({"loss": {"gate": "literal"}}, "abc", "loss.gate was hinge, is literal"),
        ({"budget": {"hours": 0.5}}, "abc", "budget.hours was 1.0, is 0.5"),
        ({"budget": {"hours": 1}}, "xyz", "datasets.shop.digest was abc, is xyz"),
    ],
)
def test_a_changed_job_is_refused_with_the_difference(
    tmp_path: Path, content: dict[str, Any], digest: str, message: str
) -> None:
    store_job(make_job(budget={"hours": 1}), {"shop": "abc"}, str(tmp_path))
    with pytest.raises(JobFileError, match="was begun with other settings") as caught:
        check_unchanged(
            make_job(**({"budget": {"hours": 1}} | content)), {"shop": digest}, str(tmp_path)
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_job_whose_files_are_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="storage: job 'job' has trials in the tracking store"):
        check_unchanged(make_job(), {}, str(tmp_path))


def test_the_stored_job_is_json(tmp_path: Path) -> None:
    store_job(make_job(), {"shop": "abc"}, str(tmp_path))
    stored = json.loads((tmp_path / "job.json").read_text())
    assert stored["search.trials"] == 40
    assert stored["datasets.shop.digest"] == "abc"


def test_only_one_driver_holds_a_job(tmp_path: Path) -> None:
    job = make_job()
    with (
        only_driver(job, str(tmp_path)),
        pytest.raises(JobFileError, match="name: job 'job' is running already; wait for it"),
        only_driver(job, str(tmp_path)),
    ):
        pass
    with only_driver(job, str(tmp_path)):
        pass


def test_a_stored_job_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    store_job(make_job(), {}, str(tmp_path))
    stored = tmp_path / "job.json"
    stored.write_text(stored.read_text()[:20])
    with pytest.raises(StorageError, match=r"job\.json cannot be read .* archive the job with --"):
        check_unchanged(make_job(), {}, str(tmp_path))


def test_a_storage_that_takes_no_files_is_told(tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("in the way")
    with pytest.raises(StorageError, match="storage: cannot write"):
        store_job(make_job(), {}, str(obstacle))
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(StorageError, match="cannot be made or written"),
        only_driver(make_job(), str(tmp_path)),
    ):
        pass
