"""The training loop: batches of the train split, evaluations of the whole valid split.

Shapes: N impressions of a split, B impressions of a batch, F categorical fields, D numericals,
T heads.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from datasets import PwiserError
from trainables.batches import Batch, BatchShape, DeviceImpressions, Rows
from trainables.captured_step import CapturedStep
from trainables.compiled import compiled, deviation
from trainables.configuration import TrainingSettings, TrialConfiguration, build_model
from trainables.execution import (
    captures_steps,
    check_can_compile,
    compute_dtype,
    fold_embeddings,
    keep_freed_memory,
)
from trainables.loss import Gate, Losses, training_loss
from trainables.metrics import evaluate
from trainables.models import Inputs
from trainables.optimizers import make_optimizers
from trainables.training_state import Position, TrainingState
from trainables.workers import Workers

__all__ = [
    "DeviceImpressions",
    "Evaluation",
    "Training",
    "TrainingError",
    "predict_logits",
    "train",
]

EVALUATION_BATCH = 16_384


class TrainingError(PwiserError):
    """A trial whose numbers went wrong."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a trial knows of itself at one evaluation.

    Attributes:
        index: from 1 to `num_evaluations`.
        num_evaluations: evaluations of the whole trial, if nothing stops it.
        step: optimiser steps done.
        epoch: epochs done, a fraction inside one.
        metrics: of the whole valid split; None where one class alone is there.
        train_loss: mean of the loss over the steps since the evaluation before.
        train_bce: the same of its BCE part.
        train_pwiser: the same of its PWiseR part, not weighted by alpha.
        training_s: seconds spent in training since the trial began.
        evaluation_s: seconds spent in evaluation since the trial began.
    """

    index: int
    num_evaluations: int
    step: int
    epoch: float
    metrics: dict[str, float | None]
    train_loss: float
    train_bce: float
    train_pwiser: float
    training_s: float
    evaluation_s: float

    @property
    def last(self) -> bool:
        """Whether the trial ends here."""
        return self.index == self.num_evaluations


class Training:
    """One trial's training, which pauses at every evaluation and can go on from a saved state.

    The result depends on the configuration and the data alone, not on trials before it: the random
    state is set from the seed. All workers hold the same data and take the same permutation; each
    trains on its slice of every batch, and the loss is that of the whole batch, so that the number
    of workers changes nothing but rounding and, where there is dropout, its masks.

    Args:
        configuration: the trial's model, loss and training settings.
        inputs: the vocabulary sizes and numericals of the dataset.
        train_split: on `workers.device`; at least one impression.
        valid_split: on `workers.device`; at least one impression.
        workers: this worker's group.

    Attributes:
        model: the network.

    Raises:
        TrainingError: if there are fewer impressions than workers.
    """

    def __init__(
        self,
        configuration: TrialConfiguration,
        inputs: Inputs,
        train_split: Rows,
        valid_split: Rows,
        workers: Workers,
    ) -> None:
        self._seed = configuration.training.seed
        torch.manual_seed(self._seed)
        self.model = build_model(configuration, inputs).to(workers.device)
        self._valid_split = valid_split
        self._workers = workers
        self._stepper = _Stepper(configuration, self.model, train_split, workers)
        self._stops = _evaluation_steps(self._stepper.steps_per_epoch, configuration.training)
        self._position = Position()
        self._draw_apart()

    @property
    def worked_s(self) -> float:
        """Seconds of training and evaluation since the trial began, on whatever lanes."""
        return self._position.training_s + self._position.evaluation_s

    def state(self) -> TrainingState:
        """Copy all that is needed to go on from here: between two steps, on all workers alike."""
        stepper = self._stepper
        losses = stepper.sum_losses() / self._workers.size
        return TrainingState.capture(self.model, stepper.optimizers, losses, self._position)

    def restore(self, state: TrainingState) -> None:
        """Go on from a state of the same trial: what follows is what would have followed there.

        On a CPU with one worker that is so to the last bit.

        Raises:
            CheckpointError: if it is the state of another trial.
        """
        state.restore(self.model, self._stepper.optimizers, self._stepper.losses)
        self._stepper.forget_capture()
        self._position = replace(state.position)
        self._stepper.batches.seek(state.position.step)
        self._draw_apart()

    def evaluations(self, is_cancelled: Callable[[], bool] = lambda: False) -> Iterator[Evaluation]:
        """Train to the end.

        Args:
            is_cancelled: asked after every step; must answer alike on all workers.

        Yields:
            Each evaluation of the valid split, with the model in evaluation mode. A generator that
            is closed, or cancelled, trains no further.

        Raises:
            TrainingError: if the loss is not finite.
        """
        position = self._position
        for stop in self._stops[position.num_evaluations :]:
            self._stepper.resume()
            while position.step < stop:
                started = time.perf_counter()
                self._stepper.step()
                position.step += 1
                position.training_s += time.perf_counter() - started
                if is_cancelled():
                    return
            yield self._evaluate(position)

    def _draw_apart(self) -> None:
        """Give every rank dropout masks of its own: all have begun with one random state."""
        if self._workers.rank > 0:
            seeds = (self._seed, self._workers.rank, self._position.step)
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    def _evaluate(self, position: Position) -> Evaluation:
        started = time.perf_counter()
        loss, bce, pwiser = self._stepper.mean_losses()
        now = time.perf_counter()
        position.training_s += now - started
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} before step {position.step} "
                f"(BCE {bce}, PWiseR {pwiser}); a smaller training.learning_rate may help"
            )
        valid = self._valid_split
        logits_NT = predict_logits(self.model, valid, self._workers)
        metrics = evaluate(logits_NT, valid.clicks_N, valid.conversions_N)
        position.evaluation_s += time.perf_counter() - now
        position.num_evaluations += 1
        return Evaluation(
            index=position.num_evaluations,
            num_evaluations=len(self._stops),
            step=position.step,
            epoch=position.step / self._stepper.steps_per_epoch,
            metrics=metrics,
            train_loss=loss,
            train_bce=bce,
            train_pwiser=pwiser,
            training_s=position.training_s,
            evaluation_s=position.evaluation_s,
        )


def train(
    configuration: TrialConfiguration,
    inputs: Inputs,
    train_split: Rows,
    valid_split: Rows,
    workers: Workers,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Evaluation, nn.Module]]:
    """Train one trial from its beginning; the arguments and the faults are those of `Training`.

    Yields:
        Each evaluation, with the model in evaluation mode.
    """
    training = Training(configuration, inputs, train_split, valid_split, workers)
    for evaluation in training.evaluations(is_cancelled):
        yield evaluation, training.model


@torch.no_grad()
def predict_logits(model: nn.Module, split: Rows, workers: Workers) -> torch.Tensor:
    """Compute the logits of a whole split in float32, each worker a share of it.

    Returns:
        (N, T), float32, the same on every worker. The model is left in evaluation mode.
    """
    model.eval()
    share = workers.share_of(len(split))
    parts = [
        model(chunk.ids_NF, chunk.numericals_ND.float())
        for chunk in split.chunks(share, EVALUATION_BATCH)
    ]
    num_heads = int(model.num_heads)  # type: ignore[arg-type]
    empty = torch.zeros(0, num_heads, device=workers.device)
    logits_BT = torch.cat(parts) if parts else empty
    return workers.gather_rows(logits_BT.float(), len(split))


class _Stepper:
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
                check_can_compile(workers)
            self.parallel = _parallel(model, settings, workers)
            captures = captures_steps(
                settings.cuda_graph, configuration.model, self.optimizers, workers
            )
        # On a GPU the model alone: there a graph is what saves launches.
        self.unchecked = settings.compile and device.type == "cpu"
        self.batch_losses = compiled(_batch_losses) if self.unchecked else _batch_losses
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
    """Return what a step calls: the model itself, compiled, or one of several workers'."""
    if settings.compile and workers.device.type == "cuda":
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


def _evaluation_steps(steps_per_epoch: int, settings: TrainingSettings) -> list[int]:
    per_epoch = min(max(round(1 / settings.evaluate_every), 1), steps_per_epoch)
    stops = {
        epoch * steps_per_epoch + -(-steps_per_epoch * part // per_epoch)
        for epoch in range(settings.epochs)
        for part in range(1, per_epoch + 1)
    }
    return sorted(stops)
