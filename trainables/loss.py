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
keeps it. Both sides compare the very same numbers, so that ties fall the same way. All sums are in
float64 and around the mean score of V, since the expanded squares cancel. Shapes depend on N alone
and nothing waits for the device.

Shape suffixes: N impressions of the global batch, A the two anchor kinds (C, U), K all three (V, C,
U), L labels, P powers, X = A * N, B batch of this rank, T heads, W ranks.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.nn import functional

Gate = Literal["hinge", "literal"]
Scalar = float | Tensor


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
        alpha: weight of PWiseR, at least 0; with 0 its gradient is 0. Neither it nor the margins
            get a gradient.
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
        m1: margin between V and C, in score units; a number or a 0-dim tensor.
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
        grad_BT[:, 0] += alpha * ranking_grad_B * (scores_B * (1.0 - scores_B))
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
    margins_A: tuple[Scalar, Scalar],
    gate: Gate,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """PWiseR over all ranks, and its gradient for this rank's scores; both of the scores' type."""
    scores_N, clicks_N, conversions_N = _gather(scores_B, clicks_B, conversions_B, group)
    value, grad_N = _value_and_gradient(scores_N, clicks_N, conversions_N, margins_A, gate)
    if group is not None and group.size() > 1:
        size = scores_B.shape[0]
        grad_N = grad_N.narrow(0, group.rank() * size, size) * group.size()
    return value.to(scores_B.dtype), grad_N.to(scores_B.dtype)


def _gather(
    scores_B: Tensor, clicks_B: Tensor, conversions_B: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every rank's scores and labels in rank order, by one collective."""
    if group is None or group.size() == 1:
        return scores_B, clicks_B.bool(), conversions_B.bool()
    local = torch.stack([scores_B, clicks_B.to(scores_B.dtype), conversions_B.to(scores_B.dtype)])
    ranks = local.new_empty((group.size() * local.shape[0], local.shape[1]))
    distributed.all_gather_single(ranks, local, group=group)
    scores_WB, clicks_WB, conversions_WB = ranks.view(group.size(), *local.shape).unbind(1)
    return scores_WB.flatten(), clicks_WB.flatten().bool(), conversions_WB.flatten().bool()


def _value_and_gradient(
    scores_N: Tensor,
    clicks_N: Tensor,
    conversions_N: Tensor,
    margins_A: tuple[Scalar, Scalar],
    gate: Gate,
) -> tuple[Tensor, Tensor]:
    """PWiseR and its gradient with respect to the scores, float64."""
    sorted_N, order_N = scores_N.sort()
    sorted_N = sorted_N.double()
    labels_LN = torch.stack([conversions_N, clicks_N])
    in_v_N, clicked_N = labels_LN.gather(1, order_N.expand(2, -1)).unbind(0)
    in_KN = torch.stack([in_v_N, clicked_N > in_v_N, ~(clicked_N | in_v_N)]).double()
    num_K = in_KN.sum(1).clamp(min=1.0)
    in_v_N, num_v = in_KN[0], num_K[0]
    weight_AN = in_KN[1:] / (num_v * num_K[1:]).unsqueeze(1)

    reach_AN = torch.stack([sorted_N + margin for margin in margins_A])
    gate_AN = reach_AN
    if gate == "literal":
        gate_AN = torch.stack([sorted_N - margin for margin in margins_A])
    num_below_AN = torch.searchsorted(sorted_N, gate_AN)
    first_above_AN = torch.searchsorted(gate_AN, sorted_N.repeat(2, 1), right=True)
    center = torch.dot(in_v_N, sorted_N) / num_v
    score_N = sorted_N - center
    reach_AN = reach_AN - center

    # Each anchor against the scores of V below its gate: their number, sum and sum of squares.
    in_v_score_N = in_v_N * score_N
    powers_PN = torch.stack([in_v_N, in_v_score_N, in_v_score_N * score_N])
    below_PX = _prefix_sums(powers_PN).gather(1, num_below_AN.view(1, -1).expand(3, -1))
    count_AN, sum_AN, squares_AN = below_PX.view(3, 2, -1).unbind(0)
    distance_AN = count_AN * reach_AN - sum_AN
    square_AN = torch.addcmul(squares_AN, distance_AN - sum_AN, reach_AN)
    value = (weight_AN * square_AN).sum().clamp(min=0.0)

    # Each score of V against the anchors whose gate lies above it: their weight and reach.
    anchors_AN = torch.stack([weight_AN, weight_AN * reach_AN], dim=1)
    index_AN = first_above_AN.unsqueeze(1).expand(-1, 2, -1)
    above_AN, reaches_AN = _suffix_sums(anchors_AN).gather(2, index_AN).unbind(1)
    push_AN = in_v_N * (above_AN * score_N - reaches_AN)

    grad_N = 2.0 * torch.addcmul(push_AN, weight_AN, distance_AN).sum(0)
    return value, torch.empty_like(grad_N).scatter_(0, order_N, grad_N)


def _prefix_sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... N values along the last dimension."""
    return functional.pad(values.cumsum(-1), (1, 0))


def _suffix_sums(values: Tensor) -> Tensor:
    """Sums of the values from 0, 1, ... N on along the last dimension.

    Summed from the end, not as total less prefix: where nothing is left the sum is exactly 0.
    """
    return functional.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1))


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
