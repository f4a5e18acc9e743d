"""How Ray Train sets up and takes down the workers of lanes, seen from its controller.

Without torch: the controller, a process of its own, imports this and would take twice the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group

__all__ = [
    "LaneController",
    "LaneScalingPolicy",
    "SeparateWorkers",
    "SeparateWorkersConfig",
    "give_leases_back",
    "lane_of",
]


def lane_of(rank: int, lanes: Sequence[str]) -> str:
    """Name the lane of a Train run's worker: several lanes share a run only with one worker each.

    Args:
        rank: of the worker in its run.
        lanes: of the run.
    """
    return lanes[0] if len(lanes) == 1 else lanes[rank]


def give_leases_back(
    worker_group: BaseWorkerGroup, lanes: Sequence[str], queue: ray.actor.ActorHandle
) -> None:
    """Give back what the lanes of these workers have taken.

    Their successors would do so, too, but may find no room for long, as when a node is lost.
    """
    contexts = [worker.distributed_context for worker in worker_group.get_workers()]
    ranks = [context.world_rank for context in contexts if context is not None]
    for name in {lane_of(rank, lanes) for rank in ranks}:
        queue.lose_lane.remote(name)


class SeparateWorkers(Backend):  # type: ignore[misc]
    """Sets up nothing: every worker is a lane, and is replaced without the others."""

    has_replica_groups = True

    def on_shutdown(
        self, worker_group: BaseWorkerGroup, backend_config: "SeparateWorkersConfig"
    ) -> None:
        """Give back the lanes' leases: of all, or of the one that is to be replaced."""
        give_leases_back(worker_group, backend_config.lanes, backend_config.queue)


class LaneScalingPolicy(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as the run was made for, which an autoscaler hears of by their placement.

    Ray Train's own policy tells an actor of Ray Data's too, and no worker starts before it answers:
    a process of some seconds, that nothing else here needs.
    """

    def _send_resource_request(self) -> None:
        pass

    _maybe_send_resource_request = _cancel_resource_request = _send_resource_request


class _Nothing:
    """A method of an actor's handle that has nothing to do."""

    @staticmethod
    def remote() -> list[ray.ObjectRef]:
        return []


class _NoCollectives:
    """In the place of Ray Train's `SynchronizationActor`, a process of a run's own.

    Workers meet there in `ray.train.report` and Ray Train's collectives, which no lane calls.
    """

    reset = _Nothing()

    @classmethod
    def options(cls, **_: Any) -> "type[_NoCollectives]":  # noqa: ANN401 - Ray's
        return cls

    @classmethod
    def remote(cls, **_: Any) -> "_NoCollectives":  # noqa: ANN401 - Ray's
        return cls()


class LaneController(TrainController):  # type: ignore[misc]
    """Ray Train's controller, with a process less: see `_NoCollectives`."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - Ray's
        worker_group.SynchronizationActor = _NoCollectives
        state._shutdown_sync_actor = lambda _: None
        super().__init__(**settings)


@dataclass
class SeparateWorkersConfig(BackendConfig):  # type: ignore[misc]
    """For Train runs whose workers are lanes of one worker each.

    Attributes:
        lanes: of the run, by rank.
        queue: the actor of a `TrialQueue`.
        backend: a `TorchTrainer` looks for it, and here it is of no use.
    """

    lanes: tuple[str, ...]
    queue: ray.actor.ActorHandle
    backend: str | None = None

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train sets its workers up with."""
        return SeparateWorkers
