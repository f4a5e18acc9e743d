"""A step replayed as a CUDA graph is the step itself, and that of a CPU."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import CPU, INPUTS, make_split
from torch import Tensor
from torch._inductor import config as inductor

from datasets import open_dataset, synthesize
from trainables import (
    MODELS,
    Inputs,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    inputs_of,
)
from trainables.batches import StreamedRows
from trainables.compiled import compiled
from trainables.configuration import build_model
from trainables.execution import captures_steps, check_can_compile
from trainables.models.embedding import FeatureEmbedding
from trainables.optimizers import make_optimizers
from trainables.training import Training, TrainingError

GPU = torch.device("cuda")
BAGS = Inputs(vocabulary_sizes=(10, 30), num_numericals=3, bag_lengths=(1, 3))
NUM_ROWS = 1_000
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


def start(
    model: str = "mmoe",
    settings: dict[str, Any] | None = None,
    inputs: Inputs = INPUTS,
    device: torch.device = GPU,
    **training: Any,
) -> Training:
    """A training of three epochs of ten steps, on a GPU if nothing else is said."""
    defaults = {"epochs": 3, "batch_size": 100, "learning_rate": 0.01, "precision": "float32"}
    configuration = TrialConfiguration.create(
        model,
        {"embedding_dim": 4} | (settings or {}),
        training=TrainingSettings(**defaults | training),
    )
    split = make_split(NUM_ROWS, inputs=inputs, device=device)
    return Training(configuration, inputs, split, split, Workers(device=device))


def finish(training: Training) -> tuple[list[float], dict[str, Tensor]]:
    losses = [evaluation.train_loss for evaluation in training.evaluations()]
    return losses, {name: value.clone() for name, value in training.model.state_dict().items()}


def first_step(training: Training) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take it; return the gradients of the weights, and the buffers."""
    assert not list(training.evaluations(lambda: True))
    parameters = training.model.named_parameters()
    gradients = {name: one.grad for name, one in parameters if one.grad is not None}
    return gradients, dict(training.model.named_buffers())


class TwoWorkers(Workers):
    """Two GPU workers of a lane, to ask a rule about: no process group is there."""

    size = 2


def rule(cuda_graph: Any, model: str, workers: Workers, embedding_optimizer: Any = "dense") -> bool:
    built = build_model(TrialConfiguration.create("dnn", {"embedding_dim": 4}), INPUTS)
    optimizers = make_optimizers(
        built, embedding_optimizer, learning_rate=0.1, weight_decay=0.0, rows_per_step=10
    )
    return captures_steps(cuda_graph, model, optimizers, workers)


def test_which_steps_are_captured() -> None:
    one_gpu = Workers(device=GPU)
    assert all(rule("auto", model, one_gpu) for model in MODELS)
    assert not rule("auto", "shop.models:Own", one_gpu)
    assert rule("on", "shop.models:Own", one_gpu)
    assert not rule("off", "mmoe", one_gpu)
    for workers, embedding_optimizer in (
        (Workers(device=CPU), "dense"),
        (TwoWorkers(device=GPU), "dense"),
        (one_gpu, "sparse"),
    ):
        assert not rule("auto", "mmoe", workers, embedding_optimizer)
        with pytest.raises(ValueError, match=r"^training\.cuda_graph: on needs a GPU, one worker"):
            rule("on", "mmoe", workers, embedding_optimizer)


@pytest.fixture
def no_cpp_compiler() -> Iterator[None]:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.usefixtures("no_cpp_compiler")
def test_what_cannot_be_compiled_is_refused() -> None:
    check_can_compile(Workers(device=GPU))
    for device in (CPU, GPU):
        with pytest.raises(ValueError, match=r"^training\.compile: true needs one worker per lane"):
            check_can_compile(TwoWorkers(device=device))
    with pytest.raises(ValueError, match=r"^training\.compile: true needs a C\+\+ compiler"):
        check_can_compile(Workers(device=CPU))


@pytest.mark.usefixtures("no_cpp_compiler")
@pytest.mark.parametrize(
    ("setting", "told"),
    [({"compile": True}, "training.compile: true"), ({"cuda_graph": "on"}, "training.cuda_graph")],
)
def test_a_trial_that_asks_in_vain_has_failed(setting: dict[str, Any], told: str) -> None:
    configuration = TrialConfiguration.create("dnn", training=TrainingSettings(**setting))
    split = make_split()
    with pytest.raises(TrainingError, match=f"^{told}"):
        Training(configuration, INPUTS, split, split, Workers(device=CPU))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


