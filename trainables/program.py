"""A model as a program of its own: PyTorch's exported program, or ONNX.

It takes what `datasets.Encoder` gives, as ids (int64, N x F) and numericals (float32, N x D), for
any number of rows N from 1 on, and returns the probabilities that a `Predictor` returns, by its
names.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from datasets.errors import one_line
from trainables.checkpoint import CheckpointError, load_checkpoint
from trainables.metrics import probabilities

__all__ = ["PROGRAM_FILES", "ProgramFormat", "write_program"]

ProgramFormat = Literal["pt2", "onnx"]
PROGRAM_FILES: dict[ProgramFormat, str] = {"pt2": "model.pt2", "onnx": "model.onnx"}
INPUTS = ("ids", "numericals")
EXAMPLE_ROWS = 3  # any number but 0 and 1, which an export would take for constants


class _Probabilities(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, numericals: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = probabilities(self.model(ids, numericals).float())
        return found


def write_program(directory: Path, program: ProgramFormat) -> None:
    """Write a checkpoint's model as a program beside it.

    Args:
        directory: of a checkpoint or an export.
        program: `pt2` for `torch.export.load`, `onnx` for ONNX runtimes.

    Raises:
        CheckpointError: if the checkpoint cannot be loaded, its model cannot be traced (an
            architecture of the user's own), or a package for ONNX is missing.
    """
    if program == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise CheckpointError("--format onnx: needs more packages; pip install onnx onnxscript")
    configuration, inputs, model = load_checkpoint(directory)
    serving = _Probabilities(model).eval().requires_grad_(False)
    example = (
        torch.zeros(EXAMPLE_ROWS, sum(inputs.bag_lengths), dtype=torch.int64),
        torch.zeros(EXAMPLE_ROWS, inputs.num_numericals),
    )
    rows = torch.export.Dim("rows", min=1)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(serving, example, dynamic_shapes=({0: rows}, {0: rows}))
            path = directory / PROGRAM_FILES[program]
            if program == "pt2":
                torch.export.save(exported, path)
            else:
                names = list(serving(*example))
                torch.onnx.export(
                    exported, (), path, input_names=INPUTS, output_names=names, external_data=False
                )
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(
            f"--format {program}: {configuration.model!r} cannot be exported "
            f"({type(error).__name__}: {reason}); use --format safetensors"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own talk from a user's terminal."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
