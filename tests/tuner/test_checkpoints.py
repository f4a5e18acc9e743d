from pathlib import Path
from typing import Any

import pytest

from trainables import TrialConfiguration
from tuner.checkpoints import CheckpointKeeper, Keep, kept_trials
from tuner.messages import Report
from tuner.replicates import Replicate
from tuner.study import Study, Trial, TrialState

CONFIGURATION = TrialConfiguration.create("mmoe")


class Store:
    """A job's storage with the checkpoints that its lanes wrote, and the keeper of them."""

    def __init__(self, directory: Path, keep: Keep) -> None:
        self.directory = directory
        self.keeper = CheckpointKeeper(str(directory), keep)

    def start(self, number: int, model: str = "mmoe") -> Trial:
        trial = make(number, model=model)
        self.keeper.trial_started(trial)
        return trial

    def evaluate(self, trial: Trial, value: float) -> None:
        directory = self.directory / trial.directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.safetensors").write_text(str(value))
        record(trial, value)
        assert trial.last is not None
        self.keeper.trial_evaluated(trial, trial.last)

    def end(self, trial: Trial, state: TrialState = TrialState.COMPLETE) -> None:
        trial.state = state
        self.keeper.trial_ended(trial)

    @property
    def stored(self) -> list[str]:
        paths = self.directory.glob("*/*/trial-*")
        return sorted(f"{path.parent.name} {int(path.name[-4:])}" for path in paths)


def make(number: int, *values: float, model: str = "mmoe", **given: Any) -> Trial:
    study = Study(dataset="us", dataset_uri="/data/us", model=model)
    trial = Trial(
        study=study,
        number=number,
        configuration=CONFIGURATION,
        params={},
        objectives=("ctr_auc",),
        **given,
    )
    for value in values:
        record(trial, value)
    return trial


def record(trial: Trial, value: float) -> None:
    trial.record(Report(index=1, last=False, step=1, epoch=1, metrics={"ctr_auc": value}))


def replicate(trial: Trial, *, seed: int, plain: bool = False) -> Replicate:
    return Replicate(
        study=trial.study,
        number=trial.number,
        configuration=CONFIGURATION,
        params={},
        objectives=trial.objectives,
        seed=seed,
        plain=plain,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "winners")


def test_a_study_keeps_its_baseline_and_its_winner() -> None:
    trials = [make(0, 0.5), make(1, 0.7), make(2, 0.9), make(3)]
    assert kept_trials(trials, "winners") == [trials[0], trials[2]]
    assert kept_trials(trials, "all") == trials[:3]


def test_a_baseline_that_wins_is_kept_once() -> None:
    trials = [make(0, 0.9), make(1, 0.7)]
    assert kept_trials(trials, "winners") == [trials[0]]


def test_a_failed_trial_is_never_kept() -> None:
    trials = [make(0, 0.5, state=TrialState.FAILED), make(1, 0.9, state=TrialState.FAILED)]
    assert kept_trials([*trials, make(2, 0.1)], "winners")[0].number == 2
    assert kept_trials(trials, "all") == []


def test_losers_are_removed_as_they_lose(store: Store) -> None:
    for number, value in enumerate((0.5, 0.6, 0.8, 0.7)):
        trial = store.start(number)
        store.evaluate(trial, value)
        store.end(trial, TrialState.PRUNED if number == 3 else TrialState.COMPLETE)
    assert store.stored == ["mmoe 0", "mmoe 2"]
    assert (store.directory / "us/mmoe/trial-0002/model.safetensors").read_text() == "0.8"


def test_a_running_trial_keeps_its_checkpoint_however_bad(store: Store) -> None:
    good, bad = store.start(1), store.start(2)
    store.evaluate(bad, 0.1)
    store.evaluate(good, 0.9)
    store.end(good)
    assert store.stored == ["mmoe 1", "mmoe 2"]
    store.end(bad)
    assert store.stored == ["mmoe 1"]


def test_a_running_trial_takes_nobodys_place_since_it_may_fail_yet(store: Store) -> None:
    best_so_far, leader, other = (store.start(number) for number in (1, 2, 3))
    store.evaluate(best_so_far, 0.8)
    store.evaluate(leader, 0.9)
    store.evaluate(other, 0.7)
    store.end(best_so_far)
    store.end(other)
    assert store.stored == ["mmoe 1", "mmoe 2"]
    store.end(leader, TrialState.FAILED)
    assert store.stored == ["mmoe 1"]