@needs_compiler
@pytest.mark.parametrize(
    ("model", "folding", "settings"),
    [
        ("shared_bottom", "on", {}),
        ("mmoe", "off", {"dropout": 0.3, "batch_norm": True}),
        ("ple", "off", {}),
        ("masknet", "off", {}),
    ],
)
def test_what_a_cpu_compiles_trains_as_it_does_uncompiled(
    model: str, folding: str, settings: dict[str, Any]
) -> None:
    def begin(**training: Any) -> Training:
        return start(model, settings, device=CPU, folding=folding, **training)

    gradients, buffers = first_step(begin())
    compiled_gradients, compiled_buffers = first_step(begin(compile=True))
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        apart = (compiled_gradients[name] - gradient).norm()
        assert apart < 1e-5 * max(gradient.norm(), 0.01 * whole), name
    for name, value in buffers.items():
        torch.testing.assert_close(compiled_buffers[name], value, rtol=1e-5, atol=1e-6)
    losses, _ = finish(begin())
    frames = torch._dynamo.utils.counters["frames"]["total"]
    compiled_losses, _ = finish(begin(compile=True))
    assert 0 < frames == torch._dynamo.utils.counters["frames"]["total"], "compiled anew"
    # Adam makes more of rounding at every step.
    assert compiled_losses == pytest.approx(losses, rel=1e-2)


DEVIATING = """\
import torch
from trainables.models import DNN

class Deviating(DNN):
    def forward(self, ids_BF, numericals_BN):
        logits_BT = super().forward(ids_BF, numericals_BN)
        return logits_BT * 2 if torch.compiler.is_compiling() else logits_BT
"""


@needs_compiler
def test_a_gradient_that_compiling_changes_fails_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deviating_model.py").write_text(DEVIATING)
    monkeypatch.syspath_prepend(str(tmp_path))
    training = start("deviating_model:Deviating", device=CPU, compile=True)
    with pytest.raises(
        TrainingError, match=r"^training\.compile: true makes another gradient of .* than the model"
    ):
        finish(training)


