"""What is compiled on a CPU computes what it computes as it is, or its trial fails."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import CPU, INPUTS, finish, make_split, start
from torch import Tensor, nn
from torch._inductor import config as inductor

from trainables import Inputs, TrainingError, TrainingSettings, TrialConfiguration, Workers
from trainables.compiled import INDUCTOR_OPTIONS, compiled, deviation
from trainables.configuration import build_model
from trainables.execution import check_can_compile
from trainables.training import Training

GPU = torch.device("cuda")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


@pytest.fixture
def no_cpp_compiler() -> Iterator[None]:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.usefixtures("no_cpp_compiler")
def test_what_cannot_be_compiled_is_refused() -> None:
    check_can_compile(GPU, 1)
    for device in (CPU, GPU):
        with pytest.raises(ValueError, match=r"^training\.compile: true needs one worker per lane"):
            check_can_compile(device, 2)
    with pytest.raises(ValueError, match=r"^training\.compile: true needs a C\+\+ compiler"):
        check_can_compile(CPU, 1)


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


def first_step(training: Training) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take it; return the gradients of the weights, and the buffers."""
    assert not list(training.evaluations(lambda: True))
    parameters = training.model.named_parameters()
    gradients = {name: one.grad for name, one in parameters if one.grad is not None}
    return gradients, dict(training.model.named_buffers())


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
def test_what_is_compiled_trains_as_it_does_uncompiled(
    model: str, folding: str, settings: dict[str, Any]
) -> None:
    def begin(**training: Any) -> Training:
        return start(model, settings, folding=folding, **training)

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


@needs_compiler
def test_what_torch_compiles_wrong_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INDUCTOR_OPTIONS, "inplace_buffers", True)
    training = start("ple", folding="off", compile=True)
    with pytest.raises(
        TrainingError,
        match=r"^training\.compile: true makes another gradient of levels\.0\.experts\.\d\.weight"
        r"_KHD than the model has \(\d+% apart; torch .+\); set it to false$",
    ):
        finish(training)


@needs_compiler
def test_a_model_of_ones_own_that_compiling_changes_fails_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deviating_model.py").write_text(
        "import torch\n"
        "from trainables.models import DNN\n"
        "class Deviating(DNN):\n"
        "    def forward(self, ids, numericals):\n"
        "        logits = super().forward(ids, numericals)\n"
        "        return logits * 2 if torch.compiler.is_compiling() else logits\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    training = start("deviating_model:Deviating", compile=True)
    with pytest.raises(TrainingError, match=r"^training\.compile: true makes another gradient of "):
        finish(training)


class Weights(nn.Module):
    """Three weights, of norms 5, 0.05 and 0 as gradients, and what a step may leave behind."""

    kept: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(2))
        self.small = nn.Parameter(torch.ones(1))
        self.unread = nn.Parameter(torch.ones(1))
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def loss(self, large: float = 1.0, small: float = 1.0, unread: float | None = None) -> Tensor:
        """A loss whose gradients are scaled."""
        self.kept += torch.rand(1)
        self.replaced = self.replaced + 1.0
        gradient = torch.tensor([3.0, 4.0]) * large
        loss = (self.large * gradient).sum() + 0.04 * small * self.small.sum()
        return loss if unread is None else loss + unread * self.unread.sum()


@pytest.mark.parametrize(
    ("scales", "dtype", "found"),
    [
        ({}, torch.float32, None),
        ({"large": 1.009}, torch.float32, None),
        ({"large": 1.02}, torch.float32, ("large", pytest.approx(0.02, rel=1e-4))),
        ({"large": 1.02, "small": 3.0}, torch.float32, ("small", pytest.approx(1.6, rel=1e-2))),
        ({"large": 1.2}, torch.bfloat16, None),
        ({"large": 0.5}, torch.bfloat16, ("large", pytest.approx(0.5))),
        ({"small": 1.012}, torch.float32, None),  # of 0.05, a hundredth of all
        ({"unread": 1e-4}, torch.float32, None),
        ({"unread": 1.0}, torch.float32, ("unread", pytest.approx(20.0, rel=1e-2))),
        ({"large": math.nan}, torch.float32, ("large", math.inf)),
        ({"small": math.nan, "large": 2.0}, torch.float32, ("small", math.inf)),
    ],
)
def test_the_gradient_furthest_apart_is_found(
    scales: dict[str, float], dtype: torch.dtype, found: tuple[str, float] | None
) -> None:
    model = Weights()
    assert deviation(model, model.loss, lambda: model.loss(**scales), dtype) == found


def test_a_gradient_that_is_missing_or_not_finite_as_it_is() -> None:
    model = Weights()
    own = {"unread": 1.0}
    assert deviation(model, lambda: model.loss(**own), model.loss, torch.float32) == (
        "unread",
        pytest.approx(1.0),
    )
    for value in (math.nan, math.inf):
        found = deviation(model, lambda v=value: model.loss(v), model.loss, torch.float32)  # type: ignore[misc]
        assert found is None


def test_gradients_of_rows_are_compared() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    rows = torch.tensor([1, 1, 3])

    def loss(scale: float = 1.0) -> Tensor:
        summed: Tensor = table(rows).sum() * scale
        return summed

    assert deviation(table, loss, loss, torch.float32) is None
    found = deviation(table, loss, lambda: loss(1.5), torch.float32)
    assert found == ("weight", pytest.approx(0.5))


def test_comparing_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = Weights()
    kept, replaced, state = model.kept, model.replaced, torch.get_rng_state()
    deviation(model, model.loss, model.loss, torch.float32)
    assert all(weight.grad is None for weight in model.parameters())
    assert model.kept is kept
    assert model.replaced is replaced
    assert kept.item() == replaced.item() == 0.0
    assert torch.equal(torch.get_rng_state(), state)


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
