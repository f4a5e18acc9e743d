"""Metrics of a whole split: AUC and log loss, exact and tie-aware, in float64.

Computed from all rows at once on the device that holds them, never averaged over batches. A metric
that is undefined (an AUC with one class only, anything of no rows) is None, never 0 or 0.5.

Shape suffixes: N impressions, T heads, P positives, M negatives.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

METRICS = ("ctr_auc", "ctr_logloss", "ctcvr_auc", "ctcvr_logloss", "cvr_auc")


def auc(scores_N: Tensor, labels_N: Tensor) -> float | None:
    """Return the area under the ROC curve: P(positive above negative) + P(tie) / 2.

    Args:
        scores_N: any float type, any monotone scale; infinities rank as such.
        labels_N: 0 or 1, any type.

    Returns:
        AUC between 0 and 1; None unless both classes occur.

    Raises:
        ValueError: a score is NaN.
    """
    labels_N = labels_N.bool()
    return _read({"auc": _auc(scores_N, labels_N, ~labels_N)}, scores_N)["auc"]


def logloss(logits_N: Tensor, labels_N: Tensor) -> float | None:
    """Return the mean negative log likelihood of the labels, in nats.

    Args:
        logits_N: logits, not probabilities: finite losses however sure the model is.
        labels_N: 0 or 1, any type.

    Returns:
        mean loss, at least 0; None for no rows.

    Raises:
        ValueError: a logit is NaN.
    """
    return _read({"logloss": _logloss(logits_N, labels_N)}, logits_N)["logloss"]


def probabilities(logits_NT: Tensor) -> dict[str, Tensor]:
    """Return what an exported model predicts, float64.

    Args:
        logits_NT: a model's output, T = 1 (clicks) or 2 (clicks, conversions over all impressions).

    Returns:
        ``pctr`` of p(click); with T = 2 also ``pctcvr`` of p(conversion) over all impressions and
        ``pcvr`` of p(conversion | click), which is pctcvr / pctr and at most 1 (a direct second
        tower may claim more conversions than clicks). NaN stays NaN.

    Raises:
        ValueError: T is neither 1 nor 2.
    """
    num_heads = logits_NT.shape[1]
    if num_heads not in {1, 2}:
        raise ValueError(f"logits_NT must have 1 or 2 columns, got {num_heads}")
    logits = logits_NT.double().unbind(1)
    predictions = {"pctr": torch.sigmoid(logits[0])}
    if num_heads == 2:
        log_ratio_N = functional.logsigmoid(logits[1]) - functional.logsigmoid(logits[0])
        predictions["pctcvr"] = torch.sigmoid(logits[1])
        predictions["pcvr"] = log_ratio_N.clamp(max=0.0).exp()
    return predictions


def evaluate(logits_NT: Tensor, clicks_N: Tensor, conversions_N: Tensor) -> dict[str, float | None]:
    """Return all metrics of a split.

    AUCs rank by the very numbers that `probabilities` exports. A single-task model's one score
    ranks for all three, and its conversion log loss is undefined: the score is no conversion
    probability.

    Args:
        logits_NT: a model's output over the whole split, T = 1 or 2.
        clicks_N: 0 or 1, any type.
        conversions_N: 0 or 1, any type; a conversion implies a click.

    Returns:
        ``ctr_auc`` and ``ctr_logloss`` (clicks, all impressions), ``ctcvr_auc`` and
        ``ctcvr_logloss`` (conversions, all impressions), ``cvr_auc`` (conversions among clicked
        impressions only). None where undefined.

    Raises:
        ValueError: a logit is NaN, or T is neither 1 nor 2.
    """
    predictions = probabilities(logits_NT)
    clicked_N, converted_N = clicks_N.bool(), conversions_N.bool()
    pctr_N = predictions["pctr"]
    pctcvr_N = predictions.get("pctcvr", pctr_N)
    pcvr_N = predictions.get("pcvr", pctr_N)
    values = {
        "ctr_auc": _auc(pctr_N, clicked_N, ~clicked_N),
        "ctr_logloss": _logloss(logits_NT[:, 0], clicked_N),
        "ctcvr_auc": _auc(pctcvr_N, converted_N, ~converted_N),
        "ctcvr_logloss": torch.full_like(pctr_N.sum(), torch.nan),
        "cvr_auc": _auc(pcvr_N, converted_N, clicked_N & ~converted_N),
    }
    if logits_NT.shape[1] == 2:
        values["ctcvr_logloss"] = _logloss(logits_NT[:, 1], converted_N)
    return _read(values, logits_NT)


def _auc(scores_N: Tensor, positive_N: Tensor, negative_N: Tensor) -> Tensor:
    """AUC of positives over negatives, 0-dim float64; rows in neither class do not count.

    Each positive beats the negatives below it and half of those that tie with it. All counts are
    whole numbers below 2^53: exact for 10^7 positives among 10^8 rows.
    """
    positives_P, negatives_M = scores_N[positive_N], scores_N[negative_N].sort().values
    num_below = torch.searchsorted(negatives_M, positives_P).sum()
    num_not_above = torch.searchsorted(negatives_M, positives_P, right=True).sum()
    num_pairs = len(positives_P) * len(negatives_M)
    return (num_below + num_not_above).double() / (2.0 * num_pairs)  # 0 / 0 is NaN: undefined


def _logloss(logits_N: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of log(1 + e^z) - y z, 0-dim float64; NaN for no rows."""
    logits_N = logits_N.double()
    return functional.binary_cross_entropy_with_logits(logits_N, labels_N.double())


def _read(values: dict[str, Tensor], predictions: Tensor) -> dict[str, float | None]:
    """Bring all values to the host at once; NaN is undefined, a NaN prediction an error."""
    num_nan = predictions.unsqueeze(-1).flatten(1).isnan().any(1).sum().double()
    *numbers, num_nan_read = torch.stack([*values.values(), num_nan]).tolist()
    if num_nan_read > 0:
        raise ValueError(
            f"{int(num_nan_read)} of {len(predictions)} predictions are NaN: "
            "the model has diverged; lower training.learning_rate"
        )
    return {
        name: None if math.isnan(number) else number
        for name, number in zip(values, numbers, strict=True)
    }
