import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner.job import Job
from tuner.messages import Report, Seconds
from tuner.search import StudySearch
from tuner.space import PAPER_POINT
from tuner.study import PastTrial, Study, Trial, TrialState

ALPHA = {"loss.alpha": {"low": 0.0, "high": 1.0}}

HEADS_NETWORK = """\
from torch import nn

class Net(nn.Module):
    num_heads = 1

    def __init__(self, inputs, *, width: int = 8, num_heads_inside: int = 1):
        super().__init__()
        if width % num_heads_inside:
            raise ValueError(
                f"width {width} must be a multiple of num_heads_inside {num_heads_inside}"
            )
"""


def make_search(
    model: str = "mmoe", job: dict[str, Any] | None = None, **search: Any
) -> StudySearch:
    content = {"name": "job", "datasets": ["us"], "models": [model], "search": search}
    study = Study(dataset="us", dataset_uri="/data/us", model=model)
    return StudySearch(study, Job.model_validate(content | (job or {})))


def report(
    value: float, index: int = 1, *, other: float | None = None, lane_s: float = 0
) -> Report:
    metrics = {"ctr_auc": value, "ctcvr_auc": value if other is None else other}
    seconds = Seconds(training=lane_s / 2, lane=lane_s)
    return Report(
        index=index, last=False, step=index, epoch=index, metrics=metrics, seconds=seconds
    )


def ask(search: StudySearch) -> Trial:
    trial = search.ask()
    assert trial is not None
    return trial


def ask_searched(search: StudySearch) -> Trial:
    """Ask for the first trial that is neither the baseline nor the paper's point."""
    return [ask(search) for _ in range(3)][2]


def complete(
    search: StudySearch, trial: Trial, value: float, *, other: float | None = None
) -> None:
    trial.record(report(value, other=other))
    trial.state = TrialState.COMPLETE
    search.tell(trial)


def evaluate(search: StudySearch, trial: Trial, values: list[float]) -> bool:
    """Evaluate until the trial is pruned, or to its end; return whether it was pruned."""
    for index, value in enumerate(values, start=1):
        trial.record(report(value, index))
        if index < len(values) and search.should_prune(trial):
            trial.state = TrialState.PRUNED
            search.tell(trial)
            return True
    trial.state = TrialState.COMPLETE
    search.tell(trial)
    return False


def all_params(search: StudySearch, value: float = 0.5) -> list[dict[str, Any]]:
    params = []
    while (trial := search.ask()) is not None:
        complete(search, trial, value)
        params.append(trial.params)
    return params


