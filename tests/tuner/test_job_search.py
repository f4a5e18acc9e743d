from collections.abc import Mapping
from typing import Any

import pytest

from trainables import ConfigurationError, TrialConfiguration
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report, TrialTask
from tuner.search import StudySearch
from tuner.space import SearchSpace
from tuner.study import Study, Trial, TrialState
from tuner.tune_adapters import JobSearcher

Event = tuple[str, str, str]


class Unable(SearchSpace):
    """A space of which no two values go together."""

    def configuration(self, params: Mapping[str, Any]) -> TrialConfiguration:
        raise ConfigurationError("model: they do not go together")


def task(trial: Trial) -> TrialTask:
    return TrialTask(
        id=trial.id,
        dataset="/data/us",
        configuration={},
        objectives=("mean_auc",),
        checkpoint="/c",
        state="/s",
    )


class Diary:
    """An observer that writes down what it is told, and in which state the trial was."""

    def __init__(self, name: str, events: list[Event]) -> None:
        self.name = name
        self.events = events

    def trial_started(self, trial: Trial) -> None:
        self.events.append((self.name, "started", trial.id))

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        assert trial.last is report
        self.events.append((self.name, f"evaluated {report.index}", trial.id))

    def trial_ended(self, trial: Trial) -> None:
        self.events.append((self.name, str(trial.state), trial.id))

    def study_ended(self, search: StudySearch) -> None:
        assert all(trial.state.ended for trial in search.trials)
        self.events.append((self.name, "study ended", search.study.name))


@pytest.fixture
def events() -> list[Event]:
    return []


def make(events: list[Event], *, observers: int = 1, **settings: Any) -> JobSearch:
    search = {"sampler": "random", "pruner": "none", "trials": 2} | settings
    content = {"name": "job", "datasets": ["us"], "models": ["mmoe", "dnn"], "search": search}
    job = Job.model_validate(content)
    searches = [
        StudySearch(Study(dataset="us", dataset_uri="/data/us", model=model), job)
        for model in job.models
    ]
    return JobSearch(searches, [Diary(name, events) for name in "ab"[:observers]])


def report(value: float = 0.5, index: int = 1, *, last: bool = True) -> Report:
    metrics = {"ctr_auc": value, "ctcvr_auc": value}
    return Report(index=index, last=last, step=index, epoch=index, metrics=metrics)


def propose(search: JobSearch) -> Trial:
    trial = search.next_trial()
    assert trial is not None
    return trial


def test_studies_come_in_their_order_and_the_next_begins_before_the_last_ends(
    events: list[Event],
) -> None:
    search = make(events)
    trials = [propose(search) for _ in range(4)]
    assert [trial.id for trial in trials] == ["us/mmoe/0", "us/mmoe/1", "us/dnn/0", "us/dnn/1"]
    assert search.next_trial() is None
    assert search.trials == trials


def test_observers_hear_of_everything_in_their_order(events: list[Event]) -> None:
    search = make(events, observers=2, trials=1)
    mmoe = propose(search)
    assert not search.evaluated(mmoe, report(last=False))
    search.ended(mmoe, report(index=2))
    dnn = propose(search)
    search.ended(dnn, Ended(kind="failed", reason="out of memory"))
    assert events == [
        (observer, *event)
        for event in (
            ("started", "us/mmoe/0"),
            ("evaluated 1", "us/mmoe/0"),
            ("evaluated 2", "us/mmoe/0"),
            ("complete", "us/mmoe/0"),
            ("study ended", "us/mmoe"),
            ("started", "us/dnn/0"),
            ("failed", "us/dnn/0"),
            ("study ended", "us/dnn"),
        )
        for observer in "ab"
    ]


def test_a_study_ends_with_its_last_trial_whichever_that_is(events: list[Event]) -> None:
    search = make(events)
    first, second = propose(search), propose(search)
    search.ended(second, report())
    assert events[-1] == ("a", "complete", "us/mmoe/1")
    search.ended(first, report())
    assert events[-1] == ("a", "study ended", "us/mmoe")


