"""A training step captured once as a CUDA graph and replayed: one launch instead of hundreds.

On a GPU a step of a click model is a few hundred small kernels; launching them one by one takes the
host longer than the device takes to run them. See "CUDA Graphs" in PyTorch's notes on CUDA
semantics.
"""

from collections.abc import Callable
from functools import cache

import torch

from datasets.errors import one_line
from trainables.batches import Batch

__all__ = ["CapturedStep"]

EAGER_STEPS = 3
"""Steps taken before the capture: libraries load their kernels, the optimiser makes its moments."""


class CapturedStep:
    """Takes the first steps as they are, captures one, and replays it from then on.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._num_eager = 0
        self._captured: tuple[Batch, torch.cuda.CUDAGraph] | None = None

    def __call__(self, take: Callable[[Batch], None], batch: Batch) -> None:
        """Take a step.

        Args:
            take: the step. It launches the same kernels on the same memory every time, but for its
                batch's, and does not wait for the device. Not kept, or the step's memory would
                live on in a circle of references.
            batch: of the same kind, shapes and types as every batch before.

        Raises:
            RuntimeError: if the step cannot be captured.
        """
        if self._num_eager < EAGER_STEPS:
            self._num_eager += 1
            self._take_eagerly(take, batch)
            return
        if self._captured is None:
            self._captured = self._capture(take, batch)
        own_batch, graph = self._captured
        own_batch.copy_(batch)
        graph.replay()

    def forget(self) -> None:
        """Capture anew: the memory that a step works on is another from here on."""
        self._num_eager = 0
        self._captured = None

    def _take_eagerly(self, take: Callable[[Batch], None], batch: Batch) -> None:
        """Take a step on the stream of the capture, as autograd asks for."""
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            take(batch)
        outside.wait_stream(self._stream)

    def _capture(
        self, take: Callable[[Batch], None], batch: Batch
    ) -> tuple[Batch, torch.cuda.CUDAGraph]:
        """Capture a step, which computes nothing, on a batch of its own."""
        own_batch = batch.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile: they take no part in the step.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                take(own_batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the step cannot be captured as a CUDA graph ({one_line(error)}); "
                "set training.cuda_graph to off"
            ) from error
        return own_batch, graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all captures: torch keeps workspaces for every stream in use."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
