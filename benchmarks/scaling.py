"""Trials per hour over the lanes, the queue's share of a trial, and what one more lane costs.

    python benchmarks/scaling.py

Whole jobs (`run_job`: lanes, queue, Ray Tune's search, MLflow) whose model does nothing but wait in
each of its steps, so that more lanes than cores can be measured on a small machine. Every number of
lanes has a process and a Ray of its own, which is told to have as many CPUs as lanes.

Trials per hour: from the moment when as many trials have ended as there are lanes, to the end of
the last. Linear is what the smallest number of lanes did, in proportion.

The queue's share: the CPU time of its process between those moments, over the trials that ended
between them. The queue is one process with one event loop: with trials of T ms and a share of q ms
it serves T / q lanes at most.

Memory: every process in mid-job, by kind. PSS shares out the pages that several processes have in
common, so that the sum is what they take together; USS counts a process's own pages alone. The
workers and idle processes belong to the lanes' nodes; all other kinds count as the head's, though
the trials' actors may run on any node. What a lane adds to the head is the slope between the two
largest numbers of lanes; both must be 4 or more, since so few lanes have a Train run each. The last
line is one line of JSON.
"""

import argparse
import json
import logging
import os
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import sleep, time
from typing import Any

import psutil
import ray
from apart import measured_apart
from mlflow.tracking import MlflowClient
from rich.console import Console
from run_header import run_header
from torch import Tensor, nn

from datasets import synthesize
from trainables import Inputs
from tuner.embedded_ray import start_embedded_ray
from tuner.job import Job
from tuner.tuning import run_job

SEED = 0
SEARCH = {"replicates": 0, "sampler": "random", "pruner": "none", "seed": SEED}
IMPRESSIONS = 2_000
EVALUATIONS = 4
LANES = (1, 2, 4, 8)
TRIALS_PER_LANE = 8
TRIAL_S = 5.0
HEAD_BYTES = 16e9
SAMPLE_S = 0.25
NOT_OF_THE_HEAD = {"worker", "idle", "other"}
KINDS = {
    "ray::RayTrainWorker": "worker",
    "ray::LaneController": "controller",
    "ray::ResourceTrainable": "trial",
    "ray::TrialQueue": "queue",
    "ray::DashboardAgent": "ray itself",
    "ray::RuntimeEnvAgent": "ray itself",
    "ray::IDLE": "idle",
}

Figures = dict[str, Any]


class Waiting(nn.Module):
    """A logistic model whose every training step takes `step_s` seconds of nobody's CPU."""

    num_heads = 2

    def __init__(self, inputs: Inputs, *, step_s: float = 0.5) -> None:
        super().__init__()
        self.step_s = step_s
        self.linear = nn.Linear(inputs.num_numericals, self.num_heads)

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return logits_BT, once the wait is over."""
        if self.training:
            sleep(self.step_s)
        logits_BT: Tensor = self.linear(numericals_BN)
        return logits_BT


class Observer(threading.Thread):
    """Notes the queue's CPU seconds over time, and once every process's memory.

    Args:
        lanes: how many workers and how many trials' actors there will be.
        memory_after_s: when to look at the memory, counted from when all of them are there.
    """

    def __init__(self, lanes: int, memory_after_s: float) -> None:
        super().__init__(daemon=True)
        self.lanes = lanes
        self.memory_after_s = memory_after_s
        self.queue_cpu_s: list[tuple[float, float]] = []
        self.memory: dict[str, dict[str, int]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        """Look every `SAMPLE_S` until `ended` is set."""
        queue, complete_since = None, None
        while not self.ended.wait(SAMPLE_S):
            if queue is None or complete_since is None:
                kinds = {process: kind_of(process) for process in children()}
                queue = next((one for one, kind in kinds.items() if kind == "queue"), None)
                found = Counter(kinds.values())
                if min(found["trial"], found["worker"]) >= self.lanes:
                    complete_since = time()
            else:
                cpu = queue.cpu_times()
                self.queue_cpu_s.append((time(), cpu.user + cpu.system))
                if not self.memory and time() >= complete_since + self.memory_after_s:
                    self.memory = measure_memory()

    def queue_cpu_at(self, moment: float) -> float:
        """The queue's CPU seconds at the first look after a moment, or at the last."""
        return next((cpu for at, cpu in self.queue_cpu_s if at >= moment), self.queue_cpu_s[-1][1])


