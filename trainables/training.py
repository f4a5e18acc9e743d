"""The training loop: batches of the train split, evaluations of the whole valid split.

Shapes: N impressions of a split, B impressions of a batch, F categorical fields, D numericals,
T heads.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from trainables.batches import DeviceImpressions, Rows
from trainables.configuration import TrainingSettings, TrialConfiguration, build_model
from trainables.metrics import evaluate
from trainables.models import Inputs
from trainables.stepper import Stepper, TrainingError
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
    state is set from the seed. Each worker trains on its part of every batch, and the loss is that
    of the whole batch: the number of workers changes rounding, dropout's masks, the order of
    streamed rows and, where a batch does not divide by it, which rows an epoch leaves out.

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
        self._stepper = Stepper(configuration, self.model, train_split, workers)
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
            TrainingError: if the loss is not finite, or the compiled step has other gradients.
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
        try:
            metrics = evaluate(logits_NT, valid.clicks_N, valid.conversions_N)
        except ValueError as error:
            raise TrainingError(f"after step {position.step}: {error}") from error
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


def _evaluation_steps(steps_per_epoch: int, settings: TrainingSettings) -> list[int]:
    per_epoch = min(max(round(1 / settings.evaluate_every), 1), steps_per_epoch)
    stops = {
        epoch * steps_per_epoch + -(-steps_per_epoch * part // per_epoch)
        for epoch in range(settings.epochs)
        for part in range(1, per_epoch + 1)
    }
    return sorted(stops)
