"""A lane's workers: they train trial after trial, all ranks in step.

Rank 0 talks with the queue and tells the others, over a gloo group of its own, so that every rank
takes the same decision and no collective is left waiting.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import nn

from datasets import Dataset, DatasetError, open_dataset
from trainables.batches import WINDOWS_HELD, DeviceImpressions, Rows, StreamedRows, inputs_of
from trainables.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from trainables.configuration import TrialConfiguration
from trainables.execution import fits_in_memory, memory_limits
from trainables.metrics import evaluate
from trainables.models import Inputs
from trainables.training import Evaluation, Training, TrainingError, predict_logits
from trainables.training_state import TrainingState
from trainables.workers import Workers
from tuner.errors import StorageError
from tuner.lane_backend import lane_of
from tuner.lane_faults import DISK_ERRORS, LaneFaultError, blaming_lane
from tuner.lane_poll import Limit, Poll
from tuner.messages import Generation, Reading, Report, Seconds, Task, TestTask, TrialTask
from tuner.objective import objective_values, score
from tuner.storage import download, exists, upload
from tuner.trial_queue import CLOSED
from tuner.watchdog import Watchdog

__all__ = ["LaneSettings", "run_lane"]

TAKE_TIMEOUT_S = 60.0

STORAGE_PATIENCE_S = 300.0
"""For how long a trial waits for a storage that is away; less than NCCL lets other ranks wait."""

REPORTS = TypeAdapter(list[Report])
REPORTS_NOTE = "reports"
SECONDS = TypeAdapter(Seconds)
SECONDS_NOTE = "seconds"

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class LaneSettings(TypedDict):
    """What the workers of a Train run are started with: Ray Train's `train_loop_config`.

    Several lanes share a run only if each has one worker: the worker's rank then says which it is.
    """

    lanes: tuple[str, ...]
    queue: ray.actor.ActorHandle
    threads: int
    gpu_share: float


def run_lane(settings: LaneSettings) -> None:
    """Serve trials until the queue closes; Ray Train runs this on every worker."""
    torch.set_num_threads(settings["threads"])
    context, names = ray.train.get_context(), settings["lanes"]
    several = len(names) == 1 and context.get_world_size() > 1
    name = lane_of(context.get_world_rank(), names)
    group = dist.group.WORLD if several else None
    _Lane(name, settings["queue"], group, settings["gpu_share"]).serve()


@dataclass(frozen=True)
class _LoadedDataset:
    dataset: Dataset
    inputs: Inputs
    train: Rows
    valid: Rows
    reading: Reading


class _Lane:
    """The workers' side of a lane.

    Attributes:
        watchdog: of the task in hand.
    """

    watchdog: Watchdog

    def __init__(
        self,
        name: str,
        queue: ray.actor.ActorHandle,
        group: dist.ProcessGroup | None,
        gpu_share: float,
    ) -> None:
        self.queue = queue
        self.gpu_share = gpu_share
        self.control = None if group is None else dist.new_group(backend="gloo")
        self.workers = Workers(device=ray.train.torch.get_device(), group=group)
        self.generation: Generation = self._decide(lambda: ray.get(queue.join.remote(name)))
        self.nodes = self._gather_nodes()
        self.loaded: _LoadedDataset | None = None
        # When the last task was done; the wait for the first one is the job's start-up.
        self.free_since: float | None = None

    def serve(self) -> None:
        while True:
            task = self._decide(self._take)
            if task == CLOSED:
                return
            if isinstance(task, str) or task is None:
                continue
            self.watchdog = Watchdog(task.hang_s)
            with self.watchdog.watching():
                self._run(task)
            self._ask(lambda: self.queue.finish.remote(self.generation))

    def _take(self) -> Task | str | None:
        answer: Task | str | None = ray.get(
            self.queue.take.remote(self.generation, timeout_s=TAKE_TIMEOUT_S)
        )
        return answer

    def _run(self, task: Task) -> None:
        try:
            with blaming_lane((DatasetError, StorageError)):
                self._start_device()
                if isinstance(task, TrialTask):
                    self._train(task)
                else:
                    self._test(task)
                    self.free_since = time.perf_counter()
        except LaneFaultError as error:
            reason = f"node {ray.util.get_node_ip_address()}: {error}"
            ray.get(self.queue.give_back.remote(self.generation, reason))
            raise  # new workers may do better, and meanwhile another lane may take the trial
        except Exception as error:
            self.free_since = time.perf_counter()
            if _is_peers(error):  # the lane is lost, and its trial goes on elsewhere
                raise
            logger.exception("trial %s failed", task.id)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            ray.get(self.queue.fail.remote(self.generation, task.id, reason))
            if self.workers.size > 1 and not isinstance(error, TrainingError):
                raise  # the other ranks may wait in a collective: the group must start anew
            if self.workers.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost to this process

    @blaming_lane()
    def _start_device(self) -> None:
        if self.workers.device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.set_device(self.workers.device)

    def _train(self, task: TrialTask) -> None:
        started = time.perf_counter()
        lane_since = started if self.free_since is None else self.free_since
        configuration = TrialConfiguration.model_validate(task.configuration)
        loaded = self._load(task.dataset, task.reading)
        training = Training(configuration, loaded.inputs, loaded.train, loaded.valid, self.workers)
        reports, before = self._go_on(task, training)
        best = max((_score(report, task) for report in reports), default=float("-inf"))
        setup_s = before.setup + time.perf_counter() - started
        self.watchdog.pat()
        if not all(self._report(report) for report in reports):
            return
        lane_since -= before.lane

        def keep() -> None:
            lane_s = time.perf_counter() - lane_since
            self._keep(task, training.state(), reports, Seconds(setup=setup_s, lane=lane_s))

        poll = Poll(
            self.queue,
            self.generation,
            task,
            Limit(task.limit_s, started - before.setup - training.worked_s),
            self.watchdog,
            self._decide,
            self.workers,
            keep,
        )
        for evaluation in training.evaluations(poll):
            report = self._evaluated(evaluation)
            if _score(report, task) > best:
                best = _score(report, task)
                self._save(task, configuration, loaded.inputs, training.model)
            now = time.perf_counter()
            seconds = Seconds(
                setup=setup_s,
                training=evaluation.training_s,
                evaluation=evaluation.evaluation_s,
                lane=now - lane_since,
            )
            reports.append(replace(report, seconds=seconds))
            self.free_since = now
            if not self._report(reports[-1]):
                break
        if poll.cancelled:
            self.free_since = time.perf_counter()
        if self._decide(lambda: bool(ray.get(self.queue.is_interrupted.remote(self.generation)))):
            keep()

    def _evaluated(self, evaluation: Evaluation) -> Report:
        return Report(
            index=evaluation.index,
            last=evaluation.last,
            step=evaluation.step,
            epoch=evaluation.epoch,
            metrics=evaluation.metrics,
            train={
                "loss": evaluation.train_loss,
                "bce": evaluation.train_bce,
                "pwiser": evaluation.train_pwiser,
            },
            nodes=self.nodes,
        )

    def _go_on(self, task: TrialTask, training: Training) -> tuple[list[Report], Seconds]:
        """Take over what an earlier lane, or job, left of the trial; give its evaluations so far.

        A state that rank 0 cannot read or restore is worth a warning and a fresh start.
        """
        state = _find_state(task, training) if self.workers.rank == 0 else None
        if not self._decide(lambda: state is not None):
            return [], Seconds()
        if state is None:
            state = _restore(task, training)
        return (
            REPORTS.validate_json(state.notes[REPORTS_NOTE]),
            SECONDS.validate_json(state.notes[SECONDS_NOTE]),
        )

    @blaming_lane(DISK_ERRORS)
    def _keep(
        self, task: TrialTask, state: TrainingState, reports: list[Report], seconds: Seconds
    ) -> None:
        """Write down where the trial is; whoever goes on with it repeats these evaluations."""
        if self.workers.rank == 0:
            notes = {
                REPORTS_NOTE: REPORTS.dump_json(reports).decode(),
                SECONDS_NOTE: SECONDS.dump_json(seconds).decode(),
            }
            with tempfile.TemporaryDirectory() as directory:
                replace(state, notes=notes).save(Path(directory))
                try:
                    upload(Path(directory), task.state)
                except StorageError as error:
                    logger.warning("trial %s goes on from an older state: %s", task.id, error)

    def _test(self, task: TestTask) -> None:
        if not exists(task.checkpoint, STORAGE_PATIENCE_S):
            raise CheckpointError(f"{task.checkpoint} is not there; was it moved or deleted?")
        with download(task.checkpoint, STORAGE_PATIENCE_S) as directory:
            *_, model = load_checkpoint(directory, self.workers.device)
        with blaming_lane():
            split = self._rows(open_dataset(task.dataset), "test", task.reading)
        metrics = evaluate(
            predict_logits(model, split, self.workers), split.clicks_N, split.conversions_N
        )
        self._report(Report(index=1, last=True, step=0, epoch=0.0, metrics=metrics))

    @blaming_lane()
    def _load(self, uri: str, reading: Reading) -> _LoadedDataset:
        loaded = self.loaded
        if loaded is None or (loaded.dataset.uri, loaded.reading) != (uri, reading):
            loaded = self.loaded = None  # frees the memory first
            dataset = open_dataset(uri)
            inputs = inputs_of(dataset)
            train_rows, valid_rows = (
                self._rows(dataset, split, reading) for split in ("train", "valid")
            )
            loaded = _LoadedDataset(dataset, inputs, train_rows, valid_rows, reading)
            self.loaded = loaded
        return loaded

    def _rows(self, dataset: Dataset, split: str, reading: Reading) -> Rows:
        """Hold a split, or open it for streaming.

        Where that is left open, by its size beside the splits that are held for training.
        """
        device = self.workers.device
        size_bytes = sum(dataset.size_bytes(name) for name in {"train", "valid", split})
        if reading.mode == "memory" or (
            reading.mode == "auto"
            and fits_in_memory(size_bytes, memory_limits(device, self.gpu_share))
        ):
            return DeviceImpressions.from_impressions(dataset.load_shared(split), device)
        return StreamedRows(
            dataset.stream(split),
            device,
            window_rows=max(reading.buffer_bytes // (WINDOWS_HELD * dataset.row_bytes), 1),
            labelled=split != "train",
        )

    @blaming_lane(DISK_ERRORS)
    def _save(
        self, task: TrialTask, configuration: TrialConfiguration, inputs: Inputs, model: nn.Module
    ) -> None:
        if self.workers.rank == 0:
            with tempfile.TemporaryDirectory() as directory:
                save_checkpoint(Path(directory), configuration, inputs, model)
                upload(Path(directory), task.checkpoint, STORAGE_PATIENCE_S)

    def _gather_nodes(self) -> tuple[str, ...]:
        own = ray.util.get_node_ip_address()
        if self.control is None:
            return (own,)
        addresses: list[str | None] = [None] * self.workers.size
        dist.all_gather_object(addresses, own, group=self.control)
        return tuple(sorted({address for address in addresses if address is not None}))

    def _report(self, report: Report) -> bool:
        with self.watchdog.away():  # the verdict may take as long as it likes
            return self._decide(
                lambda: bool(ray.get(self.queue.report.remote(self.generation, report)))
            )

    def _ask(self, call: Callable[[], ray.ObjectRef]) -> None:
        if self.workers.rank == 0:
            ray.get(call())

    def _decide(self, decide: Callable[[], Answer]) -> Answer:
        """Let rank 0 decide, and every rank follow."""
        if self.control is None:
            return decide()
        answer: list[Answer | None] = [decide() if self.workers.rank == 0 else None]
        dist.broadcast_object_list(answer, src=0, group=self.control)
        return answer[0]  # type: ignore[return-value]


def _is_peers(error: Exception) -> bool:
    """Whether a collective broke, as when another of the lane's workers dies; gloo has no type."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _find_state(task: TrialTask, training: Training) -> TrainingState | None:
    if not exists(task.state, STORAGE_PATIENCE_S):
        return None
    try:
        return _restore(task, training)
    except CheckpointError as error:
        logger.warning("trial %s starts over: %s", task.id, error)
        return None


def _restore(task: TrialTask, training: Training) -> TrainingState:
    with download(task.state, STORAGE_PATIENCE_S) as directory:
        state = TrainingState.load(directory)
    training.restore(state)
    return state


def _score(report: Report, task: TrialTask) -> float:
    return score(objective_values(report.metrics, task.objectives))
