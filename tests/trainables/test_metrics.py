"""Metrics against scikit-learn, with ties, missing classes and NaN."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from trainables.metrics import METRICS, auc, evaluate, logloss, probabilities

tied_scores = st.integers(-4, 4).map(lambda quarter: quarter / 4)
any_scores = st.floats(-15.0, 15.0, width=32)  # beyond, 1 - p loses scikit-learn's digits
scores = st.one_of(tied_scores, any_scores)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(scores, st.booleans()), min_size=2, max_size=60))
def test_auc_and_logloss_equal_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    logits_N = torch.tensor([score for score, _ in rows])
    labels_N = torch.tensor([label for _, label in rows])
    if labels_N.all() or not labels_N.any():
        assert auc(logits_N, labels_N) is None
    else:
        expected = roc_auc_score(labels_N.numpy(), logits_N.numpy())
        assert auc(logits_N, labels_N) == pytest.approx(expected, abs=1e-12)
    sure = torch.sigmoid(logits_N.double()).numpy()
    expected = log_loss(labels_N.numpy(), sure, labels=[0, 1])
    assert logloss(logits_N, labels_N) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def split(num_rows: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_NT = torch.randn(num_rows, num_heads, generator=generator).round(decimals=2) - 2.0
    clicks_N = torch.rand(num_rows, generator=generator) < logits_NT[:, 0].sigmoid()
    conversions_N = clicks_N & (torch.rand(num_rows, generator=generator) < 0.3)
    return logits_NT, clicks_N, conversions_N


def test_multi_task_metrics_equal_scikit_learn() -> None:
    logits_NT, clicks_N, conversions_N = split(20_000, 2)
    predicted = {name: value.numpy() for name, value in probabilities(logits_NT).items()}
    clicks, conversions = clicks_N.numpy(), conversions_N.numpy()
    metrics = evaluate(logits_NT, clicks_N.to(torch.int8), conversions_N.to(torch.int8))
    assert metrics == {
        "ctr_auc": pytest.approx(roc_auc_score(clicks, predicted["pctr"]), abs=1e-12),
        "ctr_logloss": pytest.approx(log_loss(clicks, predicted["pctr"]), rel=1e-12),
        "ctcvr_auc": pytest.approx(roc_auc_score(conversions, predicted["pctcvr"]), abs=1e-12),
        "ctcvr_logloss": pytest.approx(log_loss(conversions, predicted["pctcvr"]), rel=1e-12),
        "cvr_auc": pytest.approx(
            roc_auc_score(conversions[clicks], predicted["pcvr"][clicks]), abs=1e-12
        ),
    }


def test_single_task_score_ranks_for_all() -> None:
    logits_NT, clicks_N, conversions_N = split(5000, 1)
    score = logits_NT[:, 0].numpy()
    clicks, conversions = clicks_N.numpy(), conversions_N.numpy()
    metrics = evaluate(logits_NT, clicks_N, conversions_N)
    assert metrics["ctr_auc"] == pytest.approx(roc_auc_score(clicks, score), abs=1e-12)
    assert metrics["ctcvr_auc"] == pytest.approx(roc_auc_score(conversions, score), abs=1e-12)
    expected = roc_auc_score(conversions[clicks], score[clicks])
    assert metrics["cvr_auc"] == pytest.approx(expected, abs=1e-12)
    assert metrics["ctcvr_logloss"] is None


def test_metrics_come_in_their_documented_order() -> None:
    assert tuple(evaluate(*split(50, 2))) == tuple(evaluate(*split(50, 1))) == METRICS


def test_auc_of_ties_is_half() -> None:
    assert auc(torch.zeros(10), torch.arange(10) < 3) == 0.5


def test_infinite_scores_rank_as_such() -> None:
    scores_N = torch.tensor([-torch.inf, 0.0, torch.inf, torch.inf])
    assert auc(scores_N, torch.tensor([0, 0, 1, 0])) == pytest.approx((1 + 1 + 0.5) / 3)


def test_scores_that_differ_in_their_last_bit_do_not_tie() -> None:
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    assert auc(torch.tensor([below, 1.0]), torch.tensor([0, 1])) == 1.0


@pytest.mark.parametrize("num_heads", [1, 2])
def test_undefined_metrics_are_missing(num_heads: int) -> None:
    logits_NT = torch.randn(6, num_heads)
    nothing_N, clicks_N = torch.zeros(6), torch.tensor([1, 0, 0, 0, 1, 0])
    no_click = evaluate(logits_NT, nothing_N, nothing_N)
    assert [name for name in METRICS if no_click[name] is None] == (
        ["ctr_auc", "ctcvr_auc", "cvr_auc"]
        if num_heads == 2
        else ["ctr_auc", "ctcvr_auc", "ctcvr_logloss", "cvr_auc"]
    )
    no_conversion = evaluate(logits_NT, clicks_N, nothing_N)
    assert no_conversion["ctr_auc"] is not None
    assert no_conversion["ctcvr_auc"] is None
    all_convert = evaluate(logits_NT, clicks_N, clicks_N)
    assert all_convert["ctcvr_auc"] is not None
    assert all_convert["cvr_auc"] is None


@pytest.mark.parametrize("num_heads", [1, 2])
def test_no_rows_have_no_metrics(num_heads: int) -> None:
    metrics = evaluate(torch.zeros(0, num_heads), torch.zeros(0), torch.zeros(0))
    assert set(metrics.values()) == {None}


@pytest.mark.parametrize("column", [0, 1])
def test_nan_is_refused(column: int) -> None:
    logits_NT, clicks_N, conversions_N = split(50, 2)
    logits_NT[7, column] = torch.nan
    message = "1 of 50 predictions are NaN: the model has diverged; lower training.learning_rate"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(logits_NT, clicks_N, conversions_N)
    with pytest.raises(ValueError, match="1 of 50 predictions are NaN"):
        auc(logits_NT[:, column], clicks_N)
    with pytest.raises(ValueError, match="1 of 50 predictions are NaN"):
        logloss(logits_NT[:, column], clicks_N)


def test_probabilities_are_consistent() -> None:
    logits_NT = torch.randn(1000, 2) * 20
    predicted = probabilities(logits_NT)
    assert list(predicted) == ["pctr", "pctcvr", "pcvr"]
    for values_N in predicted.values():
        assert values_N.dtype == torch.float64
        assert values_N.min() >= 0
        assert values_N.max() <= 1
    ratio_N = (predicted["pctcvr"] / predicted["pctr"]).clamp(max=1.0)
    torch.testing.assert_close(predicted["pcvr"], ratio_N, rtol=1e-9, atol=1e-300)
    assert list(probabilities(logits_NT[:, :1])) == ["pctr"]


def test_other_numbers_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or 2 columns, got 3"):
        evaluate(torch.zeros(4, 3), torch.zeros(4), torch.zeros(4))
