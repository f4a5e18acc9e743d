"""Impressions with a planted signal: clicks hang on the first field, conversions on a numerical."""

from typing import Any

import torch
from torch import Tensor

from trainables import DeviceImpressions, Inputs, TrainingSettings, TrialConfiguration, Workers
from trainables.training import Training

CPU = torch.device("cpu")
INPUTS = Inputs(vocabulary_sizes=(10, 30), num_numericals=3)
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_units": [8]},
    "mmoe": {"expert_units": [8], "num_experts": 2, "gate_units": []},
    "ple": {"expert_units": [8], "num_experts": 2, "gate_units": []},
    "dnn": {"hidden_units": [8]},
    "masknet": {"hidden_units": [8]},
}
"""Settings with which each model trains in a moment."""


class TwoWorkers(Workers):
    """Two workers of a lane, to ask a rule about: no process group is there."""

    size = 2


def make_split(
    num_rows: int = 1_000, seed: int = 0, inputs: Inputs = INPUTS, device: torch.device = CPU
) -> DeviceImpressions:
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(size, (num_rows, length), generator=generator)
        for size, length in zip(inputs.vocabulary_sizes, inputs.bag_lengths, strict=True)
    ]
    numericals_ND = torch.randn(num_rows, inputs.num_numericals, generator=generator)
    clicks_N = torch.rand(num_rows, generator=generator) < columns[0][:, 0] / 12
    conversions_N = clicks_N & (numericals_ND[:, 0] > 0.3)
    ids_NF = torch.cat(columns, dim=1).to(torch.int8)
    parts = (ids_NF, numericals_ND, torch.stack([clicks_N, conversions_N], 1).byte())
    return DeviceImpressions(*(part.to(device) for part in parts))


def start(
    model: str = "mmoe",
    settings: dict[str, Any] | None = None,
    inputs: Inputs = INPUTS,
    device: torch.device = CPU,
    **training: Any,
) -> Training:
    """A training of three epochs of ten steps, if nothing else is said."""
    defaults = {"epochs": 3, "batch_size": 100, "learning_rate": 0.01, "precision": "float32"}
    configuration = TrialConfiguration.create(
        model,
        {"embedding_dim": 4} | (settings or {}),
        training=TrainingSettings(**defaults | training),
    )
    split = make_split(inputs=inputs, device=device)
    return Training(configuration, inputs, split, split, Workers(device=device))


def finish(training: Training) -> tuple[list[float], dict[str, Tensor]]:
    """The losses at the evaluations, and the weights."""
    losses = [evaluation.train_loss for evaluation in training.evaluations()]
    return losses, {name: value.clone() for name, value in training.model.state_dict().items()}
