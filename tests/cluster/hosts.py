"""Hosts on one machine: network namespaces on a bridge, each with an address of its own.

Needs root and iproute2. Every process started on a host is ended by its id when the host goes.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Host", "hosts", "why_not"]

NETWORK = "10.214.0"
GRACE_S = 10.0


@dataclass
class Host:
    """One namespace.

    Attributes:
        namespace: its name.
        address: its IP address.
        own_directory: what its processes see at `private`.
        private: a directory that every host has for itself, where Ray keeps its sockets.
        environment: what its processes start with.
    """

    namespace: str
    address: str
    own_directory: Path
    private: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *command: str) -> list[str]:
        """Give the command line that runs a command on this host."""
        mount = f'mount --bind {self.own_directory} {self.private} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", mount, "sh", *command]

    def start(
        self, *command: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a process; what it prints goes to a file."""
        with log.open("ab") as sink:
            return subprocess.Popen(
                self.command(*command),
                env=self.environment | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(
        self,
        *command: str,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
        without: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end and give what it printed."""
        merged = self.environment | dict(environment or {})
        return subprocess.run(
            self.command(*command),
            env={name: value for name, value in merged.items() if name not in without},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def add_address(self, number: int) -> str:
        """Give the host a further address, and say which."""
        address = f"{NETWORK}.{number}"
        _ip("-n", self.namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        return address

    def lose_route_to(self, address: str) -> None:
        """Have the host reach an address no more."""
        _ip("-n", self.namespace, "route", "add", "blackhole", f"{address}/32")

    def pids(self) -> list[int]:
        """List the processes of the namespace."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in found.stdout.split()]

    def end_processes(self) -> None:
        """End every process of the namespace: first asked, then killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_S
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.pids() and time.monotonic() < deadline:
                time.sleep(0.1)


def why_not() -> str | None:
    """Say why this machine can have no hosts of its own; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"pwprobe{os.getpid()}"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        return f"network namespaces are not permitted here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@contextlib.contextmanager
def hosts(names: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, Host]]:
    """Make hosts that reach each other and nothing else; all of it goes when the context ends.

    Args:
        names: of the hosts, two letters or so.
        environment: what their processes start with.
    """
    directory = Path(tempfile.mkdtemp(prefix="pw"))  # short: Ray's sockets lie below it
    private = directory / "ray"
    private.mkdir()
    own = f"pw{os.getpid() % 10_000}"
    made: dict[str, Host] = {}
    switch = f"{own}sw"  # a namespace too, so that the machine's own network stays as it is
    _ip("netns", "add", switch)
    try:
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, start=1):
            own_directory = directory / name
            own_directory.mkdir()
            host = Host(
                f"{own}{name}", f"{NETWORK}.{number}", own_directory, private, dict(environment)
            )
            _ip("netns", "add", host.namespace)
            made[name] = host
            port = f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns",
                host.namespace)  # fmt: skip
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made.values():
            host.end_processes()
            _ip("netns", "del", host.namespace)
        _ip("netns", "del", switch)
        shutil.rmtree(directory, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