def children() -> list[psutil.Process]:
    """List all processes below this one: Ray's own and its workers."""
    return psutil.Process().children(recursive=True)


def kind_of(process: psutil.Process) -> str:
    """Name what a process is for."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return "gone"
    if title.startswith("ray::"):
        return next((kind for start, kind in KINDS.items() if title.startswith(start)), title[:40])
    for name in (
        "raylet/raylet",
        "gcs_server",
        "log_monitor",
        "dashboard",
        "runtime_env",
        "monitor",
    ):
        if name in title:
            return "ray itself"
    return "other"


def measure_memory() -> dict[str, dict[str, int]]:
    """Sum up processes, PSS and USS bytes by kind; the driver is this process."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"processes": 0, "pss": 0, "uss": 0})
    for process in [psutil.Process(), *children()]:
        kind = "driver" if process.pid == os.getpid() else kind_of(process)
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue
        found[kind]["processes"] += 1
        found[kind]["pss"] += memory.pss
        found[kind]["uss"] += memory.uss
    return dict(found)


def make_job(directory: Path, lanes: int, trials: int, trial_s: float) -> Job:
    """One study of waiting trials."""
    return Job.model_validate(
        {
            "name": "scaling",
            "datasets": [str(directory / "data")],
            "models": ["scaling:Waiting"],
            "search": SEARCH | {"trials": trials},
            "training": {"epochs": EVALUATIONS, "batch_size": IMPRESSIONS, "evaluate_every": 1},
            "model": {"step_s": trial_s / EVALUATIONS},
            "resources": {"lanes": lanes, "workers_per_lane": 1, "cpus_per_worker": 1},
            "tracking": {"uri": f"sqlite:///{directory / 'mlflow.db'}"},
            "storage": str(directory / "storage"),
        }
    )


def measure(directory: Path, lanes: int, trials_per_lane: int, trial_s: float) -> Figures:
    """Run a job on that many lanes in this process, with a Ray of its own."""
    trials = lanes * trials_per_lane
    job = make_job(directory, lanes, trials, trial_s)
    observer = Observer(lanes, trials_per_lane * trial_s / 2)
    start_embedded_ray(logging_level=logging.ERROR, shows_output=False, num_cpus=lanes)
    observer.start()
    with Path(os.devnull).open("w") as nowhere:
        run_job(job, "", Console(file=nowhere))
    observer.ended.set()
    observer.join()
    ray.shutdown()
    ends = end_times(job)
    assert len(ends) == trials, f"{len(ends)} of {trials} trials ended"
    first, last, counted = ends[lanes - 1], ends[-1], trials - lanes
    queue_s = observer.queue_cpu_at(last) - observer.queue_cpu_at(first)
    return {
        "lanes": lanes,
        "trials": trials,
        "trials_per_hour": counted / (last - first) * 3600,
        "queue_ms_per_trial": queue_s / counted * 1000,
        "memory": observer.memory,
    }


def end_times(job: Job) -> list[float]:
    """List when the complete trials ended, in order."""
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name(job.name)
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], "tags.`pwiser.kind` = 'trial'", max_results=10_000
    )
    return sorted(run.info.end_time / 1000 for run in runs if run.info.status == "FINISHED")


def measure_apart(data: Path, lanes: int, trials_per_lane: int, trial_s: float) -> Figures:
    """`measure` in a process and a directory of its own; nothing of either stays."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "data").symlink_to(data)
        numbers = [str(lanes), str(trials_per_lane), str(trial_s)]
        return measured_apart(__file__, "--measure", directory, *numbers, shown=f"{lanes} lanes")


def print_throughput(figures: Sequence[Figures]) -> list[float]:
    """Print a row per number of lanes; return each one's share of linear."""
    print(f"{'lanes':>5} {'trials':>7} {'trials/h':>9} {'of linear':>10} {'queue ms/trial':>15}")
    base = figures[0]["trials_per_hour"] / figures[0]["lanes"]
    shares = [found["trials_per_hour"] / found["lanes"] / base for found in figures]
    for found, share in zip(figures, shares, strict=True):
        print(
            f"{found['lanes']:>5} {found['trials']:>7} {found['trials_per_hour']:>9.0f} "
            f"{share:>10.1%} {found['queue_ms_per_trial']:>15.2f}"
        )
    return shares


