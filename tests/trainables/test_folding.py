"""The folded form of every architecture: the same outputs and gradients as the plain one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.execution import Folding, fold_embeddings
from trainables.models import MODELS, Inputs
from trainables.models.embedding import FeatureEmbedding
from trainables.models.folded_input import Indicators, linear_side_by_side

INPUTS = Inputs(vocabulary_sizes=(7, 30, 3), num_numericals=4)
NUM_ROWS = 50
SIZES: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_units": (9, 8)},
    "mmoe": {"expert_units": (9, 8), "num_experts": 3, "gate_units": (5,)},
    "ple": {"expert_units": (9, 8), "num_experts": 3, "gate_units": (5,)},
    "dnn": {"hidden_units": (9, 8)},
    "masknet": {"hidden_units": (9, 8)},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in MODELS),
    *((name, {"numericals": "embed"}) for name in MODELS),
    *((name, {"batch_norm": True}) for name in MODELS),
    ("mmoe", {"gate_units": ()}),
    ("ple", {"num_levels": 3, "num_task_experts": 2, "gate_units": ()}),
    ("masknet", {"variant": "parallel"}),
]
BLOCKS = [(0, 1, 2, 3), (0, 2), (1, 3), (3,)]


def features(dtype: torch.dtype, inputs: Inputs = INPUTS) -> tuple[Tensor, Tensor]:
    columns = [torch.randint(size, (NUM_ROWS,)) for size in inputs.vocabulary_sizes]
    ids_BF = (
        torch.stack(columns, 1).to(torch.int8)
        if columns
        else torch.empty(NUM_ROWS, 0, dtype=torch.int8)
    )
    return ids_BF, torch.randn(NUM_ROWS, inputs.num_numericals, dtype=dtype)


def outputs_and_gradients(model: torch.nn.Module, ids: Tensor, numericals: Tensor) -> list[Tensor]:
    logits_BT = model(ids, numericals)
    probe_BT = torch.linspace(-1, 2, logits_BT.numel(), dtype=logits_BT.dtype).view_as(logits_BT)
    gradients = torch.autograd.grad((logits_BT * probe_BT).sum(), list(model.parameters()))
    return [logits_BT, *gradients]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_folded_form_equals_the_plain_form(
    name: str, settings: dict[str, Any], blocks: tuple[int, ...]
) -> None:
    for dtype, rtol, atol in ((torch.float64, 1e-8, 1e-10), (torch.float32, 1e-3, 1e-4)):
        torch.manual_seed(0)
        model = MODELS[name](INPUTS, embedding_dim=6, **SIZES[name] | settings).to(dtype)
        ids_BF, numericals_BN = features(dtype)
        plain = outputs_and_gradients(model, ids_BF, numericals_BN)
        for module in model.modules():
            if isinstance(module, FeatureEmbedding):
                module.fold(blocks)
        folded = outputs_and_gradients(model, ids_BF, numericals_BN)
        for one, other in zip(folded, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("inputs", [Inputs((5, 9), 0), Inputs((), 3), Inputs((1, 4), 0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_folds_one_kind_of_feature_alone(name: str, inputs: Inputs, batch_norm: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name](inputs, embedding_dim=6, **SIZES[name], batch_norm=batch_norm).double()
    ids_BF, numericals_BN = features(torch.float64, inputs)
    plain = outputs_and_gradients(model, ids_BF, numericals_BN)
    fold_embeddings(model, "on", NUM_ROWS)
    folded = outputs_and_gradients(model, ids_BF, numericals_BN)
    for one, other in zip(folded, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("blocks", [(0, 1, 2, 3), (0,)], ids=str)
def test_weights_may_lie_in_any_layout(blocks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    embedding = FeatureEmbedding(INPUTS, 6, "project").double()
    weight_KDH = torch.randn(3, embedding.num_outputs, 200, dtype=torch.float64).requires_grad_()
    ids_BF, numericals_BN = features(torch.float64)
    found = []
    for folded in ((), blocks):
        embedding.fold(folded)
        x = embedding.concatenate(ids_BF, numericals_BN)
        hidden_KBH = linear_side_by_side(x, weight_KDH.transpose(1, 2), None)
        found.append((hidden_KBH, *torch.autograd.grad(hidden_KBH.square().sum(), weight_KDH)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("folding", ["on", "off"])
@pytest.mark.parametrize("name", MODELS)
def test_no_impressions_have_no_logits(name: str, folding: Folding) -> None:
    model = MODELS[name](INPUTS, embedding_dim=6, **SIZES[name])
    fold_embeddings(model, folding, NUM_ROWS)
    ids_BF, numericals_BN = features(torch.float32)
    assert model(ids_BF[:0], numericals_BN[:0]).shape == (0, MODELS[name].num_heads)


@pytest.mark.parametrize("name", MODELS)
def test_folding_leaves_the_state_dict_alone(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](INPUTS, embedding_dim=6, **SIZES[name])
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    fold_embeddings(model, "on", NUM_ROWS)
    assert model.state_dict().keys() == plain.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain[key])


def folded_blocks(
    sizes: tuple[int, ...], num_numericals: int, width: int, folding: Folding, rows: int = 2048
) -> tuple[int, ...]:
    model = MODELS["dnn"](Inputs(sizes, num_numericals), embedding_dim=width)
    fold_embeddings(model, folding, rows)
    embedding = model.get_submodule("embedding")
    assert isinstance(embedding, FeatureEmbedding)
    if embedding.folding is None:
        return ()
    numericals = (len(sizes),) if embedding.folding.numericals else ()
    return (*embedding.folding.fields, *numericals)


def test_auto_folds_small_vocabularies_under_wide_embeddings() -> None:
    assert folded_blocks((100,) * 4, 63, 128, "auto") == (0, 1, 2, 3, 4)
    assert folded_blocks((100, 10_000, 40), 63, 128, "auto") == (0, 2, 3)
    assert folded_blocks((1_000,) * 4, 63, 128, "auto") == (0, 1, 2, 3, 4)  # gathered on a CPU
    assert folded_blocks((100,) * 4, 63, 32, "auto") == (0, 1, 2, 3)


def test_auto_leaves_what_does_not_pay() -> None:
    assert folded_blocks((40,) * 16, 63, 8, "auto") == ()
    assert folded_blocks((10, 100_000, 100_000, 100_000), 0, 128, "auto") == ()
    assert folded_blocks((100,) * 4, 63, 128, "auto", rows=32) == ()


def test_on_and_off_are_taken_by_the_word() -> None:
    assert folded_blocks((100, 5), 3, 128, "off") == ()
    assert folded_blocks((10_000, 5), 3, 8, "on") == (0, 1, 2)


def test_unknown_block_is_refused() -> None:
    embedding = FeatureEmbedding(INPUTS, 4, "project")
    with pytest.raises(ValueError, match=r"blocks must be within 0 to 3, got \[4\]"):
        embedding.fold([4])


@pytest.mark.parametrize("num_ones", [1, 2])
@pytest.mark.parametrize("weights", [None, torch.rand(50, 3, dtype=torch.float64)])
def test_gathering_equals_the_product_with_the_indicators(
    weights: Tensor | None, num_ones: int
) -> None:
    torch.manual_seed(0)
    rows_BC = torch.randint(6, (50, 3)) + torch.tensor([0, 6, 12])  # rows 18 and 19 are not read
    dense_BM = torch.cat([torch.randn(50, 2), torch.ones(50, 2)], dim=1).double()
    x = Indicators(rows_BC=rows_BC, weights_BC=weights, num_rows=20, dense_BM=dense_BM)
    folded_KXH = torch.randn(3, 22 + num_ones, 7, dtype=torch.float64, requires_grad=True)
    probe_KBH = torch.randn(3, 50, 7, dtype=torch.float64)
    found_KBH = x.product(folded_KXH)
    (found,) = torch.autograd.grad((found_KBH * probe_KBH).sum(), folded_KXH)
    wanted_KBH = x._matrix(torch.float64)[:, : 22 + num_ones] @ folded_KXH
    (wanted,) = torch.autograd.grad((wanted_KBH * probe_KBH).sum(), folded_KXH)
    torch.testing.assert_close(found_KBH, wanted_KBH)
    torch.testing.assert_close(found, wanted)
