"""What a trial needs to go on where it was: one safetensors file, tensors and a few numbers.

Nothing in it is code: reading a file from a storage that others write to runs none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from datasets.errors import one_line
from trainables.checkpoint import CheckpointError
from trainables.optimizers import Optimizers

__all__ = ["STATE_FILE", "Position", "TrainingState"]

STATE_FILE = "state.safetensors"
RANDOM = "random"
RANDOM_CUDA = "random_cuda"
LOSSES = "losses"
MODEL = "model."
OPTIMIZERS = "optimizers."
POSITION = "position"


@dataclass(kw_only=True)
class Position:
    """How far a training is.

    Attributes:
        step: optimiser steps done, which is the position in the data too.
        num_evaluations: evaluations done.
        training_s: seconds of training so far.
        evaluation_s: seconds of evaluation so far.
    """

    step: int = 0
    num_evaluations: int = 0
    training_s: float = 0.0
    evaluation_s: float = 0.0


@dataclass(frozen=True)
class TrainingState:
    """A trial between two steps.

    Attributes:
        tensors: weights, the optimisers' moments, the random state, the sums of the losses.
        position: where it is.
        notes: texts by name, of whoever keeps the state.
    """

    tensors: Mapping[str, Tensor]
    position: Position
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        optimizers: Optimizers,
        losses: Tensor,
        position: Position,
    ) -> "TrainingState":
        """Copy the state of a training to the CPU.

        Args:
            model: its weights and buffers.
            optimizers: their moments.
            losses: sums over the steps since the last evaluation.
            position: where it is.
        """
        tensors = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"{OPTIMIZERS}{name}": value for name, value in optimizers.state().items()}
        tensors |= {LOSSES: losses, RANDOM: torch.get_rng_state()}
        if any(value.is_cuda for value in tensors.values()):
            tensors[RANDOM_CUDA] = torch.cuda.get_rng_state()
        copies = {
            name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()
        }
        return cls(copies, replace(position))

    def restore(self, model: nn.Module, optimizers: Optimizers, losses: Tensor) -> None:
        """Put weights, moments, sums of losses and the random state back.

        Raises:
            CheckpointError: if they are of another model, or of other optimisers; of the latter
                before anything has changed.
        """
        try:
            optimizers.restore(self._below(OPTIMIZERS))
            model.load_state_dict(self._below(MODEL))
            losses.copy_(self.tensors[LOSSES])
            torch.set_rng_state(self.tensors[RANDOM])
            if RANDOM_CUDA in self.tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(self.tensors[RANDOM_CUDA])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = one_line(error)
            raise CheckpointError(f"a training state of another trial ({reason})") from error

    def save(self, directory: Path) -> None:
        """Write the one file of a state into an existing directory."""
        position = TypeAdapter(Position).dump_json(self.position).decode()
        safetensors.torch.save_file(
            dict(self.tensors), directory / STATE_FILE, {**self.notes, POSITION: position}
        )

    @classmethod
    def load(cls, directory: Path) -> "TrainingState":
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is missing or damaged.
        """
        try:
            with safetensors.safe_open(directory / STATE_FILE, "pt") as file:
                notes = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            position = TypeAdapter(Position).validate_json(notes.pop(POSITION))
            return cls(tensors, position, notes)
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            reason = one_line(error)
            raise CheckpointError(
                f"{directory / STATE_FILE}: cannot be read as a training state ({reason})"
            ) from error

    def _below(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }
