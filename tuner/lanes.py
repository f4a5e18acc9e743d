"""The driver's side of the lanes: a few Ray Train runs, held open for the whole job.

A Train run costs its head several processes, whatever it runs. So lanes of one worker share runs:
each worker is a replica group of its own, which Ray Train replaces when it dies, while the other
lanes of the run go on. A lane of several workers, which start anew together, has a run to itself.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets.errors import one_line
from tuner.cluster import Lanes
from tuner.lane import LaneSettings, run_lane
from tuner.lane_backend import SeparateWorkersConfig
from tuner.lane_trainer import LaneTrainer
from tuner.network import NodeTorchConfig
from tuner.trial_queue import TrialQueue

__all__ = ["QUEUE_DIED", "open_lanes", "queue_actor", "spread_lanes"]

MAX_RUNS = 4
"""Train runs of one job's lanes of one worker: up to as many lanes, each has a run to itself."""

MAX_RESTARTS = 8
"""Times, for each lane of a Train run, that it replaces workers before the run has failed."""

QUEUE_DIED = "the actor of its queue died"

MAX_STARTS = 4
"""Times that a Train run is started whose controller dies, or gives up on a worker's start.

Both begin anew with every task that a lane of the run has finished: faults of days do not add up.
"""

CLOSE_TIMEOUT_S = 20.0
"""Seconds that the runs have to end; one whose workers were never placed would not end at all."""

KILL_TIMEOUT_S = 10.0

ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""With a heap for each thread, glibc's default, the queue grows by 23 KB per trial, and a lane,
which Ray Train runs in a thread, takes every tensor above 64 MB anew, page fault by page fault.
"""

QUEUE_CALLS = 10_000
"""Calls that the queue lets wait at once; a lane and its trial have three."""


def queue_actor() -> ray.actor.ActorClass:
    """Make the queue's actor class, for hundreds of lanes: Ray itself lets 1,000 calls wait.

    It is placed on the driver's node, so that the loss of another one costs no more than its lanes.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(
        num_cpus=0,
        max_concurrency=QUEUE_CALLS,
        scheduling_strategy=here,
        runtime_env={"env_vars": ONE_HEAP},
    )(TrialQueue)