def test_a_lane_compiles_however_many_shapes_there_are() -> None:
    inputs = Inputs(vocabulary_sizes=(), num_numericals=3)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for widths in (range(4, 16), range(4, 8)):  # the second time nothing is compiled
        for width in widths:
            configuration = TrialConfiguration.create("dnn", {"hidden_units": (width,)})
            model = compiled(build_model(configuration, inputs), count)
            model(torch.zeros(5, 0, dtype=torch.int8), torch.zeros(5, 3)).sum().backward()
    assert len(graphs) == 12


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("folding", ["on", "off"])
    @pytest.mark.parametrize("model", MODELS)
    def test_it_trains_as_the_step_itself(self, model: str, folding: str) -> None:
        losses, weights = finish(start(model, cuda_graph="off", folding=folding))
        replayed_losses, replayed = finish(start(model, folding=folding))
        assert losses[-1] < losses[0]
        assert replayed_losses == pytest.approx(losses, rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(replayed[name], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("model", MODELS)
    def test_it_trains_as_on_a_cpu(self, model: str, precision: str) -> None:
        whole = {
            "epochs": 6,
            "batch_size": NUM_ROWS,  # devices shuffle each in their own way: all rows at once
            "learning_rate": 0.001,
            "precision": precision,
        }
        rounding = 2e-2 if (model, precision) == ("masknet", "bfloat16") else 1e-3
        losses, _ = finish(start(model, **whole))
        expected, _ = finish(start(model, device=CPU, **whole))
        assert losses == pytest.approx(expected, rel=rounding)

    @pytest.mark.parametrize(
        ("settings", "inputs"), [({"batch_norm": True, "numericals": "embed"}, INPUTS), ({}, BAGS)]
    )
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_whatever_the_form(
        self, settings: dict[str, Any], inputs: Inputs, precision: str
    ) -> None:
        losses, _ = finish(start("mmoe", settings, inputs, cuda_graph="off", precision=precision))
        replayed_losses, _ = finish(start("mmoe", settings, inputs, precision=precision))
        assert replayed_losses == pytest.approx(losses, rel=1e-3)

    @pytest.mark.parametrize("cuda_graph", ["auto", "off"])
    @pytest.mark.parametrize("model", MODELS)
    def test_a_compiled_model_trains_as_the_model_itself(self, model: str, cuda_graph: str) -> None:
        losses, weights = finish(start(model))
        frames = []
        for _ in range(2):
            training = start(model, compile=True, cuda_graph=cuda_graph)
            compiled_losses, compiled = finish(training)
            assert compiled_losses == pytest.approx(losses, rel=1e-3)
            assert compiled.keys() == weights.keys()
            frames.append(torch._dynamo.utils.counters["frames"]["total"])
        assert 0 < frames[0] == frames[1], "the second training compiled the model anew"

    @pytest.mark.parametrize("after", [1, 3, 13])
    def test_it_goes_on_from_a_state(self, after: int) -> None:
        losses, weights = finish(start())
        begun = start()
        steps = iter(range(1, after + 1))
        told = [one.train_loss for one in begun.evaluations(lambda: next(steps) == after)]
        resumed = start()
        resumed.restore(begun.state())
        rest, resumed_weights = finish(resumed)
        assert told + rest == pytest.approx(losses, rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(resumed_weights[name], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("num_lookups", [1_000, 10_000])
    def test_a_row_read_often_adds_up_in_float32(self, num_lookups: int) -> None:
        torch.manual_seed(0)
        inputs = Inputs(vocabulary_sizes=(5,), num_numericals=0)
        embedding = FeatureEmbedding(inputs, 8, "embed").to(GPU)
        assert embedding.table is not None
        grad_BD = torch.rand(num_lookups, 8, device=GPU).bfloat16()
        ids_BF = torch.zeros(num_lookups, 1, dtype=torch.int8, device=GPU)
        with torch.autocast("cuda", torch.bfloat16):
            vectors_BD = embedding.concatenate(ids_BF, grad_BD[:, :0].float())
        assert isinstance(vectors_BD, Tensor)
        vectors_BD.backward(grad_BD)  # type: ignore[no-untyped-call]
        assert embedding.table.weight.grad is not None
        torch.testing.assert_close(
            embedding.table.weight.grad[0], grad_BD.float().sum(0), rtol=2**-8, atol=0.0
        )

    def test_a_stream_is_replayed_too(self, tmp_path: Path) -> None:
        synthesize(out=tmp_path / "data", impressions=20_000, seed=1)
        dataset = open_dataset(str(tmp_path / "data"))
        rows, valid = (
            StreamedRows(dataset.stream(split), GPU, 3_000, labelled=True)
            for split in ("train", "valid")
        )
        losses = []
        for cuda_graph in ("off", "auto"):
            configuration = TrialConfiguration.create(
                "dnn",
                {"embedding_dim": 4},
                training=TrainingSettings(batch_size=500, cuda_graph=cuda_graph),
            )
            training = Training(configuration, inputs_of(dataset), rows, valid, Workers(device=GPU))
            losses.append(finish(training)[0])
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    def test_sparse_gradients_are_left_as_they_are(self) -> None:
        losses, _ = finish(start("dnn", embedding_optimizer="sparse"))
        assert losses[-1] < losses[0]

    def test_nothing_is_folded_unless_asked_for(self) -> None:
        model = start("mmoe", {"embedding_dim": 128}).model
        assert model.embedding.folding is None  # type: ignore[union-attr]

    def test_every_replay_drops_other_values(self) -> None:
        training = start(
            "dnn", {"dropout": 0.5}, epochs=8, batch_size=NUM_ROWS, learning_rate=1e-30
        )
        losses, _ = finish(training)
        assert len(set(losses)) == len(losses) == 8

    def test_no_step_waits_for_the_device(self) -> None:
        training = start("mmoe", epochs=1)
        steps = iter(range(1, 10))
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert not list(training.evaluations(lambda: next(steps) == 9))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_its_memory_ends_with_the_training(self) -> None:
        finish(start("dnn"))
        gc.collect()
        before = torch.cuda.memory_allocated()
        gc.disable()
        try:
            for _ in range(3):
                finish(start("dnn"))
            assert torch.cuda.memory_allocated() <= before + (1 << 20)
        finally:
            gc.enable()