def states_told(search: StudySearch) -> list[str]:
    return [trial.state.name for trial in search._optuna.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp"])
def test_trial_0_is_the_baseline_and_trial_1_the_papers_point(sampler: str) -> None:
    search = make_search(sampler=sampler, job={"loss": {"alpha": 0.9, "m1": 0.2, "m2": 0.4}})
    baseline, paper = ask(search), ask(search)
    assert baseline.baseline
    assert not paper.baseline
    assert baseline.configuration.loss.model_dump() == {
        "alpha": 0.0,
        "m1": 0.2,
        "m2": 0.4,
        "gate": "hinge",
    }
    assert paper.params == {"loss.alpha": 0.3, "loss.m1": 0.3, "loss.m2": 0.1}
    assert (baseline.number, paper.number) == (0, 1)
    assert (baseline.id, paper.directory) == ("us/mmoe/0", "us/mmoe/trial-0001")


def test_the_baseline_has_alpha_0_where_alpha_is_not_searched() -> None:
    space = {"training.learning_rate": {"low": 0.01, "high": 0.1}}
    search = make_search(space=space, job={"training": {"learning_rate": 0.05}})
    baseline = ask(search)
    assert baseline.configuration.loss.alpha == 0.0
    assert baseline.params == {"training.learning_rate": 0.05}


def test_the_papers_point_runs_even_outside_the_space_and_then_optuna_does_not_hear_of_it() -> None:
    space = {
        "loss.alpha": {"low": 0.5, "high": 1.0},
        "model.num_experts": {"low": 2, "high": 4},
        "training.batch_size": {"values": [512, 1024]},
    }
    search = make_search(space=space)
    complete(search, ask(search), 0.6)
    paper = ask(search)
    assert paper.params == {path: PAPER_POINT[path] for path in space}
    assert paper.configuration.training.batch_size == 2048
    complete(search, paper, 0.7)
    assert states_told(search) == []
    inside = ask(search)
    assert search.space.contains(inside.params)
    complete(search, inside, 0.8)
    assert states_told(search) == ["COMPLETE"]


def test_the_papers_point_within_the_space_is_told() -> None:
    search = make_search()
    complete(search, ask(search), 0.6)
    complete(search, ask(search), 0.7)
    told = search._optuna.trials
    assert [trial.params for trial in told] == [{"loss.alpha": 0.3, "loss.m1": 0.3, "loss.m2": 0.1}]
    assert told[0].values == [0.7]


def test_a_search_ends_with_its_trials() -> None:
    search = make_search(trials=3, sampler="random")
    assert len(all_params(search)) == 3
    assert search.exhausted
    assert search.ask() is None
    assert [trial.number for trial in search.trials] == [0, 1, 2]
    only_baseline = make_search(trials=1)
    assert ask(only_baseline).baseline
    assert only_baseline.ask() is None


GRID = {
    "loss.alpha": {"values": [0.1, 0.3]},
    "loss.m1": {"low": 0.1, "high": 0.5, "points": 3},
    "loss.m2": {"values": [0.1]},
}


def test_a_grid_is_complete_and_without_duplicates() -> None:
    search = make_search(sampler="grid", space=GRID)
    baseline, paper, *rest = all_params(search)
    assert baseline["loss.alpha"] == 0.0
    assert paper == {"loss.alpha": 0.3, "loss.m1": 0.3, "loss.m2": 0.1}
    points = [
        {"loss.alpha": alpha, "loss.m1": m1, "loss.m2": 0.1}
        for alpha, m1 in itertools.product([0.1, 0.3], [0.1, 0.3, 0.5])
    ]
    expected = [point for point in points if point != paper]
    assert sorted(rest, key=str) == sorted(expected, key=str)
    assert search.num_trials == len(search.trials) == 7
    assert search.num_left_out == 0


def test_a_grid_point_that_is_the_baseline_does_not_run_twice() -> None:
    search = make_search(
        sampler="grid", space={"loss.alpha": {"values": [0.0, 0.3]}, "loss.m1": {"values": [0.3]}}
    )
    assert [point["loss.alpha"] for point in all_params(search)] == [0.0, 0.3]


def test_a_grid_is_cut_off_at_the_number_of_trials() -> None:
    whole = all_params(make_search(sampler="grid", space=GRID))
    cut = make_search(sampler="grid", space=GRID, trials=4)
    assert all_params(cut) == whole[:4]
    assert (cut.num_trials, cut.num_left_out) == (4, 3)


def test_fewer_trials_than_a_grid_has_points_cover_all_of_it() -> None:
    first, again, other = (
        all_params(make_search(sampler="grid", trials=40, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first[2:] != other[2:]
    for path in ("loss.alpha", "loss.m1", "loss.m2"):
        assert len({point[path] for point in first[2:16]}) == 4  # as many as the default has


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_seed_gives_the_same_trials_again(sampler: str) -> None:
    first, again, other = (
        all_params(make_search(sampler=sampler, trials=15, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first[:2] == other[:2]
    assert first[2:] != other[2:]
    assert len({tuple(point.values()) for point in first}) == 15


def test_tpe_learns_from_what_it_is_told() -> None:
    proposed = {}
    for name, sign in (("high", 1), ("low", -1)):
        search = make_search(sampler="tpe", trials=40, seed=0, space=ALPHA)
        while (trial := search.ask()) is not None:
            alpha = trial.configuration.loss.alpha
            complete(search, trial, 0.5 + sign * 0.4 * alpha)
        late = [trial.configuration.loss.alpha for trial in search.trials[20:]]
        proposed[name] = sum(late) / len(late)
    assert proposed["high"] > 0.7
    assert proposed["low"] < 0.3


def test_the_gp_sampler_learns_too() -> None:
    search = make_search(sampler="gp", trials=18, seed=0, space=ALPHA)
    while (trial := search.ask()) is not None:
        complete(search, trial, 0.9 - (trial.configuration.loss.alpha - 0.6) ** 2)
    late = [trial.configuration.loss.alpha for trial in search.trials[14:]]
    assert all(abs(alpha - 0.6) < 0.1 for alpha in late)


def test_the_value_of_a_trial_is_its_best_evaluation() -> None:
    search = make_search(sampler="random", pruner="none")
    ask(search)
    trial = ask(search)
    assert not evaluate(search, trial, [0.6, 0.8, 0.7])
    assert search._optuna.trials[0].values == [0.8]


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_bad_trial_is_pruned_a_good_one_and_the_baseline_never(pruner: str) -> None:
    search = make_search(sampler="random", pruner=pruner, trials=20)
    baseline = ask(search)
    assert not evaluate(search, baseline, [0.1] * 9)
    for _ in range(6):
        evaluate(search, ask(search), [0.7] * 9)
    assert evaluate(search, ask(search), [0.2] * 9)
    assert search.trials[-1].last is not None
    assert search.trials[-1].last.index == 1
    assert not evaluate(search, ask(search), [0.9] * 9)
    assert states_told(search)[-2:] == ["PRUNED", "COMPLETE"]


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_trial_that_goes_on_is_not_judged_where_it_has_passed(pruner: str) -> None:
    settings = {"sampler": "random", "pruner": pruner, "trials": 20, "space": ALPHA}
    early = ask_searched(make_search(**settings))
    passed = tuple(report(value, index) for index, value in enumerate((0.55, 0.6, 0.9), start=1))
    others = [
        PastTrial(
            number=number,
            params={"loss.alpha": number / 20},
            state=TrialState.COMPLETE,
            reports=tuple(report(0.7 + number / 100, index) for index in (1, 2, 3)),
        )
        for number in range(3, 12)
    ]
    begun = PastTrial(number=2, params=early.params, state=TrialState.RUNNING, reports=passed)
    search = make_search(**settings)
    search.restore([begun, *others])
    trial = next(trial for trial in search._unended if trial.number == 2)
    assert (trial.best, trial.last) == (None, None)
    for evaluation in passed[:2]:  # by now each of them is far behind the others
        trial.record(evaluation)
        assert not search.should_prune(trial)
    trial.record(passed[2])
    assert not search.should_prune(trial)  # the last one is judged, and is ahead of all
    assert trial.best_score == 0.9


def test_the_evaluation_that_a_process_ended_at_is_judged_by_the_next() -> None:
    settings = {"sampler": "random", "pruner": "asha", "trials": 20, "space": ALPHA}
    early = ask_searched(make_search(**settings))
    begun = PastTrial(
        number=2, params=early.params, state=TrialState.RUNNING, reports=(report(0.1, 1),)
    )
    others = [
        PastTrial(
            number=number,
            params={"loss.alpha": number / 20},
            state=TrialState.COMPLETE,
            reports=(report(0.7 + number / 100, 1),),
        )
        for number in range(3, 12)
    ]
    search = make_search(**settings)
    search.restore([begun, *others])
    trial = next(trial for trial in search._unended if trial.number == 2)
    trial.record(report(0.1, 1))
    assert search.should_prune(trial)


def test_without_a_pruner_nothing_is_pruned() -> None:
    search = make_search(sampler="random", pruner="none", trials=20)
    for value in (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1):
        assert not evaluate(search, ask(search), [value] * 9)
    assert set(states_told(search)) == {"COMPLETE"}


def test_failed_and_stopped_trials_are_told_as_failed() -> None:
    search = make_search(sampler="random")
    ask(search)
    failed, stopped, mute = ask(search), ask(search), ask(search)
    failed.record(report(0.9))
    failed.state = TrialState.FAILED
    stopped.state = TrialState.STOPPED
    mute.state = TrialState.COMPLETE
    for trial in (failed, stopped, mute):
        search.tell(trial)
    assert states_told(search) == ["FAIL", "FAIL", "FAIL"]


def test_a_trial_is_told_once() -> None:
    search = make_search(sampler="random")
    ask(search)
    trial = ask(search)
    complete(search, trial, 0.8)
    search.tell(trial)
    assert states_told(search) == ["COMPLETE"]


def test_a_pareto_study_maximises_every_objective() -> None:
    search = make_search(
        sampler="tpe", pruner="none", objective=["ctr_auc", "ctcvr_auc"], trials=14, space=ALPHA
    )
    while (trial := search.ask()) is not None:
        alpha = trial.configuration.loss.alpha
        assert not search.should_prune(trial)
        complete(search, trial, 0.5 + alpha / 4, other=0.8 - alpha / 4)
    assert [direction.name for direction in search._optuna.directions] == ["MAXIMIZE"] * 2
    told = search._optuna.trials
    assert len(told) == 13
    assert all(len(trial.values) == 2 for trial in told)
    assert len(search._optuna.best_trials) == 13  # one metric is bought with the other


def test_values_that_are_lists_are_searched_and_trained_as_lists() -> None:
    space = {
        "model.expert_units": {"values": [[8], [16, 8]]},
        "model.batch_norm": {"values": [True]},
    }
    search = make_search(sampler="random", trials=12, space=space)
    all_params(search)
    units = {trial.configuration.model_settings["expert_units"] for trial in search.trials[2:]}
    assert units == {(8,), (16, 8)}
    assert {trial.params["model.expert_units"] for trial in search.trials[2:]} == {"[8]", "[16, 8]"}
    assert all(trial.configuration.model_settings["batch_norm"] for trial in search.trials[2:])


def test_a_list_outside_of_its_values_is_restored() -> None:
    space = {"model.expert_units": {"values": [[8], [16, 8]]}}
    begun = make_search(trials=3, space=space)
    all_params(begun)
    past = [
        PastTrial(
            number=trial.number,
            params=json.loads(json.dumps(trial.params)),
            state=TrialState.COMPLETE,
            reports=(replace(report(0.5), last=True),),
        )
        for trial in begun.trials
    ]
    resumed = make_search(trials=3, space=space)
    resumed.restore(past)
    assert [trial.configuration for trial in resumed.trials] == [
        trial.configuration for trial in begun.trials
    ]


def test_values_that_do_not_go_together_make_a_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heads_network.py").write_text(HEADS_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    space = {"model.width": {"values": [8, 12]}, "model.num_heads_inside": {"values": [1, 8]}}
    search = make_search("heads_network:Net", sampler="grid", space=space)
    found = [ask(search) for _ in range(search.num_trials)]
    failed = [trial for trial in found if trial.failure is not None]
    assert [trial.params for trial in failed] == [{"model.width": 12, "model.num_heads_inside": 8}]
    assert failed[0].failure == (
        "model: heads_network:Net: width 12 must be a multiple of num_heads_inside 8"
    )
    assert search.ask() is None


def test_dimensions_of_another_model_are_left_out_of_a_study() -> None:
    space = ALPHA | {"model.num_experts": {"low": 2, "high": 4}}
    job = {"models": ["mmoe", "dnn"]}
    assert list(ask(make_search("dnn", job, space=space)).params) == ["loss.alpha"]


def test_seconds_add_up_over_trials() -> None:
    search = make_search(sampler="random")
    for lane_s in (2.0, 4.0):
        ask(search).record(report(0.5, lane_s=lane_s))
    ask(search)
    assert search.seconds == Seconds(training=3.0, lane=6.0)
    assert search.seconds.overhead == 3.0
