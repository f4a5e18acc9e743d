"""Every architecture as a program of its own, beside the model that it was made from."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from trainables import MODELS, CheckpointError, Inputs, TrialConfiguration
from trainables.checkpoint import save_checkpoint
from trainables.configuration import build_model
from trainables.metrics import probabilities
from trainables.program import PROGRAM_FILES, write_program

SETTINGS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_units": [8]},
    "mmoe": {"expert_units": [8], "num_experts": 2, "ctcvr": "product"},
    "ple": {"expert_units": [8], "num_experts": 2, "batch_norm": True},
    "dnn": {"hidden_units": [8], "numericals": "embed"},
    "masknet": {"hidden_units": [8], "variant": "parallel"},
}
INPUTS = Inputs(vocabulary_sizes=(5, 300), num_numericals=3, bag_lengths=(1, 3))
NUM_ROWS = 40


def rows() -> tuple[Tensor, Tensor]:
    """Ids with unknown ones and with bags that are not full, and numericals."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (NUM_ROWS, 4), generator=generator)
    ids[::2, 2:] = -1
    return ids, torch.randn(NUM_ROWS, 3, generator=generator)


def save(directory: Path, name: str, settings: dict[str, Any]) -> nn.Module:
    configuration = TrialConfiguration.create(name, {"embedding_dim": 4} | settings)
    torch.manual_seed(0)
    model = build_model(configuration, INPUTS)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    save_checkpoint(directory, configuration, INPUTS, model)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_programs_predict_what_the_model_predicts(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, name, SETTINGS[name])
    ids, numericals = rows()
    with torch.no_grad():
        expected = probabilities(model(ids, numericals))
    for program in PROGRAM_FILES:
        write_program(tmp_path, program)
    exported = torch.export.load(tmp_path / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [given.name for given in session.get_inputs()] == ["ids", "numericals"]
    assert [found.name for found in session.get_outputs()] == list(expected)
    for count in (1, 2, NUM_ROWS):
        some = ids[:count], numericals[:count]
        found = exported(*some)
        feed = dict(zip(("ids", "numericals"), (part.numpy() for part in some), strict=True))
        of_onnx = session.run(None, feed)
        for values, (key, wanted) in zip(of_onnx, expected.items(), strict=True):
            np.testing.assert_allclose(found[key].numpy(), wanted[:count].numpy(), atol=1e-5)
            np.testing.assert_allclose(values, wanted[:count].numpy(), atol=1e-5)


class Branching(nn.Module):
    """Looks at its values to decide what to do, which no export can follow."""

    num_heads = 1

    def __init__(self, inputs: Inputs, *, embedding_dim: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs.num_numericals, embedding_dim))

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        if numericals_BN.sum().item() > 0:
            return numericals_BN @ self.weight
        return -numericals_BN @ self.weight


@pytest.mark.parametrize("program", PROGRAM_FILES)
def test_a_model_that_cannot_be_exported_is_told_so(
    tmp_path: Path, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    save(tmp_path, "test_program:Branching", {})
    with pytest.raises(CheckpointError) as caught:
        write_program(tmp_path, program)
    message = str(caught.value)
    assert message.startswith(f"--format {program}: 'test_program:Branching' cannot be exported")
    assert message.endswith("use --format safetensors")
    assert "\n" not in message
    assert not (tmp_path / PROGRAM_FILES[program]).exists()