def test_a_failed_trial_keeps_its_reason_and_the_search_goes_on(events: list[Event]) -> None:
    search = make(events)
    failed = propose(search)
    search.ended(failed, Ended(kind="failed", reason="out of memory"))
    assert (failed.state, failed.failure) == (TrialState.FAILED, "out of memory")
    search.ended(propose(search), report())
    assert search.next_trial() is not None


def test_a_stopped_trial_did_not_fail(events: list[Event]) -> None:
    search = make(events)
    stopped = propose(search)
    search.ended(stopped, Ended(kind="stopped", reason="interrupted"))
    assert (stopped.state, stopped.failure) == (TrialState.STOPPED, None)


def test_a_pruned_trial_has_ended_and_what_comes_later_is_no_news(events: list[Event]) -> None:
    search = make(events, pruner="asha", trials=9)
    propose(search)
    for _ in range(3):
        search.ended(good := propose(search), report(0.8, last=False))
        assert good.state is TrialState.COMPLETE
    for value in (0.8, 0.9, 0.9):
        assert not search.evaluated(propose(search), report(value, last=False))
    bad = propose(search)
    assert search.evaluated(bad, report(0.1, last=False))
    assert bad.state is TrialState.PRUNED
    assert events[-1] == ("a", "pruned", bad.id)
    told = len(events)
    search.ended(bad, report(0.1, 2))
    search.ended(bad, Ended(kind="stopped", reason="pruned"))
    assert bad.state is TrialState.PRUNED
    assert len(events) == told


def test_a_stopped_search_proposes_nothing_more_and_keeps_the_first_reason(
    events: list[Event],
) -> None:
    search = make(events)
    running = propose(search)
    search.stop("interrupted")
    search.stop("the budget is spent")
    assert search.stop_reason == "interrupted"
    assert search.next_trial() is None
    search.ended(running, report())
    assert running.state is TrialState.COMPLETE


def test_closing_stops_what_runs_and_ends_every_study_once(events: list[Event]) -> None:
    search = make(events)
    done, running = propose(search), propose(search)
    search.ended(done, report())
    search.close()
    assert [trial.state for trial in (done, running)] == [TrialState.COMPLETE, TrialState.STOPPED]
    ending = [("a", "stopped", running.id), ("a", "study ended", "us/mmoe")]
    assert events[-3:] == [*ending, ("a", "study ended", "us/dnn")]
    told = len(events)
    search.close()
    assert len(events) == told


def test_a_trial_whose_values_do_not_go_together_has_failed_and_the_search_goes_on(
    events: list[Event],
) -> None:
    search = make(events, trials=3)
    first = propose(search)
    mmoe = search.searches[0]
    mmoe.space = Unable(mmoe.space.dimensions, mmoe.space.base)
    second = propose(search)
    failed = mmoe.trials[1]
    assert (first.id, failed.id, second.id) == ("us/mmoe/0", "us/mmoe/1", "us/dnn/0")
    assert (failed.state, failed.failure) == (TrialState.FAILED, "model: they do not go together")
    assert [name for _, name, trial in events if trial == failed.id] == ["started", "failed"]


def test_a_tune_actor_lost_while_the_job_stops_leaves_its_trial_for_the_next_run(
    events: list[Event],
) -> None:
    search = make(events)
    searcher = JobSearcher(search, task, cancel_task=lambda trial: True)
    assert isinstance(searcher.suggest("a"), dict)
    trial = searcher.trials["a"]
    search.stop("the budget is spent")
    searcher.on_trial_complete("a", error=True)
    assert (trial.state, trial.failure) == (TrialState.STOPPED, None)


def test_a_tune_actor_lost_after_its_trial_ended_changes_nothing(events: list[Event]) -> None:
    search = make(events)
    searcher = JobSearcher(search, task, cancel_task=lambda trial: True)
    assert isinstance(searcher.suggest("a"), dict)
    trial = searcher.trials["a"]
    search.ended(trial, Ended(kind="failed", reason="out of memory"))
    searcher.on_trial_complete("a", error=True)
    assert (trial.state, trial.num_restarts) == (TrialState.FAILED, 0)
    assert propose(search).id == "us/mmoe/1"