def print_memory(figures: Figures) -> None:
    """Print what each kind of process takes at one number of lanes."""
    print(f"memory at {figures['lanes']} lanes, MB:")
    print(f"{'kind':<25} {'processes':>9} {'PSS each':>9} {'USS each':>9} {'PSS':>7}")
    for kind, memory in sorted(figures["memory"].items(), key=lambda item: -item[1]["pss"]):
        number = memory["processes"]
        pss, uss = memory["pss"] / 1e6, memory["uss"] / 1e6
        print(f"{kind:<25} {number:>9} {pss / number:>9.0f} {uss / number:>9.0f} {pss:>7.0f}")


def head_bytes(figures: Figures) -> int:
    """Sum up what the head holds."""
    kinds = figures["memory"].items()
    return sum(memory["pss"] for kind, memory in kinds if kind not in NOT_OF_THE_HEAD)


def project_head(smaller: Figures, larger: Figures) -> Figures:
    """Say what one more lane costs the head, and how many lanes fit on it."""
    apart = larger["lanes"] - smaller["lanes"]
    at_larger = head_bytes(larger)
    per_lane = (at_larger - head_bytes(smaller)) / apart
    at_hundred = at_larger + (100 - larger["lanes"]) * per_lane
    fitting = larger["lanes"] + int((HEAD_BYTES - at_larger) / per_lane)
    worker = larger["memory"]["worker"]
    print(
        f"head: {at_larger / 1e9:.2f} GB at {larger['lanes']} lanes, {per_lane / 1e6:.0f} MB per "
        f"lane more, {at_hundred / 1e9:.1f} GB at 100; {fitting} lanes fit on "
        f"{HEAD_BYTES / 1e9:.0f} GB"
    )
    return {
        "head_bytes_per_lane": per_lane,
        "head_bytes_at_100_lanes": at_hundred,
        "lanes_on_16_gb": fitting,
        "worker_bytes": worker["pss"] / worker["processes"],
    }


def main() -> None:
    """Run all numbers of lanes, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=LANES)
    parser.add_argument("--trials-per-lane", type=int, default=TRIALS_PER_LANE)
    parser.add_argument("--trial-s", type=float, default=TRIAL_S)
    parser.add_argument("--measure", nargs=4, metavar=("DIRECTORY", "LANES", "TRIALS", "SECONDS"))
    arguments = parser.parse_args()
    if arguments.measure:
        directory, lanes, trials, seconds = arguments.measure
        print(json.dumps(measure(Path(directory), int(lanes), int(trials), float(seconds))))
        return
    if len(arguments.lanes) < 2 or arguments.trials_per_lane < 2:
        parser.error("needs at least two numbers of lanes, and two trials per lane")
    run = run_header(SEED, "ray", "torch")
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        synthesize(out=str(data), impressions=IMPRESSIONS, preset="demo", seed=SEED)
        figures = [
            measure_apart(data, lanes, arguments.trials_per_lane, arguments.trial_s)
            for lanes in sorted(arguments.lanes)
        ]
    shares = print_throughput(figures)
    print_memory(figures[-1])
    share_ms = figures[-1]["queue_ms_per_trial"]
    saturation = int(arguments.trial_s * 1000 / share_ms)
    print(f"the queue: {share_ms:.2f} ms per trial; {saturation} lanes of {arguments.trial_s:g} s")
    summary = {
        "share_of_linear": shares[-1],
        "queue_ms_per_trial": share_ms,
        "lanes_at_saturation": saturation,
        **project_head(*figures[-2:]),
    }
    print(json.dumps({**summary, **run, "trial_s": arguments.trial_s, "figures": figures}))


if __name__ == "__main__":
    main()
