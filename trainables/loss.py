"""The training loss: binary cross entropy plus alpha times the PWiseR pairwise ranking loss.

PWiseR, exact over all pairs in O(N log N) time and O(N) memory. With s the click score, V the
converted impressions, C the clicked without conversion, U the not clicked:

    mean over (c in C, v in V) of [ s_v < s_c + m1 ] * (s_c + m1 - s_v)^2
    + mean over (u in U, v in V) of [ s_v < s_u + m2 ] * (s_u + m2 - s_v)^2

That is gate ``hinge``. Gate ``literal`` takes the source paper's sentence by the word: a pair
counts only where s_v < s_c - m1 (s_u - m2), with the same square.

How. For an anchor a in C or U with reach r = s_a + m, the pairs that count are the n scores of V
below its gate, and their squares add up to n r^2 - 2 r (sum of s_v) + (sum of s_v^2): prefix sums
over the sorted scores. The gradient with respect to s_v needs the number and the sum of the reaches
of the anchors whose gate lies above s_v: suffix sums over the same order, because adding a margin
keeps it, taken as the total less the prefix. Both sides come from one comparison, so that ties fall
the same way. All sums are in float64 and around the mean score of V, since the expanded squares
cancel. Shapes depend on N alone and nothing waits for the device.

Shape suffixes: N impressions of the global batch, A the two anchor kinds (U, C), K all three (U, C,
V), P powers, S rows to sum up, M = N + 1, X = A * N, B batch of this rank, T heads, W ranks.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.nn import functional

Gate = Literal["hinge", "literal"]
Scalar = float | Tensor
U, C, V = range(3)  # kinds of impressions, by how many of their labels are 1


class Losses(NamedTuple):
    """The loss and its two parts, 0-dim tensors.

    Attributes:
        total: ``bce + alpha * pwiser``; the only one with a gradient to take.
        bce: of this rank's batch, detached.
        pwiser: of the global batch, detached.
    """

    total: Tensor
    bce: Tensor
    pwiser: Tensor


def training_loss(
    logits_BT: Tensor,
    clicks_B: Tensor,
    conversions_B: Tensor,
    alpha: Scalar,
    m1: Scalar,
    m2: Scalar,
    *,
    gate: Gate = "hinge",
    group: ProcessGroup | None = None,
) -> Losses:
    """Return BCE + alpha * PWiseR of a batch, the score being the sigmoid of column 0.

    Tensors for alpha, m1 and m2 let one compiled step serve every trial.

    Args:
        logits_BT: a model's output, T = 1 or 2; computed on in float32 or wider.
        clicks_B: 0 or 1, any type.
        conversions_B: 0 or 1, any type; a conversion implies a click.
        alpha: weight of PWiseR, at least 0; with 0 its gradient is 0. A number, or a 0-dim tensor
            on the logits' device, as the margins are; none of them gets a gradient.
        m1: margin between converted and clicked, in score units.
        m2: margin between converted and not clicked, in score units.
        gate: which pairs count, see the module.
        group: the ranks that share the global batch, see `pwiser`; None for this process alone.

    Returns:
        total, bce and pwiser. Under data parallelism the mean of ``total`` over ranks is the loss
        of the global batch, and the mean of its parameter gradients (what DDP makes) is that loss's
        gradient.

    Raises:
        ValueError: T is neither 1 nor 2, or ``gate`` is no option.
    """
    _check_gate(gate)
    logits_BT = _at_least_float32(logits_BT)
    return Losses(
        *_TrainingLoss.apply(  # type: ignore[no-untyped-call]
            logits_BT, clicks_B, conversions_B, alpha, m1, m2, gate, group
        )
    )


def binary_cross_entropy(logits_BT: Tensor, clicks_B: Tensor, conversions_B: Tensor) -> Tensor:
    """Return the mean over impressions and heads of the binary cross entropy, in nats.

    Args:
        logits_BT: T = 1: clicks only; T = 2: clicks and conversions, equal weights.
        clicks_B: 0 or 1, any type.
        conversions_B: 0 or 1, any type.

    Returns:
        0-dim tensor, float32 or wider. NaN for NaN logits and for an empty batch.

    Raises:
        ValueError: T is neither 1 nor 2.
    """
    logits_BT = _at_least_float32(logits_BT)
    labels_BT = _labels(logits_BT, clicks_B, conversions_B)
    return functional.binary_cross_entropy_with_logits(logits_BT, labels_BT)


def pwiser(
    scores_N: Tensor,
    clicks_N: Tensor,
    conversions_N: Tensor,
    m1: Scalar,
    m2: Scalar,
    *,
    gate: Gate = "hinge",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return the PWiseR loss of a batch, exact over all pairs; formula and method: see the module.

    A term whose V, C or U is empty is exactly 0 with zero gradient. Ties: the comparisons are
    strict, so a pair at its gate does not count (under ``hinge`` its square is 0 anyway). A NaN
    score makes the loss NaN. Differentiable once, with respect to the scores only; a second
    derivative raises RuntimeError.

    Under data parallelism, with a ``group`` of W > 1 ranks, scores and labels are gathered (equally
    many on every rank) and each rank returns the loss of the global batch. The gradient that each
    rank passes to its own scores is its slice of the global one times W, because DDP averages
    gradients over ranks: W workers at batch B/W get the loss and the parameter gradients of one
    worker at batch B.

    Args:
        scores_N: click probabilities; any float type, computed on in float64.
        clicks_N: 0 or 1, any type.
        conversions_N: 0 or 1, any type; a conversion implies a click.
        m1: margin between V and C, in score units; a number, or a 0-dim tensor on the scores'
            device.
        m2: margin between V and U, likewise.
        gate: ``hinge`` or ``literal``.
        group: ranks that share the global batch; None for this process alone.

    Returns:
        0-dim tensor of the scores' type, at least float32.

    Raises:
        ValueError: ``gate`` is no option.
    """
    _check_gate(gate)
    scores_N = _at_least_float32(scores_N)
    loss: Tensor = _Pwiser.apply(  # type: ignore[no-untyped-call]
        scores_N, clicks_N, conversions_N, m1, m2, gate, group
    )
    return loss