def spread_lanes(names: Sequence[str], *, workers_per_lane: int) -> list[tuple[str, ...]]:
    """Say which lanes share a Train run.

    Args:
        names: of the lanes, at least one.
        workers_per_lane: lanes of several workers share none.

    Returns:
        The names of each run's lanes: as even as can be, all of them in order.
    """
    num_runs = len(names) if workers_per_lane > 1 else min(len(names), MAX_RUNS)
    ends = [len(names) * (index + 1) // num_runs for index in range(num_runs)]
    return [tuple(names[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@contextmanager
def open_lanes(
    lanes: Lanes,
    queue: ray.actor.ActorHandle,
    *,
    job: str,
    storage_path: str,
    on_lost: Callable[[str, int], None],
) -> Iterator[None]:
    """Start the lanes, and end them when the context ends.

    Runs that have not ended `CLOSE_TIMEOUT_S` later, or at once where the queue has died, are
    killed: a thread that still waited for one when Ray shuts down would take this process with it.

    Args:
        lanes: how many, and of what size.
        queue: the actor of a `TrialQueue`; it ends with the lanes.
        job: for the names of the lanes.
        storage_path: where Ray Train keeps the state of its runs.
        on_lost: called when lanes are given up, with the reason and the number of those that are
            left, from another thread.
    """
    names = [f"{job}-lane-{index}" for index in range(lanes.num_lanes)]
    shares = spread_lanes(names, workers_per_lane=lanes.workers_per_lane)
    runs = [_Run(shared, lanes, queue, storage_path) for shared in shares]
    lost: set[str] = set()
    closing = threading.Event()

    def lose(lost_names: Sequence[str], reason: str) -> None:
        if not lost.issuperset(lost_names):
            lost.update(lost_names)
            on_lost(reason, lanes.num_lanes - len(lost))

    def serve(run: _Run) -> None:
        reason = run.serve(closing)
        if reason is not None:
            lose(run.names, reason)

    threads = [
        threading.Thread(target=serve, args=(run,), name=run.names[0], daemon=True) for run in runs
    ]
    threads.append(threading.Thread(target=_hear_of_given_up, args=(queue, lose), daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        closing.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        try:
            ray.get(queue.cancel_all.remote("the job has ended"))
            ray.get(queue.close.remote())
        except RayActorError:  # the queue is dead: Ray Train would only start its lanes again
            deadline = time.monotonic()
        _join(threads, deadline)
        for run in runs:
            run.trainer.release()
        _join(threads, time.monotonic() + KILL_TIMEOUT_S)
        for run in runs:  # what a controller placed while it was killed
            run.trainer.release()
        ray.kill(queue)


def _hear_of_given_up(
    queue: ray.actor.ActorHandle, lose: Callable[[Sequence[str], str], None]
) -> None:
    """Pass on which lanes the queue gives up, until it is closed."""
    with suppress(RayActorError):  # of which the runs tell
        while (told := ray.get(queue.next_given_up.remote())) is not None:
            lose([told.lane], f"{told.lane} gave back its trials, at last on {told.reason}")


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    """Wait for all of them, until a moment of `time.monotonic`."""
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))


class _Run:
    """A Train run and the lanes that share it.

    Ray Train replaces workers that die once they have started, up to a number; a run whose
    controller dies, in which a worker dies while it starts, or that had done some work before it
    came to that number, is started anew here.
    """

    def __init__(
        self, names: tuple[str, ...], lanes: Lanes, queue: ray.actor.ActorHandle, storage_path: str
    ) -> None:
        self.names = names
        self._lanes = lanes
        self._queue = queue
        self._storage_path = storage_path
        self.trainer = self._new_trainer(0)

    def _new_trainer(self, start: int) -> LaneTrainer:
        name = f"{self.names[0]}-{start}" if start else self.names[0]
        return _trainer(name, self.names, self._lanes, self._queue, self._storage_path)

    def serve(self, closing: threading.Event) -> str | None:
        """Hold the run open until the queue closes; return why it ended before, if it did."""
        num_finished = num_in_vain = 0
        for start in itertools.count():
            if closing.is_set():
                return None
            if start:
                self.trainer = self._new_trainer(start)
            try:
                self.trainer.fit()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever ends it
                if closing.is_set():  # Ray, too, may have ended: it raises SystemExit in threads
                    return None
                reason = one_line(error, None)
                try:
                    ray.get([self._queue.lose_lane.remote(name) for name in self.names])
                    before, num_finished = num_finished, self._num_finished()
                except RayActorError:
                    return QUEUE_DIED
                num_in_vain = 0 if num_finished > before else num_in_vain + 1
                is_lost = isinstance(error, RayActorError | ControllerError)
                self.trainer.release()
                if num_in_vain >= (MAX_STARTS if is_lost else 1):
                    return reason
            else:
                return None
        raise AssertionError

    def _num_finished(self) -> int:
        return sum(ray.get([self._queue.num_finished.remote(name) for name in self.names]))


def _trainer(
    run_name: str,
    names: tuple[str, ...],
    lanes: Lanes,
    queue: ray.actor.ActorHandle,
    storage_path: str,
) -> LaneTrainer:
    resources = {"CPU": float(lanes.cpus_per_worker)}
    if lanes.gpus_per_worker:
        resources["GPU"] = lanes.gpus_per_worker
    settings: LaneSettings = {
        "lanes": names,
        "queue": queue,
        "threads": lanes.cpus_per_worker,
        "gpu_share": min(lanes.gpus_per_worker, 1.0),
    }
    config = SeparateWorkersConfig if lanes.workers_per_lane == 1 else NodeTorchConfig
    return LaneTrainer(
        run_lane,
        train_loop_config=settings,
        torch_config=config(lanes=names, queue=queue),
        scaling_config=ScalingConfig(
            num_workers=len(names) * lanes.workers_per_lane,
            use_gpu=bool(lanes.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=MAX_RESTARTS * len(names)),
            worker_runtime_env={"env_vars": ONE_HEAP},
        ),
    )