def test_a_stopped_trial_takes_nobodys_place_either_since_it_goes_on_another_day(
    store: Store,
) -> None:
    best_so_far, leader, loser = (store.start(number) for number in (1, 2, 3))
    for trial, value in ((best_so_far, 0.8), (leader, 0.9), (loser, 0.7)):
        store.evaluate(trial, value)
    store.end(best_so_far)
    store.end(leader, TrialState.STOPPED)
    store.end(loser, TrialState.STOPPED)
    assert store.stored == ["mmoe 1", "mmoe 2", "mmoe 3"]

    # the next process: the leader fails, the loser is no better
    store.keeper = CheckpointKeeper(str(store.directory), "winners")
    store.keeper.restore([best_so_far, make(2), make(3)])
    assert store.stored == ["mmoe 1", "mmoe 2", "mmoe 3"]
    store.end(make(2), TrialState.FAILED)
    store.end(make(3, 0.7))
    assert store.stored == ["mmoe 1"]


def test_a_marked_winner_stays_until_another_is_marked(store: Store) -> None:
    winner = store.start(1)
    store.evaluate(winner, 0.8)
    store.end(winner)
    store.keeper = CheckpointKeeper(str(store.directory), "winners")
    store.keeper.restore([winner], marked=[winner.id])
    better = store.start(2)
    store.evaluate(better, 0.9)
    store.end(better)
    assert store.stored == ["mmoe 1", "mmoe 2"]
    store.keeper.winner_marked(better)
    assert store.stored == ["mmoe 2"]


def test_of_equal_trials_the_earlier_number_stays_whichever_ended_first(store: Store) -> None:
    first, second = store.start(1), store.start(2)
    for trial in (second, first):
        store.evaluate(trial, 0.8)
        store.end(trial)
    assert store.stored == ["mmoe 1"]
    store.keeper.restore([first, second])
    assert store.stored == ["mmoe 1"]


def test_replicates_that_will_not_go_on_leave_nothing(store: Store) -> None:
    winner = store.start(2)
    store.evaluate(winner, 0.8)
    store.end(winner)
    goes_on = replicate(winner, seed=1, plain=True)
    for one in (goes_on, replicate(winner, seed=2), replicate(make(1), seed=1, plain=True)):
        (store.directory / one.directory).mkdir()
        (store.directory / one.state_directory).mkdir()
    store.keeper.remove_replicates_but([goes_on])
    assert sorted(path.name for path in (store.directory / "us/mmoe").iterdir()) == [
        "trial-0002",
        "trial-0002-plain-seed-1",
        "trial-0002-plain-seed-1-state",
    ]


def test_what_a_killed_process_had_no_time_to_remove_is_removed(store: Store) -> None:
    loser, winner, running = (store.start(number) for number in (1, 2, 3))
    for trial, value in ((loser, 0.7), (winner, 0.8), (running, 0.1)):
        store.evaluate(trial, value)
        (store.directory / trial.state_directory).mkdir()
    again = store.directory / f"{winner.directory}-seed-1-state"
    again.mkdir()  # of a replicate that goes on
    loser.state = winner.state = TrialState.COMPLETE
    store.keeper.restore([loser, winner, running])
    assert sorted(path.name for path in (store.directory / "us/mmoe").iterdir()) == [
        "trial-0002",
        "trial-0002-seed-1-state",
        "trial-0003",
        "trial-0003-state",
    ]


def test_a_trial_that_ends_before_its_first_evaluation_has_nothing_to_remove(store: Store) -> None:
    store.end(store.start(0), TrialState.STOPPED)
    assert store.stored == []


def test_each_study_keeps_its_own(store: Store) -> None:
    for model, value in (("mmoe", 0.9), ("dnn", 0.5)):
        for number in (1, 2):
            trial = store.start(number, model)
            store.evaluate(trial, value - number / 10)
            store.end(trial)
    assert store.stored == ["dnn 1", "mmoe 1"]


def test_all_are_kept_where_the_job_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path, "all")
    for number, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)):
        trial = store.start(number)
        store.evaluate(trial, 0.5 - number / 10)
        store.end(trial, state)
    assert store.stored == ["mmoe 0", "mmoe 1"]
