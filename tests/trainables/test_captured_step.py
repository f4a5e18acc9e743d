"""A step replayed as a CUDA graph is the step itself, and that of a CPU."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from planted import CPU, INPUTS, TwoWorkers, finish
from torch import Tensor

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
from trainables.configuration import build_model
from trainables.execution import captures_steps
from trainables.models.embedding import FeatureEmbedding
from trainables.optimizers import make_optimizers
from trainables.training import Training

GPU = torch.device("cuda")
BAGS = Inputs(vocabulary_sizes=(10, 30), num_numericals=3, bag_lengths=(1, 3))
NUM_ROWS = 1_000
start = partial(planted.start, device=GPU)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


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
