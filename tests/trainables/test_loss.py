"""The loss against a float64 brute force over all pairs, and over two ranks against one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainables.loss import Gate, binary_cross_entropy, pwiser, training_loss

GATES = get_args(Gate)
IN_U, IN_C, IN_V = 0, 1, 2


def labels(kinds_N: Tensor) -> tuple[Tensor, Tensor]:
    """Clicks and conversions of impressions in U, C or V."""
    return kinds_N >= IN_C, kinds_N == IN_V


def brute_force(
    scores_N: Tensor, kinds_N: Tensor, m1: float, m2: float, gate: str, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Value and gradient over all pairs, one by one as the formula has them; float64."""
    scores_N = scores_N.detach().double()
    value, grad_N = torch.zeros((), dtype=torch.float64), torch.zeros_like(scores_N)
    rows_v = (kinds_N == IN_V).nonzero()[:, 0]
    for kind, margin in ((IN_C, m1), (IN_U, m2)):
        rows_a = (kinds_N == kind).nonzero()[:, 0]
        if len(rows_a) == 0 or len(rows_v) == 0:
            continue
        num_pairs = len(rows_a) * len(rows_v)
        for rows in rows_a.split(chunk):
            s_a, s_v = scores_N[rows, None], scores_N[None, rows_v]
            counts = s_v < (s_a + margin if gate == "hinge" else s_a - margin)
            gaps = torch.where(counts, s_a + margin - s_v, 0.0)
            value += gaps.square().sum() / num_pairs
            grad_N.index_add_(0, rows, 2 * gaps.sum(1) / num_pairs)
            grad_N.index_add_(0, rows_v, -2 * gaps.sum(0) / num_pairs)
    return value, grad_N


def ours(
    scores_N: Tensor, kinds_N: Tensor, m1: float, m2: float, gate: Gate
) -> tuple[Tensor, Tensor]:
    scores_N = scores_N.detach().clone().requires_grad_()
    loss = pwiser(scores_N, *labels(kinds_N), m1, m2, gate=gate)
    (grad_N,) = torch.autograd.grad(loss, scores_N)
    return loss.detach(), grad_N


def check(scores_N: Tensor, kinds_N: Tensor, m1: float, m2: float, gate: Gate) -> None:
    expected, expected_grad_N = brute_force(scores_N, kinds_N, m1, m2, gate)
    actual, actual_grad_N = ours(scores_N, kinds_N, m1, m2, gate)
    assert actual.dtype == actual_grad_N.dtype == scores_N.dtype
    # Squares of gaps below 1e-7 lie under float64's resolution of sums of scores near 1.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-14)
    scale = expected_grad_N.abs().max().item() if len(scores_N) else 0.0
    torch.testing.assert_close(
        actual_grad_N.double(), expected_grad_N, rtol=1e-6, atol=1e-10 * scale + 1e-15
    )


