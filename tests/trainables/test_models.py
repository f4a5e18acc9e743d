"""Every architecture meets the contract and equals its definition, computed plainly with loops."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.contract import ModelContract
from trainables.models import DNN, MODELS, PLE, Inputs, MaskNet, MMoE, SharedBottom
from trainables.models.batch_norm import BatchNorm
from trainables.models.embedding import FeatureEmbedding
from trainables.models.gates import Gates
from trainables.models.heads import Towers, product_logit
from trainables.models.linears import linears
from trainables.models.mlp import MLP, Linear, ParallelLinear

INPUTS = Inputs(vocabulary_sizes=(7, 30, 3), num_numericals=4)
SMALL = {"embedding_dim": 8, "expert_units": (16, 12), "num_experts": 3}


class TestSharedBottom(ModelContract):
    model = SharedBottom


class TestMMoE(ModelContract):
    model = MMoE


class TestPLE(ModelContract):
    model = PLE


class TestDNN(ModelContract):
    model = DNN


class TestMaskNet(ModelContract):
    model = MaskNet


class TestParallelMaskNet(ModelContract):
    model = MaskNet
    settings: ClassVar = {"variant": "parallel", "reduction_ratio": 0.5}


class TestProductMMoE(ModelContract):
    model = MMoE
    settings: ClassVar = {**SMALL, "ctcvr": "product", "gate_units": (), "tower_units": ()}


class TestDeepPLE(ModelContract):
    model = PLE
    settings: ClassVar = {**SMALL, "num_levels": 2, "num_task_experts": 2}


class TestBatchNormMMoE(ModelContract):
    model = MMoE
    settings: ClassVar = {**SMALL, "batch_norm": True}


class TestBatchNormParallelMaskNet(ModelContract):
    model = MaskNet
    settings: ClassVar = {"variant": "parallel", "batch_norm": True, "embedding_dim": 8}


class TestDropoutSharedBottom(ModelContract):
    model = SharedBottom
    settings: ClassVar = {"dropout": 0.2, "embedding_dim": 8}


class TestEmbeddedNumericalsMaskNet(ModelContract):
    model = MaskNet
    settings: ClassVar = {"numericals": "embed", "dropout": 0.1, "batch_norm": True}


class TestEmbeddedNumericalsDNN(ModelContract):
    model = DNN
    settings: ClassVar = {"numericals": "embed", "dropout": 0.1, "batch_norm": True}


# --- The definitions, one layer, expert and impression field at a time -------------------------


def one_linear(layer: ParallelLinear, x_BD: Tensor, copy: int) -> Tensor:
    bias_H = None if layer.bias_KH is None else layer.bias_KH[copy]
    return functional.linear(x_BD, layer.weight_KHD[copy], bias_H)


def one_perceptron(mlp: MLP, x_BD: Tensor, copy: int = 0) -> Tensor:
    for layer in mlp:
        if isinstance(layer, ParallelLinear):
            x_BD = one_linear(layer, x_BD, copy)
        elif isinstance(layer, BatchNorm):
            index = copy if layer.weight.dim() == 2 else slice(None)
            x_BD = functional.batch_norm(
                x_BD,
                layer.running_mean[index],
                layer.running_var[index],
                layer.weight[index],
                layer.bias[index],
                eps=layer.eps,
            )
        else:
            x_BD = layer(x_BD)
    return x_BD


def one_gate(gates: Gates, x_BD: Tensor, gate: int) -> Tensor:
    return torch.softmax(
        one_linear(gates.output, one_perceptron(gates.hidden, x_BD, gate), gate), 1
    )


def weighted(weights_BK: Tensor, experts: list[Tensor]) -> Tensor:
    assert weights_BK.shape[1] == len(experts)
    return sum(
        (weights_BK[:, [k]] * expert for k, expert in enumerate(experts)),
        start=torch.zeros_like(experts[0]),
    )


def plain_towers(towers: Towers, inputs: list[Tensor]) -> Tensor:
    columns = [
        one_linear(towers.output, one_perceptron(towers.hidden, x_BH, task), task)[:, 0]
        for task, x_BH in enumerate(inputs)
    ]
    if towers.ctcvr == "product":
        columns[1] = torch.logit(torch.sigmoid(columns[0]) * torch.sigmoid(columns[1]))
    return torch.stack(columns, 1)


def plain_embedding(embedding: FeatureEmbedding, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
    fields, start = [], 0
    if embedding.table is not None:
        for field, size in enumerate(INPUTS.vocabulary_sizes):
            fields.append(embedding.table.weight[start : start + size][ids_BF[:, field]])
            start += size
    if embedding.projection is not None:
        fields.append(embedding.projection(numericals_BN))
    if embedding.direction_NE is not None:
        for numerical, vector_E in enumerate(embedding.direction_NE):
            fields.append(numericals_BN[:, [numerical]] * vector_E)
    return torch.stack(fields, 1)


def plain_shared_bottom(model: SharedBottom, vectors_BGE: Tensor) -> Tensor:
    hidden_BH = one_perceptron(model.bottom, vectors_BGE.flatten(1))
    return plain_towers(model.towers, [hidden_BH, hidden_BH])


def plain_mmoe(model: MMoE, vectors_BGE: Tensor) -> Tensor:
    x_BD = vectors_BGE.flatten(1)
    num_experts = model.gates.output.weight_KHD.shape[1]
    experts = [one_perceptron(model.experts, x_BD, k) for k in range(num_experts)]
    mixed = [weighted(one_gate(model.gates, x_BD, task), experts) for task in range(2)]
    return plain_towers(model.towers, mixed)


def plain_ple(model: PLE, vectors_BGE: Tensor) -> Tensor:
    shared_BD = vectors_BGE.flatten(1)
    tasks = [shared_BD, shared_BD]
    for level in model.levels:
        own_count, shared_count = level.num_task_experts, level.num_shared_experts
        own = [
            [
                one_perceptron(level.experts, tasks[task], task * own_count + expert)
                for expert in range(own_count)
            ]
            for task in range(2)
        ]
        shared = [
            one_perceptron(level.experts, shared_BD, 2 * own_count + expert)
            for expert in range(shared_count)
        ]
        mixed = [
            weighted(one_gate(level.task_gates, tasks[task], task), own[task] + shared)
            for task in range(2)
        ]
        if level.shared_gate is not None:
            weights_BK = one_gate(level.shared_gate, shared_BD, 0)
            shared_BD = weighted(weights_BK, own[0] + own[1] + shared)
        tasks = mixed
    return plain_towers(model.towers, tasks)


def plain_dnn(model: DNN, vectors_BGE: Tensor) -> Tensor:
    return model.head.output(one_perceptron(model.hidden, vectors_BGE.flatten(1)))


def plain_masknet(model: MaskNet, vectors_BGE: Tensor) -> Tensor:
    x_BD = vectors_BGE.flatten(1)
    normalised_BD = torch.cat(
        [
            functional.layer_norm(
                vectors_BGE[:, field],
                vectors_BGE.shape[-1:],
                model.norm.weight[field],
                model.norm.bias[field],
            )
            for field in range(vectors_BGE.shape[1])
        ],
        dim=1,
    )
    blocks = model.blocks
    hidden_BH = normalised_BD
    if model.variant == "serial":
        start = 0
        for block, width in enumerate(blocks.aggregation_units):
            stop = start + width
            weight, bias = blocks.aggregations.weight, blocks.aggregations.bias
            aggregated = functional.linear(x_BD, weight[start:stop], bias[start:stop]).relu()
            mask = blocks.projections[block](aggregated)
            normed = blocks.norms[block](blocks.hidden[block](mask * hidden_BH))
            hidden_BH = one_perceptron(blocks.activations[block], normed)
            start = stop
        return model.head.output(hidden_BH)
    outputs = []
    for block in range(blocks.hidden.weight_KHD.shape[0]):
        mask = one_linear(blocks.masks[2], one_linear(blocks.masks[0], x_BD, block).relu(), block)
        product = one_linear(blocks.hidden, mask * normalised_BD, block)
        scale, shift = blocks.norm.weight[block, 0], blocks.norm.bias[block, 0]
        normed = functional.layer_norm(product, product.shape[-1:], scale, shift)
        outputs.append(one_perceptron(blocks.activation, normed, block))
    return model.head.output(one_perceptron(blocks.mlp, torch.cat(outputs, 1)))


PLAIN = {
    "shared_bottom": plain_shared_bottom,
    "mmoe": plain_mmoe,
    "ple": plain_ple,
    "dnn": plain_dnn,
    "masknet": plain_masknet,
}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"embedding_dim": 6}) for name in MODELS),
    *((name, {"batch_norm": True, "numericals": "embed", "embedding_dim": 6}) for name in MODELS),
    ("mmoe", {**SMALL, "gate_units": (), "tower_units": (), "ctcvr": "product"}),
    ("ple", {**SMALL, "num_levels": 3, "num_task_experts": 2, "batch_norm": True}),
    ("ple", {**SMALL, "num_levels": 2, "gate_units": ()}),
    ("masknet", {"variant": "parallel", "embedding_dim": 6, "num_blocks": 4}),
    ("masknet", {"variant": "parallel", "embedding_dim": 6, "batch_norm": True}),
    ("masknet", {"reduction_ratio": 0.3, "hidden_units": (9, 5), "embedding_dim": 6}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_batched_form_equals_the_definition(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = MODELS[name](INPUTS, **settings).double()
    for parameter in model.parameters():  # scales and shifts away from 1 and 0
        nn.init.normal_(parameter, std=0.3)
    ids_BF = torch.stack([torch.randint(size, (11,)) for size in INPUTS.vocabulary_sizes], 1)
    numericals_BN = torch.randn(11, INPUTS.num_numericals, dtype=torch.float64)
    model.train()(ids_BF, numericals_BN)  # moves running statistics
    model.eval()
    vectors_BGE = plain_embedding(model.embedding, ids_BF, numericals_BN)
    expected_BT = PLAIN[name](model, vectors_BGE)
    actual_BT = model(ids_BF, numericals_BN)
    torch.testing.assert_close(actual_BT, expected_BT, rtol=1e-9, atol=1e-12)

    probe_BT = torch.randn_like(actual_BT)
    parameters = list(model.parameters())
    actual = torch.autograd.grad((actual_BT * probe_BT).sum(), parameters)
    expected = torch.autograd.grad((expected_BT * probe_BT).sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_parallel_layers_start_as_independent_linear_layers() -> None:
    layer = ParallelLinear(8, 256, 128)
    bound = 1 / math.sqrt(256)
    for weight_HD in layer.weight_KHD:
        assert weight_HD.abs().max() <= bound
        assert weight_HD.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_default_sizes_follow_the_design() -> None:
    inputs = Inputs(vocabulary_sizes=(30,) * 16, num_numericals=63)
    num_weights = {
        name: sum(parameter.numel() for parameter in model(inputs).parameters())
        for name, model in MODELS.items()
    }
    d = 17 * 128
    bottom = d * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128
    towers = 2 * (128 * 128 + 128 + 128 * 64 + 64 + 64 + 1)
    embedding = 480 * 128 + 63 * 128 + 128
    gates = 2 * (d * 128 + 128 + 128 * 64 + 64)
    assert num_weights["shared_bottom"] == embedding + bottom + towers
    assert num_weights["mmoe"] == embedding + 8 * bottom + gates + 2 * (64 * 8 + 8) + towers
    assert num_weights["ple"] == embedding + 10 * bottom + gates + 2 * (64 * 9 + 9) + towers


@pytest.mark.parametrize("first", [-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0])
@pytest.mark.parametrize("second", [-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0])
def test_product_logit_is_exact_up_to_80(first: float, second: float) -> None:
    # p1 p2 / (1 - p1 p2) = 1 / (e^-a + e^-b + e^-(a + b)): no cancellation in float64 up to 160.
    expected = -math.log(math.exp(-first) + math.exp(-second) + math.exp(-first - second))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        logits = torch.tensor([first, second], dtype=dtype, requires_grad=True)
        product = product_logit(logits[0], logits[1])
        assert product.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
        (grad,) = torch.autograd.grad(product, logits)
        assert grad.isfinite().all()


def test_product_gives_no_more_conversions_than_clicks() -> None:
    torch.manual_seed(0)
    model = MMoE(INPUTS, **SMALL, ctcvr="product")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.0)
    logits_BT = model(torch.zeros(50, 3, dtype=torch.int64), torch.randn(50, 4))
    assert (logits_BT[:, 1] <= logits_BT[:, 0]).all()


def test_logits_keep_float32_steps_under_autocast() -> None:
    torch.manual_seed(0)
    model = MMoE(INPUTS, **SMALL)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits_BT = model(torch.zeros(64, 3, dtype=torch.int64), torch.randn(64, 4))
    assert not torch.equal(logits_BT, logits_BT.bfloat16().float())


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = DNN(INPUTS, dropout=0.5)
    ids_BF, numericals_BN = torch.zeros(4, 3, dtype=torch.int64), torch.randn(4, 4)
    assert not torch.equal(model(ids_BF, numericals_BN), model(ids_BF, numericals_BN))
    model.eval()
    assert torch.equal(model(ids_BF, numericals_BN), model(ids_BF, numericals_BN))


def test_batch_norm_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm((3, 5)).double(), nn.BatchNorm1d(15).double()
    x_KBH = torch.randn(3, 20, 5, dtype=torch.float64) * 3 + 7
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        expected_BX = theirs(x_KBH.transpose(0, 1).flatten(1))
        torch.testing.assert_close(ours(x_KBH).transpose(0, 1).flatten(1), expected_BX)
    torch.testing.assert_close(ours.running_var.flatten(), theirs.running_var)


def test_two_ranks_with_batch_norm_train_as_one(
    run_ranks: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    one, two = run_ranks("models", tmp_path)
    assert one.keys() == two.keys()
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-7, atol=1e-8, msg=f"{key} differs")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mmoe", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ("mmoe", {"embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
        ("mmoe", {"expert_units": ()}, "expert_units must list at least one layer width, got ()"),
        ("mmoe", {"gate_units": (8, 0)}, "gate_units must list widths of at least 1, got (8, 0)"),
        ("mmoe", {"ctcvr": "sum"}, "ctcvr must be one of direct, product, got 'sum'"),
        ("ple", {"num_levels": 0}, "num_levels must be at least 1, got 0"),
        ("ple", {"num_task_experts": 0}, "num_task_experts must be at least 1, got 0"),
        ("shared_bottom", {"bottom_units": ()}, "bottom_units must list at least one layer width"),
        ("shared_bottom", {"tower_units": (-1,)}, "tower_units must list widths of at least 1"),
        ("dnn", {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ("dnn", {"hidden_units": ()}, "hidden_units must list at least one layer width, got ()"),
        ("dnn", {"numericals": "bin"}, "numericals must be one of project, embed, got 'bin'"),
        ("masknet", {"variant": "both"}, "variant must be one of serial, parallel, got 'both'"),
        ("masknet", {"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ("masknet", {"block_dim": 0}, "block_dim must be at least 1, got 0"),
        ("masknet", {"reduction_ratio": 0.0}, "reduction_ratio must be above 0 and finite, got 0"),
    ],
)
def test_setting_out_of_range_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        MODELS[name](INPUTS, **settings)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("sizes", "num_numericals", "message"),
    [
        ((3, 0), 1, r"vocabulary_sizes\[1\] must be at least 1, got 0"),
        ((3,), -1, "num_numericals must be at least 0, got -1"),
        ((), 0, "at least one categorical or numerical feature, got none"),
    ],
)
def test_inputs_without_features_are_refused(
    sizes: tuple[int, ...], num_numericals: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Inputs(vocabulary_sizes=sizes, num_numericals=num_numericals)


LAYERS_AND_INPUTS = pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Linear, (5, 4)),
        (Linear, (0, 4)),
        (partial(ParallelLinear, 1), (5, 4)),
        (partial(ParallelLinear, 2), (5, 4)),
        (partial(ParallelLinear, 2), (0, 4)),
        (partial(ParallelLinear, 2), (2, 5, 4)),
    ],
)


@pytest.mark.parametrize("reads_features", [True, False])  # which have no gradient
@pytest.mark.parametrize("has_bias", [True, False])
@LAYERS_AND_INPUTS
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_linears_are_the_linear_layers(
    make: Callable[..., nn.Module],
    shape: tuple[int, ...],
    has_bias: bool,
    reads_features: bool,
    precision: str,
) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "float64" else torch.float32
    layers = make(4, 3, bias=has_bias).to(dtype)
    weight, bias = (*layers.parameters(), None)[:2]
    x = torch.randn(shape, dtype=dtype, requires_grad=not reads_features)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None and leaf.requires_grad]
    found = []
    for compute in (lambda x: linears(x, weight, bias), layers):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            hidden = compute(x)
        assert hidden.is_contiguous()
        grad = torch.arange(hidden.numel()).view(hidden.shape).to(hidden.dtype)
        found.append([hidden, *torch.autograd.grad(hidden, leaves, grad)])
    rounding = 2**-7 if precision == "bfloat16" else 1e-12
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=rounding, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@LAYERS_AND_INPUTS
def test_gradients_of_weights_are_not_rounded_on_a_gpu(
    make: Callable[..., nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layers = make(4, 3).cuda()
    x = torch.randn(shape, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        hidden = layers(x)
    grad = torch.randn_like(hidden)
    gradients = torch.autograd.grad(hidden, list(layers.parameters()), grad)
    wide = make(4, 3).double()
    expected = torch.autograd.grad(
        wide(x.double().cpu()), list(wide.parameters()), grad.double().cpu()
    )
    for ours, exact in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-5, atol=1e-5)