class _TrainingLoss(torch.autograd.Function):
    """Values and gradient in closed form, all made in forward: autograd has nothing to keep."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits_BT: Tensor,
        clicks_B: Tensor,
        conversions_B: Tensor,
        alpha: Scalar,
        m1: Scalar,
        m2: Scalar,
        gate: Gate,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels_BT = _labels(logits_BT, clicks_B, conversions_B)
        bce = functional.binary_cross_entropy_with_logits(logits_BT, labels_BT)
        scores_BT = torch.sigmoid(logits_BT)
        scores_B = scores_BT[:, 0]
        ranking, ranking_grad_B = _of_global_batch(
            scores_B, clicks_B, conversions_B, (m1, m2), gate, group
        )
        grad_BT = (scores_BT - labels_BT) / labels_BT.numel()
        grad_BT[:, 0] += alpha * torch.ops.aten.sigmoid_backward(ranking_grad_B, scores_B)
        ctx.save_for_backward(grad_BT)
        ctx.mark_non_differentiable(bce, ranking)
        return bce + alpha * ranking, bce, ranking

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (grad_BT,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * grad_BT, None, None, None, None, None, None, None


class _Pwiser(torch.autograd.Function):
    """Value and gradient in closed form, both made in forward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        scores_B: Tensor,
        clicks_B: Tensor,
        conversions_B: Tensor,
        m1: Scalar,
        m2: Scalar,
        gate: Gate,
        group: ProcessGroup | None,
    ) -> Tensor:
        value, grad_B = _of_global_batch(scores_B, clicks_B, conversions_B, (m1, m2), gate, group)
        ctx.save_for_backward(grad_B)
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (grad_B,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * grad_B, None, None, None, None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True; once_differentiable would pass it by
        raise RuntimeError("the PWiseR loss is differentiable once: do not use create_graph")


def _of_global_batch(
    scores_B: Tensor,
    clicks_B: Tensor,
    conversions_B: Tensor,
    margins: tuple[Scalar, Scalar],
    gate: Gate,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """PWiseR over all ranks, and its gradient for this rank's scores; both of the scores' type."""
    kinds_B = clicks_B.to(torch.uint8) + conversions_B.to(torch.uint8)
    scores_N, kinds_N = _gather(scores_B, kinds_B, group)
    value, grad_N = _value_and_gradient(scores_N, kinds_N, margins, gate)
    if group is not None and group.size() > 1:
        size = scores_B.shape[0]
        grad_N = grad_N.narrow(0, group.rank() * size, size) * group.size()
    return value.to(scores_B.dtype), grad_N.to(scores_B.dtype)


def _gather(scores_B: Tensor, kinds_B: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Every rank's scores and kinds in rank order, by one collective."""
    if group is None or group.size() == 1:
        return scores_B, kinds_B
    local = torch.stack([scores_B, kinds_B.to(scores_B.dtype)])
    ranks = local.new_empty((group.size() * local.shape[0], local.shape[1]))
    distributed.all_gather_single(ranks, local, group=group)
    scores_WB, kinds_WB = ranks.view(group.size(), *local.shape).unbind(1)
    return scores_WB.flatten(), kinds_WB.flatten().to(kinds_B.dtype)


def _value_and_gradient(
    scores_N: Tensor, kinds_N: Tensor, margins: tuple[Scalar, Scalar], gate: Gate
) -> tuple[Tensor, Tensor]:
    """PWiseR and its gradient with respect to the scores, float64.

    At usual batches its time is that of the number of operations, on a GPU above all.
    """
    sorted_N, order_N = scores_N.sort()
    sorted_N = sorted_N.double()
    kinds_K1 = torch.arange(3, dtype=kinds_N.dtype, device=kinds_N.device).unsqueeze(1)
    in_KN = (kinds_N.index_select(0, order_N) == kinds_K1).double()
    num_K = in_KN.sum(1).clamp(min=1.0)
    in_v_N, num_v = in_KN[V], num_K[V]
    weight_AN = in_KN[:2] / (num_v * num_K[:2]).unsqueeze(1)

    m1, m2 = margins
    margin_A1 = _column([m2, m1], sorted_N)
    reach_AN = sorted_N + margin_A1
    gate_AN = reach_AN if gate == "hinge" else sorted_N - margin_A1
    num_below_AN = torch.searchsorted(sorted_N, gate_AN)
    first_above_AN = _count_up_to(num_below_AN)[:, :-1]
    center = torch.dot(in_v_N, sorted_N) / num_v
    score_N = sorted_N - center
    reach_AN = reach_AN - center

    in_v_score_N = in_v_N * score_N
    powers_PN = [in_v_N, in_v_score_N, in_v_score_N * score_N]
    anchors_SN = [*weight_AN, *(weight_AN * reach_AN)]
    # Sums of the first 0, 1, ... N values of each row.
    sums_SM = functional.pad(torch.stack([*powers_PN, *anchors_SN]).cumsum(1), (1, 0))

    # Each anchor against the scores of V below its gate: their number, sum and sum of squares.
    below_PX = sums_SM[:3].gather(1, num_below_AN.view(1, -1).expand(3, -1))
    count_AN, sum_AN, squares_AN = below_PX.view(3, 2, -1).unbind(0)
    excess_AN = torch.addcmul(sum_AN, count_AN, reach_AN, value=-1.0)  # sum of s_v - r
    square_AN = torch.addcmul(squares_AN, excess_AN + sum_AN, reach_AN, value=-1.0)
    value = torch.dot(weight_AN.flatten(), square_AN.flatten()).clamp(min=0.0)

    # Each score of V against the anchors whose gate lies above it: their weight and reach.
    anchors_2AM = sums_SM[3:].view(2, 2, -1)
    not_above_2AN = anchors_2AM.gather(2, first_above_AN.expand(2, -1, -1))
    above_AN, reaches_AN = (anchors_2AM[:, :, -1:] - not_above_2AN).unbind(0)
    pull_AN = torch.addcmul(reaches_AN, above_AN, score_N, value=-1.0)

    grad_N = -2.0 * torch.addcmul(in_v_N * pull_AN, weight_AN, excess_AN).sum(0)
    return value, torch.empty_like(grad_N).scatter_(0, order_N, grad_N)


def _count_up_to(values_AN: Tensor) -> Tensor:
    """How many values of each row are at most 0, 1, ... N."""
    num_rows, num_values = values_AN.shape
    counts = values_AN.new_zeros(num_rows, num_values + 1)
    return counts.scatter_(1, values_AN, 1, reduce="add").cumsum(1)


def _column(values: Sequence[Scalar], like: Tensor) -> Tensor:
    """Numbers or 0-dim tensors below each other, without waiting for the device."""
    tensors = [value if isinstance(value, Tensor) else like.new_full((), value) for value in values]
    return torch.stack(tensors).unsqueeze(1)


def _labels(logits_BT: Tensor, clicks_B: Tensor, conversions_B: Tensor) -> Tensor:
    num_heads = logits_BT.shape[1]
    if num_heads not in {1, 2}:
        raise ValueError(f"logits_BT must have 1 or 2 columns, got {num_heads}")
    labels_BT = torch.stack([clicks_B, conversions_B][:num_heads], dim=1)
    return labels_BT.to(logits_BT.dtype)


def _check_gate(gate: str) -> None:
    if gate not in get_args(Gate):
        raise ValueError(f"gate must be one of {', '.join(get_args(Gate))}, got {gate!r}")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
