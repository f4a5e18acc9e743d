"""A cluster of hosts: services, a Ray head, two workers, and a laptop outside of it."""

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # its modules are found by name

from hosts import hosts, why_not
from service_cluster import Cluster, start_ray
from services import postgres_binaries, services


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start everything; it takes half a minute."""
    reason = why_not() or (None if postgres_binaries() else "PostgreSQL is not installed")
    if reason is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("cluster")
    token, password = secrets.token_hex(20), secrets.token_hex(12)
    repository = Path(__file__).parents[2]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(directory / "home"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(repository),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "160",
    }
    for name in ("home", "laptop"):
        (directory / name).mkdir()
    with (
        hosts(["s", "h", "a", "b", "d", "c"], environment) as made,
        services(made["s"], directory, password, secrets.token_hex(12)) as running,
    ):
        for host in made.values():
            host.environment |= running.environment
        found = Cluster(made, running, directory, token, password)
        made["c"].environment["PWISER_ADDRESS"] = found.dashboard
        made["c"].environment["MLFLOW_TRACKING_URI"] = running.tracking
        start_ray(found)
        yield found