grid_scores = st.integers(0, 16).map(lambda sixteenth: sixteenth / 16)
any_scores = st.floats(0.0, 1.0, width=32)
margins = st.one_of(st.integers(0, 8).map(lambda sixteenth: sixteenth / 16), st.floats(0.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.one_of(grid_scores, any_scores), st.integers(0, 2)), max_size=30),
    m1=margins,
    m2=margins,
    gate=st.sampled_from(GATES),
)
def test_equals_brute_force(
    dtype: torch.dtype, rows: list[tuple[float, int]], m1: float, m2: float, gate: Gate
) -> None:
    scores_N = torch.tensor([score for score, _ in rows], dtype=dtype)
    check(scores_N, torch.tensor([kind for _, kind in rows], dtype=torch.int64), m1, m2, gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("num_rows", "click_rate", "conversion_rate"),
    [(50_000, 0.1, 0.05), (20_000, 0.5, 0.5), (2048, 0.02, 0.001)],
)
def test_equals_brute_force_on_large_batches(
    num_rows: int, click_rate: float, conversion_rate: float, gate: Gate
) -> None:
    generator = torch.Generator().manual_seed(0)
    chances_N = torch.rand(num_rows, generator=generator)
    kinds_N = (chances_N < click_rate).long() + (chances_N < conversion_rate).long()
    scores_N = torch.randn(num_rows, generator=generator).sub(2.0).sigmoid()
    check(scores_N, kinds_N, 0.3, 0.1, gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_close_scores_do_not_cancel(spread: float, gate: Gate) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_N = 0.9 + spread * torch.rand(500, generator=generator, dtype=torch.float64)
    check(scores_N, torch.arange(500) % 3, spread / 4, spread / 8, gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("missing", [IN_U, IN_C, IN_V])
def test_batch_without_one_kind_drops_its_term(missing: int, gate: Gate) -> None:
    kinds_N = torch.tensor([kind for kind in (IN_U, IN_C, IN_V) if kind != missing] * 6)
    scores_N = torch.linspace(0.1, 0.9, len(kinds_N))
    check(scores_N, kinds_N, 0.2, 0.1, gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kinds", [[IN_U, IN_C, IN_U, IN_C], [IN_V, IN_V], [IN_V], [IN_U], []])
def test_batch_without_pairs_has_zero_loss_and_gradient(kinds: list[int], gate: Gate) -> None:
    scores_N = torch.linspace(0.9, 0.1, len(kinds))
    loss, grad_N = ours(scores_N, torch.tensor(kinds, dtype=torch.int64), 0.3, 0.1, gate)
    assert loss.item() == 0.0
    assert torch.equal(grad_N, torch.zeros_like(grad_N))


@pytest.mark.parametrize("gate", GATES)
def test_all_scores_equal(gate: Gate) -> None:
    scores_N, kinds_N = torch.full((12,), 0.3), torch.arange(12) % 3
    check(scores_N, kinds_N, 0.25, 0.5, gate)
    loss, _ = ours(scores_N, kinds_N, 0.25, 0.5, gate)
    assert loss.item() == (0.25**2 + 0.5**2 if gate == "hinge" else 0.0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [IN_C, IN_U])
def test_pair_exactly_at_its_gate_does_not_count(kind: int, gate: Gate) -> None:
    kinds_N = torch.tensor([kind, IN_V])
    at_gate = 0.75 if gate == "hinge" else 0.25
    loss, grad_N = ours(torch.tensor([0.5, at_gate]), kinds_N, 0.25, 0.25, gate)
    assert loss.item() == 0.0
    assert not grad_N.any()
    below_gate = torch.nextafter(torch.tensor(at_gate), torch.tensor(0.0)).item()
    loss, grad_N = ours(torch.tensor([0.5, below_gate]), kinds_N, 0.25, 0.25, gate)
    assert grad_N[0] > 0 > grad_N[1]


def test_worked_example() -> None:
    # C: (0.7 + 0.3 - 0.6)^2 = 0.16; U: (0.55 + 0.1 - 0.6)^2 = 0.0025 and 0.2 + 0.1 < 0.6, halved.
    scores_N = torch.tensor([0.6, 0.7, 0.55, 0.2], dtype=torch.float64)
    kinds_N = torch.tensor([IN_V, IN_C, IN_U, IN_U])
    loss, _ = ours(scores_N, kinds_N, 0.3, 0.1, "hinge")
    assert loss.item() == pytest.approx(0.16 + 0.00125, rel=1e-12)
    # Literal: C needs 0.6 < 0.7 - 0.05: (0.7 + 0.05 - 0.6)^2; no U is that far above.
    loss, _ = ours(scores_N, kinds_N, 0.05, 0.1, "literal")
    assert loss.item() == pytest.approx(0.0225, rel=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_gradient_equals_finite_differences(gate: Gate) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_N = torch.rand(40, generator=generator, dtype=torch.float64).requires_grad_()
    clicks_N, conversions_N = labels(torch.arange(40) % 3)

    def loss(scores_N: Tensor) -> Tensor:
        return pwiser(scores_N, clicks_N, conversions_N, 0.3, 0.1, gate=gate)

    assert torch.autograd.gradcheck(loss, [scores_N])


def test_second_derivative_is_refused() -> None:
    scores_N = torch.rand(9, requires_grad=True)
    loss = pwiser(scores_N, *labels(torch.arange(9) % 3), 0.3, 0.1)
    with pytest.raises(RuntimeError, match="differentiable once: do not use create_graph"):
        torch.autograd.grad(loss, scores_N, create_graph=True)


@pytest.mark.parametrize("kinds", [[IN_V, IN_C, IN_U], [IN_U, IN_U, IN_U]])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_nan_score_makes_the_loss_nan(kinds: list[int], row: int) -> None:
    scores_N = torch.tensor([0.2, 0.5, 0.8])
    scores_N[row] = torch.nan
    assert pwiser(scores_N, *labels(torch.tensor(kinds)), 0.3, 0.1).isnan()


def test_order_of_impressions_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_N, kinds_N = torch.rand(99, generator=generator).round(decimals=1), torch.arange(99) % 3
    order_N = torch.randperm(99, generator=generator)
    loss, grad_N = ours(scores_N, kinds_N, 0.3, 0.1, "hinge")
    shuffled, shuffled_grad_N = ours(scores_N[order_N], kinds_N[order_N], 0.3, 0.1, "hinge")
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(shuffled_grad_N, grad_N[order_N])


@pytest.mark.parametrize("gate", GATES)
def test_margins_and_labels_of_any_type(gate: Gate) -> None:
    scores_N, kinds_N = torch.rand(60), torch.arange(60) % 3
    clicks_N, conversions_N = labels(kinds_N)
    expected = pwiser(scores_N, clicks_N, conversions_N, 0.25, 0.125, gate=gate)
    for dtype in (torch.int8, torch.int64, torch.float32):
        tensors = torch.tensor(0.25), torch.tensor(0.125)
        typed = clicks_N.to(dtype), conversions_N.to(dtype)
        assert torch.equal(pwiser(scores_N, *typed, *tensors, gate=gate), expected)


def test_bfloat16_scores_are_computed_wide() -> None:
    scores_N, kinds_N = torch.rand(60).bfloat16(), torch.arange(60) % 3
    loss = pwiser(scores_N, *labels(kinds_N), 0.3, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pwiser(scores_N.float(), *labels(kinds_N), 0.3, 0.1))


@pytest.mark.parametrize("gate", GATES)
def test_shapes_never_depend_on_values(gate: Gate) -> None:
    # The meta device holds no values: what reads one, or needs one for a shape, raises there.
    scores_N = torch.empty(64, device="meta", requires_grad=True)
    clicks_N = torch.empty(64, device="meta", dtype=torch.bool)
    loss = pwiser(scores_N, clicks_N, clicks_N, 0.3, torch.tensor(0.1, device="meta"), gate=gate)
    loss.backward()
    assert loss.shape == ()
    assert scores_N.grad.shape == (64,)


def test_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="gate must be one of hinge, literal, got 'soft'"):
        pwiser(torch.rand(3), *labels(torch.arange(3)), 0.3, 0.1, gate="soft")


def test_binary_cross_entropy_is_the_mean_over_heads() -> None:
    logits_BT = torch.randn(50, 2)
    clicks_B, conversions_B = labels(torch.arange(50) % 3)
    click = functional.binary_cross_entropy_with_logits(logits_BT[:, 0], clicks_B.float())
    conversion = functional.binary_cross_entropy_with_logits(logits_BT[:, 1], conversions_B.float())
    both = binary_cross_entropy(logits_BT, clicks_B, conversions_B)
    torch.testing.assert_close(both, (click + conversion) / 2)
    torch.testing.assert_close(binary_cross_entropy(logits_BT[:, :1], clicks_B, clicks_B), click)
    with pytest.raises(ValueError, match="1 or 2 columns, got 3"):
        binary_cross_entropy(torch.randn(50, 3), clicks_B, conversions_B)


@pytest.mark.parametrize("gate", get_args(Gate))
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("num_rows", [0, 1, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_loss_adds_its_parts(
    gate: Gate, num_heads: int, num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits_BT = torch.randn(num_rows, num_heads).to(dtype).requires_grad_()
    clicks_B, conversions_B = labels(torch.arange(num_rows) % 3)
    wide_BT = logits_BT.to(torch.promote_types(dtype, torch.float32))
    parts = (
        binary_cross_entropy(wide_BT, clicks_B, conversions_B),
        pwiser(torch.sigmoid(wide_BT[:, 0]), clicks_B, conversions_B, 0.3, 0.1, gate=gate),
    )
    losses = training_loss(
        logits_BT, clicks_B, conversions_B, torch.tensor(0.7), 0.3, 0.1, gate=gate
    )
    for found, part in zip(losses[1:], parts, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, part.detach(), equal_nan=True)
    total = parts[0] + 0.7 * parts[1]
    torch.testing.assert_close(losses.total, total, equal_nan=True)
    (expected_BT,) = torch.autograd.grad(total, logits_BT)
    (actual_BT,) = torch.autograd.grad(losses.total, logits_BT)
    assert actual_BT.dtype == dtype
    torch.testing.assert_close(actual_BT, expected_BT)


def test_training_loss_of_a_nan_logit_is_nan() -> None:
    logits_BT = torch.zeros(3, 2)
    logits_BT[1, 0] = torch.nan
    losses = training_loss(logits_BT, torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), 0.3, 0.3, 0.1)
    assert all(part.isnan() for part in losses)


def test_second_derivative_of_the_training_loss_is_refused() -> None:
    logits_BT = torch.randn(4, 2, requires_grad=True)
    total = training_loss(logits_BT, torch.ones(4), torch.zeros(4), 0.3, 0.3, 0.1).total
    with pytest.raises(RuntimeError, match="differentiable once: do not use create_graph"):
        torch.autograd.grad(total, logits_BT, create_graph=True)


def test_baseline_has_the_gradient_of_plain_bce() -> None:
    logits_BT = torch.randn(60, 2, requires_grad=True)
    clicks_B, conversions_B = labels(torch.arange(60) % 3)
    total = training_loss(logits_BT, clicks_B, conversions_B, 0.0, 0.3, 0.1).total
    (actual,) = torch.autograd.grad(total, logits_BT)
    bce = binary_cross_entropy(logits_BT, clicks_B, conversions_B)
    assert torch.equal(actual, torch.autograd.grad(bce, logits_BT)[0])


def test_two_ranks_have_the_loss_and_gradient_of_one(
    run_ranks: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    one, two = run_ranks("loss", tmp_path)
    assert one.keys() == two.keys()
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-12, atol=1e-14, msg=key)
    assert one["dense hinge loss"] > 0
    assert one["none on the first rank hinge gradient"] != 0
    assert one["no conversion hinge gradient"] == 0
