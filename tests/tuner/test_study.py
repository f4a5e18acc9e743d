import pytest

from trainables import TrialConfiguration
from tuner.messages import Report
from tuner.study import Study, Trial, TrialState, choose_winner, choose_winners

STUDY = Study(dataset="us", dataset_uri="/data/us", model="mmoe")
CONFIGURATION = TrialConfiguration.create("mmoe")


def trial(
    number: int,
    *values: float,
    state: TrialState = TrialState.COMPLETE,
    study: Study = STUDY,
) -> Trial:
    made = Trial(
        study=study,
        number=number,
        configuration=CONFIGURATION,
        params={},
        objectives=("mean_auc",),
        state=state,
    )
    for index, value in enumerate(values, start=1):
        made.record(report(index, value))
    return made


def report(index: int, value: float) -> Report:
    metrics = {"ctr_auc": value - 0.1, "ctcvr_auc": value + 0.1}
    return Report(index=index, last=False, step=index, epoch=index, metrics=metrics)


def test_names_and_directories_are_unique_and_safe() -> None:
    own = Study(dataset="us", dataset_uri="/data/us", model="package.module:Net")
    assert (STUDY.name, STUDY.directory) == ("us/mmoe", "us/mmoe")
    assert (own.name, own.directory) == ("us/package.module:Net", "us/package.module.Net")
    assert (trial(12).id, trial(12).directory) == ("us/mmoe/12", "us/mmoe/trial-0012")


def test_trial_0_alone_is_the_baseline() -> None:
    assert [trial(number).baseline for number in range(3)] == [True, False, False]


@pytest.mark.parametrize("state", TrialState)
def test_only_a_running_trial_has_not_ended(state: TrialState) -> None:
    assert state.ended == (state is not TrialState.RUNNING)


def test_a_trial_without_evaluations_has_no_score() -> None:
    assert (trial(0).best, trial(0).best_score, trial(0).best_values) == (None, None, None)


def test_the_best_evaluation_is_kept_and_ties_go_to_the_earlier() -> None:
    made = trial(0, 0.6, 0.8, 0.8, 0.7)
    assert made.best is not None
    assert made.last is not None
    assert (made.best.index, made.last.index) == (2, 4)
    assert made.best_score == pytest.approx(0.8)
    assert made.best_values == (made.best_score,)


def test_a_score_needs_its_metrics() -> None:
    undefined = Report(
        index=1, last=True, step=1, epoch=1, metrics={"ctr_auc": 0.5, "ctcvr_auc": None}
    )
    with pytest.raises(ValueError, match="objective mean_auc is undefined: one class only"):
        trial(0).score_of(undefined)


def test_the_winner_has_the_best_evaluation_of_all_even_if_it_was_pruned() -> None:
    trials = [trial(0, 0.7), trial(1, 0.9, 0.2, state=TrialState.PRUNED), trial(2, 0.8)]
    assert choose_winner(trials) is trials[1]
    trials[1].state = TrialState.STOPPED
    assert choose_winner(trials) is trials[1]


def test_ties_go_to_the_lower_number_whatever_the_order() -> None:
    trials = [trial(0, 0.7), trial(1, 0.8), trial(2, 0.8)]
    assert choose_winner(trials) is trials[1]
    assert choose_winner(reversed(trials)) is trials[1]


def test_a_failed_or_silent_trial_never_wins() -> None:
    assert choose_winner([]) is None
    assert choose_winner([trial(0), trial(1, 0.9, state=TrialState.FAILED)]) is None


def test_every_dataset_has_one_winner_over_its_studies() -> None:
    ple, fr = (
        Study(dataset=dataset, dataset_uri=f"/data/{dataset}", model="ple")
        for dataset in ("us", "fr")
    )
    better = trial(1, 0.9, study=ple)
    failed = trial(0, 0.9, state=TrialState.FAILED, study=fr)
    assert choose_winners([trial(0, 0.8), failed, better, trial(1, 0.7)]) == {"us": better}
    assert choose_winners([]) == {}
