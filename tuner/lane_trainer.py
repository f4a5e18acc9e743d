"""Ray Train's trainer, with what it keeps to itself: a run's controller and its resources."""

from typing import Any

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.lane_backend import LaneController, LaneScalingPolicy

__all__ = ["LaneTrainer"]

UNWANTED_CALLBACKS = (PlacementGroupCleanerCallback, DatasetsCallback)
"""Each starts a process per run: one is harmful (see `LaneTrainer`), the other is for Ray Data."""


class LaneTrainer(TorchTrainer):  # type: ignore[misc]
    """A trainer whose run can be killed from outside, and cleaned up after.

    A controller that is left to itself ends once nobody knows of it any more, but may wait for ever
    for a lock of its own while it does so (Ray 2.60), or outlive a Ray that ends at this moment. A
    dead one leaves its workers' placement group behind. Ray Train has a process for each
    run that removes it, which asks Ray's dashboard whether the controller lives: without one it
    never learns, and where another Ray on the same machine has one, it may ask that, which knows
    of no such controller, and take the workers of a healthy run away. Hence `release`.

    Attributes:
        controller: the run's; None before it has been started.
    """

    controller: ray.actor.ActorHandle | None = None

    def release(self) -> None:
        """Kill the controller, give back what its run still holds; workers that live on end too."""
        if self.controller is None:
            return
        ray.kill(self.controller)
        controller_id = self.controller._actor_id.binary()
        for found in state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(found)
            if group.creator_actor_id == controller_id:
                group_id = ray.PlacementGroupID(group.placement_group_id)
                remove_placement_group(PlacementGroup(group_id))

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, UNWANTED_CALLBACKS)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:  # noqa: ANN401 - Ray's
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {
            "num_cpus": 0,
            "scheduling_strategy": here,
            "runtime_env": {"env_vars": get_env_vars_to_propagate()},
        }
        settings["scaling_policy"] = LaneScalingPolicy(self.scaling_config)
        self.controller = ray.remote(**options)(LaneController).remote(**settings)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())
