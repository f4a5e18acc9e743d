"""How Ray Train sets up the workers of lanes of one worker.

Without torch: Ray Train's controller, a process of its own, imports this and would take twice the
memory.
"""

from dataclasses import dataclass

from ray.train.backend import Backend, BackendConfig

__all__ = ["SeparateWorkers", "SeparateWorkersConfig"]


class SeparateWorkers(Backend):  # type: ignore[misc]
    """Sets up nothing: every worker is a lane, and is replaced without the others."""

    has_replica_groups = True


@dataclass
class SeparateWorkersConfig(BackendConfig):  # type: ignore[misc]
    """For Train runs whose workers are lanes of one worker each.

    Attributes:
        backend: a `TorchTrainer` looks for it, and here it is of no use.
    """

    backend: str | None = None

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train sets its workers up with."""
        return SeparateWorkers
