"""A step replayed as a CUDA graph is the step itself."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datasets import open_dataset, synthesize
from trainables import (
    MODELS,
    DeviceImpressions,
    Inputs,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    inputs_of,
)
from trainables.batches import StreamedRows
from trainables.configuration import build_model
from trainables.execution import captures_steps
from trainables.optimizers import make_optimizers
from trainables.training import Training

GPU = torch.device("cuda")
INPUTS = Inputs(vocabulary_sizes=(10, 30), num_numericals=3)
BAGS = Inputs(vocabulary_sizes=(10, 30), num_numericals=3, bag_lengths=(1, 3))
NUM_ROWS = 1_000
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


def make_split(inputs: Inputs, num_rows: int = NUM_ROWS) -> DeviceImpressions:
    generator = torch.Generator().manual_seed(0)
    columns = [
        torch.randint(size, (num_rows, length), generator=generator)
        for size, length in zip(inputs.vocabulary_sizes, inputs.bag_lengths, strict=True)
    ]
    numericals_ND = torch.randn(num_rows, inputs.num_numericals, generator=generator)
    clicks_N = torch.rand(num_rows, generator=generator) < columns[0][:, 0] / 12
    conversions_N = clicks_N & (numericals_ND[:, 0] > 0.3)
    columns_N = (torch.cat(columns, 1), numericals_ND, clicks_N.byte(), conversions_N.byte())
    return DeviceImpressions(*(column.to(GPU) for column in columns_N))


def start(
    model: str = "mmoe",
    settings: dict[str, Any] | None = None,
    inputs: Inputs = INPUTS,
    **training: Any,
) -> Training:
    """A training of three epochs of ten steps, on a GPU."""
    defaults = {"epochs": 3, "batch_size": 100, "learning_rate": 0.01, "precision": "float32"}
    configuration = TrialConfiguration.create(
        model,
        {"embedding_dim": 4} | (settings or {}),
        training=TrainingSettings(**defaults | training),
    )
    split = make_split(inputs)
    return Training(configuration, inputs, split, split, Workers(device=GPU))


def finish(training: Training) -> tuple[list[float], dict[str, Tensor]]:
    losses = [evaluation.train_loss for evaluation in training.evaluations()]
    return losses, {name: value.clone() for name, value in training.model.state_dict().items()}


def rule(cuda_graph: Any, model: str, device: str, embedding_optimizer: Any = "dense") -> bool:
    built = build_model(TrialConfiguration.create("dnn", {"embedding_dim": 4}), INPUTS)
    optimizers = make_optimizers(
        built, embedding_optimizer, learning_rate=0.1, weight_decay=0.0, rows_per_step=10
    )
    return captures_steps(cuda_graph, model, optimizers, Workers(device=torch.device(device)))


def test_which_steps_are_captured() -> None:
    assert all(rule("auto", model, "cuda") for model in MODELS)
    assert not rule("auto", "shop.models:Own", "cuda")
    assert rule("on", "shop.models:Own", "cuda")
    assert not rule("off", "mmoe", "cuda")
    assert not rule("on", "mmoe", "cpu")
    assert not rule("on", "mmoe", "cuda", "sparse")


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
    def test_a_compiled_model_trains_as_the_model_itself(self, cuda_graph: str) -> None:
        losses, weights = finish(start())
        frames = []
        for _ in range(2):
            training = start(compile=True, cuda_graph=cuda_graph)
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
