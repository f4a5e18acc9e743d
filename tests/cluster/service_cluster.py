"""The whole service: its hosts and what runs on them, and how a client outside uses it."""

import json
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import yaml
from hosts import Host
from services import Services, wait_until

RAY_PORT, DASHBOARD_PORT = 6379, 8265
CPUS_PER_NODE = 2
SEARCH = {"sampler": "random", "pruner": "none", "replicates": 0}


@dataclass
class Cluster:
    """The whole of it.

    Attributes:
        hosts: by name: `s` services, `h` head, `a` and `b` workers, `c` the client's.
        directory: of the test; the client's files are in `laptop`.
        token: of Ray.
        password: of MLflow.
    """

    hosts: dict[str, Host]
    services: Services
    directory: Path
    token: str
    password: str

    @property
    def laptop(self) -> Path:
        """The client's own directory."""
        return self.directory / "laptop"

    @property
    def dashboard(self) -> str:
        """What the client calls the cluster."""
        return f"http://{self.hosts['h'].address}:{DASHBOARD_PORT}"

    def pwiser(
        self, *arguments: str, timeout: float = 300, **settings: Any
    ) -> "CompletedProcess[str]":
        """Run a command on the client's host."""
        return self.hosts["c"].run(
            "pwiser", *arguments, timeout=timeout, cwd=self.laptop, **settings
        )

    def done(self, *arguments: str, timeout: float = 300, **settings: Any) -> str:
        """Run a command that has to end well; give what it printed."""
        ended = self.pwiser(*arguments, timeout=timeout, **settings)
        assert ended.returncode == 0, f"{arguments}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def status(self, job: str) -> Any:
        """Ask for a job's status."""
        return json.loads(self.done("status", job, "--json"))

    def write_job(self, name: str, **content: Any) -> str:
        """Write a job file in the client's directory."""
        job = {
            "name": name,
            "datasets": [f"{self.services.storage}/data/tiny"],
            "search": SEARCH | {"trials": 6},
            "training": {
                "epochs": 2,
                "batch_size": 256,
                "learning_rate": 0.01,
                "precision": "float32",
            },
            "model": {"embedding_dim": 4, "num_experts": 2, "expert_units": [8]},
            "resources": {"lanes": 2, "cpus_per_worker": CPUS_PER_NODE},
            "tracking": {"uri": self.services.tracking},
            "storage": f"{self.services.storage}/jobs",
        } | content
        (self.laptop / f"{name}.yaml").write_text(yaml.safe_dump(job))
        return f"{name}.yaml"

    def start_worker(self, name: str) -> None:
        """Have a host join the Ray cluster."""
        host = self.hosts[name]
        host.start(
            *("ray", "start", f"--address={self.hosts['h'].address}:{RAY_PORT}"),
            *(f"--node-ip-address={host.address}", f"--num-cpus={CPUS_PER_NODE}"),
            *("--object-store-memory=100000000", "--disable-usage-stats", "--block"),
            log=self.directory / f"ray-{name}.log",
        )

    def resources(self) -> Any:
        """What the cluster's autoscaler state says is used and is there."""
        script = (
            "import json, ray; ray.init(address='auto', log_to_driver=False); "
            "from ray.util.state import list_placement_groups as groups; "
            "print(json.dumps({'total': ray.cluster_resources(), "
            "'free': ray.available_resources(), "
            "'groups': [g.state for g in groups() if g.state != 'REMOVED'], "
            "'nodes': [n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]}))"
        )
        head = self.hosts["h"]
        asked = head.run(
            "python", "-c", script, environment={"RAY_ADDRESS": f"{head.address}:{RAY_PORT}"}
        )
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout.splitlines()[-1])


def start_ray(cluster: Cluster) -> None:
    """Start the head and two workers, and wait until they are one cluster."""
    head = cluster.hosts["h"]
    head.start(
        *("ray", "start", "--head", f"--node-ip-address={head.address}", f"--port={RAY_PORT}"),
        *(f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"),
        *(f"--temp-dir={head.private}", "--num-cpus=0"),
        *("--object-store-memory=100000000", "--disable-usage-stats", "--block"),
        log=cluster.directory / "ray-h.log",
    )
    wait_until(lambda: cluster.pwiser("jobs").returncode == 0, "the Ray head")
    for name in ("a", "b"):
        cluster.start_worker(name)
    wait_until(lambda: len(cluster.resources()["nodes"]) == 3, "the Ray workers")
