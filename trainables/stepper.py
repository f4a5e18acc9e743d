"""One optimiser step after another: the losses of a batch, their gradients, Adam."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from datasets import PwiserError
from trainables.batches import Batch, BatchShape, DeviceImpressions, Rows
from trainables.captured_step import CapturedStep
from trainables.compiled import compiled, deviation
from trainables.configuration import TrainingSettings, TrialConfiguration
from trainables.execution import (
    captures_steps,
    check_can_compile,
    compute_dtype,
    fold_embeddings,
    keep_freed_memory,
)
from trainables.loss import Gate, Losses, training_loss
from trainables.optimizers import make_optimizers
from trainables.workers import Workers

__all__ = ["Stepper", "TrainingError"]


class TrainingError(PwiserError):
    """A trial whose numbers went wrong."""


class Stepper:
    """Takes one optimiser step after another over endless epochs of the train split."""

    def __init__(
        self,
        configuration: TrialConfiguration,
        model: nn.Module,
        split: Rows,
        workers: Workers,
    ) -> None:
        settings, loss = configuration.training, configuration.loss
        device = workers.device
        self.workers = workers
        self.gate = loss.gate
        self.weights = [
            torch.tensor(value, device=device) for value in (loss.alpha, loss.m1, loss.m2)
        ]
        self.dtype = compute_dtype(settings.precision, device)
        if device.type == "cpu":
            keep_freed_memory()
        if len(split) < workers.size:
            raise TrainingError(
                f"{len(split)} train impressions cannot feed {workers.size} workers; "
                "lower resources.workers_per_lane"
            )
        num_batches = -(-len(split) // settings.batch_size)
        self.steps_per_epoch = min(num_batches, len(split) // workers.size)
        rows = len(split) // (self.steps_per_epoch * workers.size)
        fold_embeddings(model, settings.folding, rows)
        with _refusals_fail_the_trial():
            self.optimizers = make_optimizers(
                model,
                settings.embedding_optimizer,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                rows_per_step=rows * workers.size,
                can_reduce_sparse=workers.size == 1 or device.type == "cpu",
            )
            if settings.compile:
                check_can_compile(device, workers.size)
            self.parallel = _parallel(model, settings, workers)
            captures = captures_steps(
                settings.cuda_graph, configuration.model, self.optimizers, workers
            )
        compiles_losses = settings.compile and device.type == "cpu"
        self.batch_losses = compiled(_batch_losses) if compiles_losses else _batch_losses
        self.unchecked = compiles_losses
        self.captured = CapturedStep(device) if captures else None
        shape = BatchShape(steps_per_epoch=self.steps_per_epoch, rows=rows, seed=settings.seed)
        self.batches = split.batches(shape, workers)
        self.losses = torch.zeros(4, device=device)
        self.one = torch.ones((), device=device)

    def step(self) -> None:
        """Train on the next batch, without waiting for the device.

        Raises:
            TrainingError: if the step, compiled, has other gradients than as it is.
        """
        batch = self.batches.next()
        if self.unchecked:
            self._check_compiled(batch.load())
        if self.captured is None:
            self._train_on(batch)
        else:
            self.captured(self._train_on, batch)

    def forget_capture(self) -> None:
        """Go on with weights and moments that lie elsewhere."""
        if self.captured is not None:
            self.captured.forget()

    def _check_compiled(self, rows: DeviceImpressions) -> None:
        self.unchecked = False
        found = deviation(
            self.parallel,
            lambda: self._losses_of(rows, _batch_losses).total,
            lambda: self._losses_of(rows, self.batch_losses).total,
            self.dtype,
        )
        if found is not None:
            name, apart = found
            raise TrainingError(
                f"training.compile: true makes another gradient of {name} than the model has "
                f"({apart:.0%} apart; torch {torch.__version__}); set it to false"
            )

    def _losses_of(self, rows: DeviceImpressions, batch_losses: Callable[..., Losses]) -> Losses:
        return batch_losses(
            self.parallel, rows, self.dtype, self.weights, self.gate, self.workers.group
        )

    def _train_on(self, batch: Batch) -> None:
        losses = self._losses_of(batch.load(), self.batch_losses)
        self.optimizers.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        self.optimizers.step()
        self.losses += torch.stack((*losses, self.one)).detach()

    def mean_losses(self) -> tuple[float, float, float]:
        """Mean loss, BCE and PWiseR over steps and workers since the last call; waits for both."""
        *sums, count = self.sum_losses().tolist()
        self.losses.zero_()
        loss, bce, pwiser = (total / count for total in sums)
        return loss, bce, pwiser

    def sum_losses(self) -> torch.Tensor:
        """Sums of loss, BCE and PWiseR over steps and workers since `mean_losses`, and how many."""
        sums = self.losses.clone()
        if self.workers.group is not None:
            torch.distributed.all_reduce(sums, group=self.workers.group)
        return sums

    def resume(self) -> None:
        """Go back to training after an evaluation."""
        self.parallel.train()


@contextlib.contextmanager
def _refusals_fail_the_trial() -> Iterator[None]:
    """What the settings ask for and these workers cannot do is told as the trial's failure."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _parallel(model: nn.Module, settings: TrainingSettings, workers: Workers) -> nn.Module:
    """Return what a step calls: the model itself, compiled on a GPU, or one of several workers'."""
    if settings.compile and workers.device.type == "cuda":  # the loss stays as it is
        return compiled(model)
    if workers.group is None:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[workers.device] if workers.device.type == "cuda" else None,
        process_group=workers.group,
        broadcast_buffers=False,
    )


def _batch_losses(
    model: nn.Module,
    rows: DeviceImpressions,
    dtype: torch.dtype,
    weights: Sequence[torch.Tensor],
    gate: Gate,
    group: ProcessGroup | None,
) -> Losses:
    """Compute the losses of a batch: all of a step before its gradient."""
    with torch.autocast(rows.ids_NF.device.type, dtype, enabled=dtype != torch.float32):
        logits_BT = model(rows.ids_NF, rows.numericals_ND.float())
    return training_loss(
        logits_BT, rows.clicks_N, rows.conversions_N, *weights, gate=gate, group=group
    )
