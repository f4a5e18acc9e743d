"""Checkpoints and exports: weights as safetensors, everything else as JSON.

A checkpoint (in a job's storage) holds the weights and the trial's configuration. An export adds
the encoder of the dataset, and is then all that is needed to predict from raw features elsewhere.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from datasets import DatasetError, Encoder, PwiserError
from datasets.errors import one_line
from trainables.configuration import (
    ConfigurationError,
    TrialConfiguration,
    build_model,
    describe_faults,
)
from trainables.metrics import probabilities
from trainables.models import Inputs

__all__ = ["CheckpointError", "Predictor", "load", "load_checkpoint", "save_checkpoint"]

WEIGHTS_FILE = "model.safetensors"
CONFIGURATION_FILE = "configuration.json"
PREDICTION_BATCH = 16_384


class CheckpointError(PwiserError):
    """A checkpoint or export that is missing or damaged."""


def save_checkpoint(
    directory: Path, configuration: TrialConfiguration, inputs: Inputs, model: nn.Module
) -> None:
    """Write a model's weights and configuration into an existing directory."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, directory / WEIGHTS_FILE)
    description = {
        "configuration": configuration.model_dump(mode="json"),
        "inputs": {
            "vocabulary_sizes": list(inputs.vocabulary_sizes),
            "num_numericals": inputs.num_numericals,
            "bag_lengths": list(inputs.bag_lengths),
        },
    }
    (directory / CONFIGURATION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def load_checkpoint(
    directory: Path, device: torch.device | str = "cpu"
) -> tuple[TrialConfiguration, Inputs, nn.Module]:
    """Read what `save_checkpoint` wrote; the model is in evaluation mode.

    Raises:
        CheckpointError: if a file is missing or damaged, or does not fit the model.
    """
    file = directory / CONFIGURATION_FILE
    description = _read_description(file)
    try:
        configuration = TrialConfiguration.model_validate(description["configuration"])
        inputs = Inputs(
            vocabulary_sizes=tuple(description["inputs"]["vocabulary_sizes"]),
            num_numericals=description["inputs"]["num_numericals"],
            bag_lengths=tuple(description["inputs"].get("bag_lengths", ())),
        )
    except KeyError as error:
        raise CheckpointError(
            f"{file}: not the configuration of a checkpoint (it has no {error}); export it again"
        ) from error
    except ValidationError as error:
        reason = describe_faults(error, TrialConfiguration, "configuration")
        raise CheckpointError(
            f"{file}: not the configuration of a checkpoint ({reason}); export it again"
        ) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not the configuration of a checkpoint ({error}); export it again"
        ) from error
    try:
        model = build_model(configuration, inputs)
    except ConfigurationError as error:
        raise CheckpointError(f"{file}: its model cannot be built: {error}") from error
    try:
        model.load_state_dict(safetensors.torch.load_file(directory / WEIGHTS_FILE))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE}: cannot be read as the weights of {configuration.model!r} "
            f"({one_line(error, 300)}); export it again"
        ) from error
    return configuration, inputs, model.to(device).eval()


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: not found; name a directory that pwiser export wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); export it again") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path}: not the configuration of a checkpoint; export it again")
    return description


class Predictor:
    """An exported model that predicts from raw features.

    Attributes:
        configuration: the trial's configuration.
        model: in evaluation mode, on `device`.
        encoder: turns raw features into the model's inputs, as in training.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.configuration, _, self.model = load_checkpoint(directory, self.device)
        try:
            self.encoder = Encoder.load(str(directory))
        except DatasetError as error:
            raise CheckpointError(f"{error} (a checkpoint becomes one by pwiser export)") from error

    @torch.no_grad()
    def predict(self, table: pa.Table | pd.DataFrame) -> dict[str, np.ndarray]:
        """Predict from raw features.

        Args:
            table: N rows with the schema's feature columns; further columns are ignored. Unseen and
                missing categories are the unknown one; missing numericals follow the schema's fill.

        Returns:
            float64 arrays of length N (0 for an empty table): `pctr`, and for a model with a
            conversion head `pctcvr` and `pcvr`.

        Raises:
            TableError: if a column is missing, or a numerical cell is not a finite number.
        """
        ids_NF, numericals_ND = self.encoder.encode(table)
        num_heads = int(self.model.num_heads)  # type: ignore[arg-type]
        parts = [torch.zeros(0, num_heads)]
        for start in range(0, len(ids_NF), PREDICTION_BATCH):
            stop = start + PREDICTION_BATCH
            logits_BT = self.model(
                torch.from_numpy(ids_NF[start:stop]).to(self.device),
                torch.from_numpy(numericals_ND[start:stop]).to(self.device).float(),
            )
            parts.append(logits_BT.float().cpu())
        return {name: values.numpy() for name, values in probabilities(torch.cat(parts)).items()}


def load(directory: str | Path, device: torch.device | str = "cpu") -> Predictor:
    """Load what `pwiser export` wrote, in any process that has this package.

    Raises:
        CheckpointError: if the directory is not a whole export.
    """
    return Predictor(Path(directory), device)
