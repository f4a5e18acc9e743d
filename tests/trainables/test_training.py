"""The training loop on planted problems: what decides a trial's result, and what it reports."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import CPU, INPUTS, SMALL_MODELS, make_split

from datasets import Impressions
from trainables import (
    DeviceImpressions,
    Evaluation,
    LossSettings,
    TrainingError,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    train,
)
from trainables.metrics import METRICS, evaluate
from trainables.training import EVALUATION_BATCH, Training, predict_logits

ALONE = Workers(device=CPU)
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are too small to share, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TRAIN, VALID = make_split(seed=0), make_split(301, seed=1)


def configure(model: str = "mmoe", alpha: float = 0.3, **training: Any) -> TrialConfiguration:
    settings = {"epochs": 2, "batch_size": 100, "learning_rate": 0.01, "precision": "float32"}
    return TrialConfiguration.create(
        model,
        SMALL_MODELS[model] | {"embedding_dim": 4},
        training=TrainingSettings(**settings | training),
        loss=LossSettings(alpha=alpha),
    )


def run(
    configuration: TrialConfiguration, train_split: DeviceImpressions = TRAIN, **arguments: Any
) -> list[Evaluation]:
    steps = train(configuration, INPUTS, train_split, VALID, ALONE, **arguments)
    return [evaluation for evaluation, _ in steps]


def run_with_weights(configuration: TrialConfiguration) -> tuple[list[dict[str, Any]], Weights]:
    """Give all that a trial reports but its times, and its last weights."""
    told = []
    for evaluation, model in train(configuration, INPUTS, TRAIN, VALID, ALONE):
        values = vars(evaluation).copy()
        del values["training_s"], values["evaluation_s"]
        told.append(values)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    return told, weights


def assert_same(first: tuple[Any, Weights], second: tuple[Any, Weights]) -> None:
    assert first[0] == second[0]
    assert list(first[1]) == list(second[1])
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())


def with_dropout(seed: int) -> TrialConfiguration:
    return configure("shared_bottom", seed=seed).replace({"model.dropout": 0.3})


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_the_same_seed_gives_the_same_trial_bit_by_bit(model: str) -> None:
    first = run_with_weights(configure(model, seed=3))
    assert_same(first, run_with_weights(configure(model, seed=3)))
    other, _ = run_with_weights(configure(model, seed=4))
    assert other != first[0]


def test_a_trial_does_not_depend_on_the_trials_before_it() -> None:
    alone = run_with_weights(with_dropout(seed=0))
    run(configure("mmoe", seed=5, batch_size=64))
    cancelled = train(with_dropout(seed=9), INPUTS, TRAIN, VALID, ALONE)
    next(cancelled)
    cancelled.close()
    torch.rand(17)
    assert_same(run_with_weights(with_dropout(seed=0)), alone)


class SecondRank(Workers):
    """One of two workers, for what it draws alone: no process group is asked."""

    size = 2
    rank = 1


def test_every_rank_draws_dropout_masks_of_its_own() -> None:
    first, second = ALONE, SecondRank(device=torch.device("cpu"))
    drawn = {}
    for seed in (0, 1):
        for workers in (first, second, second):
            training = Training(with_dropout(seed), INPUTS, TRAIN, VALID, workers)
            drawn.setdefault((seed, workers.rank), []).append(torch.rand(3).tolist())
            weight = next(training.model.parameters())
            drawn.setdefault((seed, "weight"), []).append(weight[0].tolist())
    for seed in (0, 1):
        assert drawn[seed, 1][0] == drawn[seed, 1][1] != drawn[seed, 0][0]
        assert drawn[seed, "weight"] == drawn[seed, "weight"][:1] * 3  # all begin with one model
    assert drawn[0, 1] != drawn[1, 1]


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_a_trial_learns_and_reports_every_metric(model: str) -> None:
    *_, last = run(configure(model, epochs=6, learning_rate=0.02))
    assert tuple(last.metrics) == METRICS
    assert last.metrics["ctr_auc"] is not None
    assert last.metrics["ctr_auc"] > 0.7
    multi_task = model not in {"dnn", "masknet"}
    assert (last.metrics["ctcvr_logloss"] is not None) == multi_task
    if multi_task:
        assert last.metrics["ctcvr_auc"] is not None
        assert last.metrics["ctcvr_auc"] > 0.75


@pytest.mark.parametrize(
    ("evaluate_every", "batch_size", "steps"),
    [
        (1.0, 100, [10, 20]),
        (0.5, 100, [5, 10, 15, 20]),
        (0.3, 100, [4, 7, 10, 14, 17, 20]),
        (0.1, 500, [1, 2, 3, 4]),  # more evaluations are asked for than there are steps
        (1e-9, 500, [1, 2, 3, 4]),
        (0.5, 1000, [1, 2]),
    ],
)
def test_evaluations_come_at_their_share_of_an_epoch_and_at_its_end(
    evaluate_every: float, batch_size: int, steps: list[int]
) -> None:
    evaluations = run(configure(evaluate_every=evaluate_every, batch_size=batch_size))
    assert [evaluation.step for evaluation in evaluations] == steps
    assert [evaluation.index for evaluation in evaluations] == list(range(1, len(steps) + 1))
    assert {evaluation.num_evaluations for evaluation in evaluations} == {len(steps)}
    assert [evaluation.epoch for evaluation in evaluations] == [2 * n / steps[-1] for n in steps]
    assert [evaluation.last for evaluation in evaluations].index(True) == len(steps) - 1


@pytest.mark.parametrize("batch_size", [1000, 1001, 10_000])
def test_a_batch_larger_than_the_data_is_the_data(batch_size: int) -> None:
    evaluations = run(configure(batch_size=batch_size))
    assert [evaluation.step for evaluation in evaluations] == [1, 2]
    assert evaluations[-1].metrics == run(configure(batch_size=1000))[-1].metrics


def test_batches_share_the_rows_evenly() -> None:
    """1,000 rows in batches of at most 334 are 3 of 333; those of 999 would leave 1 row alone."""
    assert run(configure(batch_size=334))[-1].step == 6
    assert run(configure(batch_size=999))[-1].step == 4


def test_a_single_impression_trains() -> None:
    evaluations = run(configure(), make_split(1))
    assert [evaluation.step for evaluation in evaluations] == [1, 2]


def test_a_cancelled_trial_stops_after_the_step() -> None:
    answers = iter([False, False, True])
    assert run(configure(), is_cancelled=lambda: next(answers)) == []
    assert next(answers, None) is None


def test_a_trial_cancelled_at_an_evaluations_step_does_not_evaluate() -> None:
    answers = iter([False] * 9 + [True])
    assert run(configure(), is_cancelled=lambda: next(answers)) == []


def test_a_closed_trial_trains_no_further() -> None:
    asked = []
    steps = train(configure(), INPUTS, TRAIN, VALID, ALONE, lambda: bool(asked.append(1)))
    next(steps)
    steps.close()
    assert len(asked) == 10


def test_a_model_is_in_evaluation_mode_at_its_evaluations_and_trains_between() -> None:
    modes = []
    built: list[torch.nn.Module] = []

    def note() -> bool:
        modes.extend(model.training for model in built)
        return False

    for _, model in train(configure(), INPUTS, TRAIN, VALID, ALONE, note):
        assert not model.training
        built = [model]
    assert modes == [True] * 10


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_reported_losses_are_means_that_add_up(alpha: float) -> None:
    for evaluation in run(configure(alpha=alpha, evaluate_every=0.5)):
        assert evaluation.train_pwiser > 0
        assert evaluation.train_loss == pytest.approx(
            evaluation.train_bce + alpha * evaluation.train_pwiser, rel=1e-5
        )
        assert 0.2 < evaluation.train_bce < 1


def test_losses_are_those_since_the_evaluation_before() -> None:
    """Two evaluations an epoch see the same steps as one, so that their mean is its loss."""
    (whole,) = run(configure(epochs=1))
    halves = run(configure(epochs=1, evaluate_every=0.5))
    assert sum(half.train_loss for half in halves) / 2 == pytest.approx(whole.train_loss, rel=1e-5)
    assert halves[-1].metrics == whole.metrics


def test_times_grow() -> None:
    first, second = run(configure())
    assert 0 < first.training_s < second.training_s
    assert 0 < first.evaluation_s < second.evaluation_s


def test_a_loss_that_is_no_number_ends_the_trial() -> None:
    broken = make_split()
    broken.numericals_ND[17, 1] = float("nan")
    with pytest.raises(TrainingError) as caught:
        run(configure(evaluate_every=0.5), broken)
    assert str(caught.value) == (
        "the loss became nan before step 5 (BCE nan, PWiseR nan); "
        "a smaller training.learning_rate may help"
    )


def test_a_diverging_trial_ends() -> None:
    with pytest.raises(TrainingError, match=r"^the loss became (inf|nan) before step \d+ \("):
        run(configure(learning_rate=1e30, epochs=5))


def test_a_trial_that_diverged_in_the_last_step_ends() -> None:
    message = r"^after step 1: \d+ of \d+ predictions are NaN: the model has diverged; lower "
    with pytest.raises(TrainingError, match=message):
        run(configure(learning_rate=1e30, batch_size=len(TRAIN)))


def test_metrics_of_one_class_alone_are_missing() -> None:
    labels_NT = VALID.labels_NT * torch.tensor([1, 0], dtype=torch.uint8)
    valid = DeviceImpressions(VALID.ids_NF, VALID.numericals_ND, labels_NT)
    (evaluation, _), *_ = train(configure(), INPUTS, TRAIN, valid, ALONE)
    missing = {name for name, value in evaluation.metrics.items() if value is None}
    assert missing == {"ctcvr_auc", "cvr_auc"}


def test_metrics_are_those_of_the_whole_valid_split() -> None:
    for evaluation, model in train(configure(), INPUTS, TRAIN, VALID, ALONE):
        with torch.no_grad():
            logits_NT = model(VALID.ids_NF, VALID.numericals_ND)
        assert evaluation.metrics == evaluate(logits_NT, VALID.clicks_N, VALID.conversions_N)


def test_logits_of_a_split_are_those_of_its_rows() -> None:
    *_, (_, model) = train(configure(epochs=1), INPUTS, TRAIN, VALID, ALONE)
    split = make_split(2 * EVALUATION_BATCH + 5)
    logits_NT = predict_logits(model.train(), split, ALONE)
    assert logits_NT.dtype == torch.float32
    assert not logits_NT.requires_grad
    for rows in (slice(0, 7), slice(EVALUATION_BATCH - 2, EVALUATION_BATCH + 3), slice(-5, None)):
        part = split.rows(rows)
        with torch.no_grad():
            expected_BT = model(part.ids_NF, part.numericals_ND)
        torch.testing.assert_close(logits_NT[rows], expected_BT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "num_heads"), [("mmoe", 2), ("dnn", 1)])
def test_an_empty_split_has_no_logits(model: str, num_heads: int) -> None:
    *_, (_, trained) = train(configure(model, epochs=1), INPUTS, TRAIN, VALID, ALONE)
    assert predict_logits(trained, make_split(0), ALONE).shape == (0, num_heads)


def test_bfloat16_is_near_float32_and_its_weights_are_float32() -> None:
    exact, weights = run_with_weights(configure(precision="float32"))
    rough, rough_weights = run_with_weights(configure(precision="bfloat16"))
    assert exact != rough
    assert exact[-1]["train_loss"] == pytest.approx(rough[-1]["train_loss"], rel=0.05)
    dtypes = {value.dtype for value in rough_weights.values() if value.is_floating_point()}
    assert dtypes == {torch.float32}
    auto = run_with_weights(configure(precision="auto"))
    assert auto[0] in (exact, rough)
    assert list(auto[1]) == list(weights)


def test_a_loaded_split_is_copied_as_it_is() -> None:
    impressions = Impressions(
        ids_NF=np.array([[1, 2], [3, 4]], np.int16),
        numericals_ND=np.array([[0.5], [1.5]], np.float32),
        clicks_N=np.array([1, 1], np.uint8),
        conversions_N=np.array([0, 1], np.uint8),
    )
    split = DeviceImpressions.from_impressions(impressions, CPU)
    assert len(split) == 2
    assert split.ids_NF.dtype == torch.int16
    row = split.rows(torch.tensor([1]))
    assert row.ids_NF.tolist() == [[3, 4]]
    assert row.numericals_ND.tolist() == [[1.5]]
    assert row.labels_NT.tolist() == [[1, 1]]
    assert (split.clicks_N.tolist(), split.conversions_N.tolist()) == ([1, 1], [0, 1])


def test_two_workers_at_half_the_batch_train_as_one(
    run_ranks: Callable[..., tuple[Weights, Weights]], tmp_path: Path
) -> None:
    """Loss, parameters, metrics and logits after 3 and 5 steps, valid rows uneven over ranks."""
    one, two = run_ranks("trials", tmp_path)
    assert list(one) == list(two)
    assert sum("losses" in key for key in one) == 8  # four variants, two evaluations each
    for key, expected in one.items():
        torch.testing.assert_close(
            two[key], expected, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
