"""A long search under fire: is every trial accounted for, and what does it cost?

    python benchmarks/soak.py [--trials 200] [--every 30]

One job twice, on two lanes: left alone, and with a SIGKILL of a random part of it (worker, Train
controller, Tune actor, queue, driver) every so many seconds, the same command given again whenever
it ends early. Printed are the wall times and their ratio, the trials by state, what was killed how
often, and, of the quiet job, the own memory (USS) of driver and queue in the first quarter of its
search against the last. The last line is one line of JSON.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow.tracking import MlflowClient
from process_memory import parts
from run_header import run_header

from datasets.sources.synthetic import synthesize
from tuner.results import find_experiment, search_all

MIB = 1024**2
MAX_GIVEN = 50
TITLES = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::LaneController",
    "tune-actor": "ray::ResourceTrainable",
    "queue": "ray::TrialQueue",
    "driver": "",
}


class Job:
    """One job and the process that runs it."""

    def __init__(self, directory: Path, name: str, trials: int) -> None:
        self.name = name
        self.trials = trials
        self.uri = f"sqlite:///{directory / 'mlflow.db'}"
        self.path = directory / f"{name}.yaml"
        job = {
            "name": name,
            "datasets": [str(directory / "demo")],
            "models": ["mmoe"],
            "search": {
                "sampler": "random",
                "pruner": "none",
                "trials": trials,
                "replicates": 0,
            },
            "training": {"epochs": 2, "batch_size": 256, "evaluate_every": 0.5},
            "model": {"embedding_dim": 16, "num_experts": 4, "expert_units": [64, 32]},
            "resources": {"lanes": 2, "cpus_per_worker": 1},
            "storage": str(directory / "storage"),
            "tracking": {"uri": self.uri},
        }
        self.path.write_text(yaml.safe_dump(job))

    def run(self, beside: Callable[[psutil.Process], None]) -> tuple[float, int]:
        """Give the command until the job is done; return the seconds and how often it was given."""
        begun = time.perf_counter()
        for given in range(1, MAX_GIVEN + 1):
            command = [sys.executable, "-m", "tuner", "tune", str(self.path)]
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as one:
                over = threading.Event()
                thread = threading.Thread(target=watch, args=(one, over, beside))
                thread.start()
                one.wait()
                over.set()
                thread.join()
                if one.returncode == 0:
                    return time.perf_counter() - begun, given
        raise SystemExit(f"{self.name} has not come to an end after {MAX_GIVEN} commands")

    def states(self) -> Counter[str]:
        """Count the trials by state; each number must be there once."""
        client = MlflowClient(self.uri)
        runs = search_all(client, find_experiment(client, self.name).experiment_id, "trial")
        numbers = sorted(int(run.data.tags["pwiser.trial"]) for run in runs)
        if numbers != list(range(self.trials)):
            raise SystemExit(f"{self.name}: trials are missing or there twice: {numbers}")
        return Counter(run.data.tags.get("pwiser.state", run.info.status) for run in runs)


def watch(
    process: "subprocess.Popen[bytes]",
    over: threading.Event,
    beside: Callable[[psutil.Process], None],
) -> None:
    """Call `beside` every second while a process runs."""
    while not over.wait(1.0):
        try:
            beside(psutil.Process(process.pid))
        except psutil.Error:
            continue


class Memory:
    """Samples the own memory (USS) of driver and queue."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {"driver": [], "queue": []}

    def __call__(self, driver: psutil.Process) -> None:
        """Take a sample, once there are lanes."""
        if not parts(driver, TITLES["worker"]):
            return
        for name, samples in self.samples.items():
            samples += [one.memory_full_info().uss / MIB for one in parts(driver, TITLES[name])]

    def quarters(self) -> dict[str, tuple[float, float]]:
        """Mean MiB in the first and in the last quarter."""
        found = {}
        for name, samples in self.samples.items():
            if len(samples) < 4:
                raise SystemExit("the job is too short to compare its quarters; give more --trials")
            size = len(samples) // 4
            found[name] = (statistics.mean(samples[:size]), statistics.mean(samples[-size:]))
        return found


class Killer:
    """Kills a random part of a job every so many seconds."""

    def __init__(self, every_s: float, seed: int) -> None:
        self.every_s = every_s
        self.random = random.Random(seed)
        self.next = time.monotonic() + every_s
        self.killed: Counter[str] = Counter()

    def __call__(self, driver: psutil.Process) -> None:
        """Kill, if it is time and what was chosen is there."""
        if time.monotonic() < self.next:
            return
        name = self.random.choice(list(TITLES))
        found = parts(driver, TITLES[name])
        if found and parts(driver, TITLES["worker"]):
            os.kill(self.random.choice(found).pid, signal.SIGKILL)
            self.killed[name] += 1
            self.next = time.monotonic() + self.every_s


def main() -> None:
    """Run both jobs and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between kills")
    parser.add_argument("--impressions", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    header = run_header(arguments.seed, "ray", "torch", trials=arguments.trials)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        synthesize(out=directory / "demo", impressions=arguments.impressions, seed=0)
        quiet, fired = (Job(directory, name, arguments.trials) for name in ("quiet", "fired"))
        memory, killer = Memory(), Killer(arguments.every, arguments.seed)
        quiet_s, _ = quiet.run(memory)
        print(f"left alone:  {quiet_s:.0f} s, {dict(quiet.states())}", flush=True)
        for part, (first, last) in memory.quarters().items():
            print(f"  {part}: {first:.0f} MiB, then {last:.0f} MiB ({last / first - 1:+.1%})")
        killer.next = time.monotonic() + arguments.every
        fired_s, given = fired.run(killer)
        killed = ", ".join(f"{part} {count}" for part, count in sorted(killer.killed.items()))
        print(f"under fire:  {fired_s:.0f} s, {dict(fired.states())}; killed: {killed}")
        print(f"  {fired_s / quiet_s:.2f} times as long; the command was given {given} times")
        result: dict[str, Any] = {
            "quiet_s": quiet_s,
            "fired_s": fired_s,
            "states": fired.states(),
            "killed": killer.killed,
            "memory_mib": memory.quarters(),
        }
    print(json.dumps(header | result))


if __name__ == "__main__":
    main()
