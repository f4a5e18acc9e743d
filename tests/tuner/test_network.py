import os
import subprocess
import sys

import psutil
import pytest
import ray

from tuner.network import NodeTorchConfig, bind_node_interface, find_interface

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.5", "fe80::1%eth0"],
    "eth1": ["10.0.1.5"],
}


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.0.1.5", "eth1"),
        ("10.0.0.5", "eth0"),
        ("127.0.0.1", "lo"),
        ("fe80::1", "eth0"),
        ("10.0.0.50", None),
    ],
)
def test_the_interface_is_the_one_that_holds_the_address(
    address: str, interface: str | None
) -> None:
    assert find_interface(address, ADDRESSES) == interface


def test_what_the_environment_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    bind_node_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    held = [one.address for one in psutil.net_if_addrs()[os.environ["NCCL_SOCKET_IFNAME"]]]
    assert ray.util.get_node_ip_address() in held


def test_a_process_group_forms_over_the_interface_found() -> None:
    program = (
        "import torch.distributed as dist\n"
        "from tuner.network import bind_node_interface\n"
        "bind_node_interface()\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "print(dist.get_world_size())"
    )
    environment = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    assert found.stdout == "1\n"


def test_ray_train_is_given_the_backend_that_binds() -> None:
    assert NodeTorchConfig().backend_cls.on_start.__module__ == "tuner.network"
