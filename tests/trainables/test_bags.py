"""Bags in the models: the mean over a field's ids, in every form of every architecture."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainables.execution import fold_embeddings
from trainables.models import MODELS, Inputs
from trainables.models.bags import Bags
from trainables.models.embedding import FeatureEmbedding

INPUTS = Inputs((7, 30, 3, 12), num_numericals=4, bag_lengths=(1, 5, 1, 3))
NUM_ROWS = 20
SIZES: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_units": (9, 8)},
    "mmoe": {"expert_units": (9, 8), "num_experts": 3, "gate_units": (5,)},
    "ple": {"expert_units": (9, 8), "num_experts": 3, "gate_units": (5,)},
    "dnn": {"hidden_units": (9, 8)},
    "masknet": {"hidden_units": (9, 8)},
}
BLOCKS = [(0, 1, 2, 3, 4), (0, 2), (1, 2), (1, 3), (3, 4)]


def random_bags(inputs: Inputs, num_rows: int, dtype: torch.dtype = torch.int8) -> Tensor:
    columns = []
    for size, length in zip(inputs.vocabulary_sizes, inputs.bag_lengths, strict=True):
        ids_BL = torch.randint(size, (num_rows, length))
        num_ids_B1 = torch.randint(1, length + 1, (num_rows, 1))
        columns.append(ids_BL.where(torch.arange(length) < num_ids_B1, -1))
    return torch.cat(columns, 1).to(dtype)


def rows_of(ids_BC: Tensor, inputs: Inputs) -> list[list[list[int]]]:
    """Ids per impression and field, without the padding."""
    parts = [part.tolist() for part in ids_BC.split(list(inputs.bag_lengths), 1)]
    return [[[i for i in ids if i >= 0] for ids in row] for row in zip(*parts, strict=True)]


@st.composite
def shapes(draw: st.DrawFn) -> Inputs:
    fields = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4))
    return Inputs(tuple(s for s, _ in fields), 0, tuple(length for _, length in fields))


@settings(max_examples=50, deadline=None)
@given(shapes(), st.integers(1, 5), st.sampled_from((torch.int8, torch.int64)), st.booleans())
def test_pooled_vectors_and_gradients_are_those_of_a_loop(
    inputs: Inputs, num_rows: int, dtype: torch.dtype, sparse: bool
) -> None:
    sizes = inputs.vocabulary_sizes
    offsets = [sum(sizes[:field]) for field in range(len(sizes))]
    table = torch.nn.Embedding(sum(sizes), 3, dtype=torch.float64, sparse=sparse)
    table_VE = table.weight
    ids_BC = random_bags(inputs, num_rows, dtype)
    pooled_BFE = Bags(inputs.bag_lengths, offsets).pool(table, ids_BC)
    looped = [
        torch.stack([table_VE[offsets[field] + i] for i in ids]).sum(0) / len(ids)
        for row in rows_of(ids_BC, inputs)
        for field, ids in enumerate(row)
    ]
    expected_BFE = torch.stack(looped).view_as(pooled_BFE)
    torch.testing.assert_close(pooled_BFE, expected_BFE, rtol=1e-12, atol=1e-12)
    probe_BFE = torch.randn_like(pooled_BFE)
    (gradient_VE,) = torch.autograd.grad((pooled_BFE * probe_BFE).sum(), table_VE)
    (expected_VE,) = torch.autograd.grad((expected_BFE * probe_BFE).sum(), table_VE)
    if sparse:  # the rows of the bags' ids and no others, so that sparse Adam moves no others
        gradient_VE = gradient_VE.coalesce()
        read = {
            offsets[field] + i
            for row in rows_of(ids_BC, inputs)
            for field, ids in enumerate(row)
            for i in ids
        }
        assert set(gradient_VE.indices()[0].tolist()) == read
        gradient_VE = gradient_VE.to_dense()
    torch.testing.assert_close(gradient_VE, expected_VE, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    bags = Bags((2, 1, 3), (0, 4, 9))
    ids_BC = torch.tensor([[0, -1, 2, 1, 1, -1], [3, 0, 4, 0, 1, 2]])
    table = torch.nn.Embedding(12, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda _: bags.pool(table, ids_BC), table.weight)


def test_padding_has_no_weight_and_no_gradient() -> None:
    bags = Bags((4,), (0,))
    ids_BC = torch.tensor([[2, 3, -1, -1], [2, -1, -1, -1]])
    assert bags.weights(ids_BC, torch.float32).tolist() == [[0.5, 0.5, 0, 0], [1, 0, 0, 0]]
    table = torch.nn.Embedding(4, 2)
    bags.pool(table, ids_BC).sum().backward()  # type: ignore[no-untyped-call]
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 0, 1.5, 0.5]


def build(name: str, inputs: Inputs = INPUTS, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name](inputs, embedding_dim=6, **SIZES[name], **options)


def outputs_and_gradients(model: torch.nn.Module, ids: Tensor, numericals: Tensor) -> list[Tensor]:
    logits_BT = model(ids, numericals)
    probe_BT = torch.linspace(-1, 2, logits_BT.numel(), dtype=logits_BT.dtype).view_as(logits_BT)
    gradients = torch.autograd.grad((logits_BT * probe_BT).sum(), list(model.parameters()))
    return [logits_BT, *gradients]


@pytest.mark.parametrize("numericals", ["project", "embed"])
@pytest.mark.parametrize("name", MODELS)
def test_folded_bags_equal_plain_ones(name: str, numericals: str) -> None:
    model = build(name, numericals=numericals).double()
    ids_BC = random_bags(INPUTS, NUM_ROWS)
    values_BN = torch.randn(NUM_ROWS, 4, dtype=torch.float64)
    plain = outputs_and_gradients(model, ids_BC, values_BN)
    for blocks in BLOCKS:
        for module in model.modules():
            if isinstance(module, FeatureEmbedding):
                module.fold(blocks)
        folded = outputs_and_gradients(model, ids_BC, values_BN)
        for one, other in zip(folded, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("folding", ["on", "off"])
def test_bfloat16_stays_near_float32(folding: Any) -> None:
    model = build("dnn")
    ids_BC, values_BN = random_bags(INPUTS, NUM_ROWS), torch.randn(NUM_ROWS, 4)
    exact_BT = model(ids_BC, values_BN)
    fold_embeddings(model, folding, NUM_ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        rough_BT = model(ids_BC, values_BN)
    torch.testing.assert_close(rough_BT.float(), exact_BT, rtol=0.02, atol=0.02)


def test_a_bag_of_one_id_is_a_field_of_one_id() -> None:
    single = Inputs((7, 30, 3, 12), num_numericals=4)
    plain = build("mmoe", single)
    bagged = build("mmoe")
    bagged.load_state_dict(plain.state_dict(), strict=False)
    ids_BF = torch.stack([torch.randint(s, (NUM_ROWS,)) for s in single.vocabulary_sizes], 1)
    empty = torch.full((NUM_ROWS, 4), -1)
    ids_BC = torch.cat([ids_BF[:, :2], empty, ids_BF[:, 2:], empty[:, :2]], 1)
    values_BN = torch.randn(NUM_ROWS, 4)
    torch.testing.assert_close(bagged(ids_BC, values_BN), plain(ids_BF, values_BN))


def test_models_without_bags_have_the_state_that_they_had() -> None:
    state = build("dnn", Inputs((7, 30), num_numericals=4)).state_dict()
    assert {key for key in state if key.startswith("embedding.")} == {
        "embedding.offsets_F",
        "embedding.table.weight",
        "embedding.projection.weight",
        "embedding.projection.bias",
    }


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((1,), r"bag_lengths must have one length for each of 2 fields, got 1"),
        ((1, 0), r"bag_lengths\[1\] must be at least 1, got 0"),
    ],
)
def test_lengths_that_fit_no_field_are_refused(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inputs((3, 4), num_numericals=0, bag_lengths=lengths)
