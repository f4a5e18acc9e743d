"""The network interface that a lane's workers reach each other by.

Gloo and NCCL bind the address that the host name resolves to, which in containers is often
127.0.0.1: a lane over two nodes then waits for a peer on its own loopback. Ray knows better: every
node has the address by which the others reach it. The interface that holds it is named to both, in
each worker, before the process group forms.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig

from tuner.lane_backend import give_leases_back

__all__ = ["NodeTorchBackend", "NodeTorchConfig", "bind_node_interface", "find_interface"]

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def find_interface(address: str, addresses: Mapping[str, Sequence[str]]) -> str | None:
    """Name the interface that holds an address.

    Args:
        address: an IPv4 or IPv6 address.
        addresses: of every interface, by its name; an IPv6 one may end in `%` and its scope.

    Returns:
        The interface's name; None if none holds the address, as behind a translating router.
    """
    for interface, held in addresses.items():
        if address in (one.partition("%")[0] for one in held):
            return interface
    return None


def bind_node_interface() -> None:
    """Have this process's Gloo and NCCL use the interface of its Ray node's address.

    What the environment says already stands; an address that no interface holds changes nothing.
    """
    addresses = {
        name: [one.address for one in held] for name, held in psutil.net_if_addrs().items()
    }
    interface = find_interface(ray.util.get_node_ip_address(), addresses)
    if interface is not None:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, interface)


class NodeTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's backend for torch, which names the interfaces before it connects the workers."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: "NodeTorchConfig") -> None:
        """Bind the interface of each worker's node, then form the process group."""
        worker_group.execute(bind_node_interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: "NodeTorchConfig") -> None:
        """Leave the process group, and give back the lane's lease."""
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            if backend_config.queue is not None:
                give_leases_back(worker_group, backend_config.lanes, backend_config.queue)


@dataclass
class NodeTorchConfig(TorchConfig):  # type: ignore[misc]
    """A `TorchConfig` whose workers form their process group over their nodes' own interfaces.

    Attributes:
        lanes: the lane of a Train run.
        queue: the actor of the `TrialQueue` that it takes from; None for workers that are no lane.
    """

    lanes: tuple[str, ...] = ()
    queue: ray.actor.ActorHandle | None = None

    @property
    def backend_cls(self) -> type[NodeTorchBackend]:
        """What Ray Train sets its workers up with."""
        return NodeTorchBackend
