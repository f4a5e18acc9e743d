"""What a whole search costs beyond training, and whether it stays so trial after trial.

    python benchmarks/trials_per_hour.py
    python benchmarks/trials_per_hour.py --only paper linearity     # some of its parts

Every search is a whole `run_job` (Ray, Tune, lanes, a SQLite MLflow) in a process of its own. The
cores are shared out over the lanes. The parts:

- ``paper``: MMoE at the paper's sizes, on 1 and on 2 lanes.
- ``short``: a small MMoE whose trials train for about 2 seconds, on 1 and on 2 lanes.
- ``linearity``: searches of 10, 30 and 100 tiny trials: their time, less the lanes' start.
- ``steadiness``: one search of 200 tiny trials of 16 configurations on one lane: the memory of
  every process in the first against the last quarter, and whether equal configurations had equal
  metrics to the last bit, whatever was trained before them.

*Overhead* is lane time that is neither training nor evaluation, over lane time; loading the dataset
is in it. *Busy* is training and evaluation over lanes times wall time, from the first trial's
beginning to the last one's end. The *gap* between two trials of a lane is all that lies between the
end of one's last evaluation and the next one's first step, and the writing of the next one's
checkpoints as well, which its lane cannot tell apart: an upper bound. Trials per hour are those of
the wall time from the first trial's beginning; *with start* from the start of the job. The last
line is one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from apart import measured_apart
from mlflow.tracking import MlflowClient
from process_memory import Growth, ProcessMemory
from rich.console import Console
from run_header import run_header

from datasets import open_dataset, synthesize
from trainables import (
    DeviceImpressions,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    inputs_of,
)
from trainables.training import train
from tuner.cluster import connected
from tuner.job import Job
from tuner.tuning import run_job

SEED = 0
TRIAL_S = 2.0
LANES = (1, 2)
LINEARITY = (10, 30, 100)
STEADY_TRIALS = 200
PARTS = ("paper", "short", "linearity", "steadiness")
IMPRESSIONS = {"paper": 80_000, "short": 50_000, "tiny": 10_000}
TRIALS = {"paper": 8, "short": 30}
FLAT_SHARE, FLAT_MB = 0.05, 5.0
"""A process is flat if it grows by no more than this share, or by no more than so many MB."""

SMALL_MODEL: dict[str, Any] = {
    "embedding_dim": 8,
    "expert_units": [32, 16],
    "gate_units": [],
    "tower_units": [16],
}
Figures = dict[str, Any]


def make_job(
    directory: Path,
    size: str,
    *,
    lanes: int,
    trials: int,
    epochs: int = 1,
    space: dict[str, Any] | None = None,
) -> Job:
    """A job over the dataset of that size; nothing is pruned."""
    search = {"trials": trials, "replicates": 0, "sampler": "random"}
    search |= {"pruner": "none", "seed": SEED}
    return Job.model_validate(
        {
            "name": "trials-per-hour",
            "datasets": [str(directory / size)],
            "search": search | ({"space": space} if space else {}),
            "training": {"epochs": epochs},
            "model": {} if size == "paper" else SMALL_MODEL,
            "resources": {"lanes": lanes, "cpus_per_worker": cores() // lanes},
            "tracking": {"uri": f"sqlite:///{directory / 'mlflow.db'}"},
            "storage": str(directory / "storage"),
        }
    )


def cores() -> int:
    """Cores of the machine, at least one per lane."""
    return max(os.cpu_count() or 1, *LANES)


def run_search(job: Job) -> Figures:
    """Run a job on a Ray of its own; return its trials and the times of its process."""
    with ProcessMemory() as memory, connected():
        started = time.time()
        with Path(os.devnull).open("w") as nowhere:
            run_job(job, "", Console(file=nowhere))
        ended = time.time()
        trials = read_trials(job)
    quarter = len(trials) // 4
    growth: list[Growth] = []
    if quarter > 1:
        ends = [trial["end"] for trial in trials]
        growth = memory.growth((ends[0], ends[quarter]), (ends[-quarter], ends[-1]))
    return {
        "started": started,
        "ended": ended,
        "trials": trials,
        "memory": [asdict(row) for row in growth],
    }


def read_trials(job: Job) -> list[Figures]:
    """What MLflow knows of every trial, in the order of their ends."""
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name(job.name)
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], "tags.`pwiser.kind` = 'trial'", order_by=["end_time"]
    )
    assert [run.info.status for run in runs] == ["FINISHED"] * job.search.trials
    return [
        {
            "end": run.info.end_time / 1000,
            "params": run.data.tags["pwiser.params"],
            "baseline": run.data.tags["pwiser.baseline"] == "true",
            **{
                name: run.data.metrics[f"time/{name}_s"]
                for name in ("setup", "training", "evaluation", "overhead")
            },
            "metrics": {
                name: value
                for name, value in run.data.metrics.items()
                if name.startswith(("valid/", "train/"))
            },
        }
        for run in runs
    ]


def figures_of(search: Figures, lanes: int) -> Figures:
    """Reckon a search's shares, gaps and trials per hour."""
    trials = search["trials"]
    worked = [trial["training"] + trial["evaluation"] for trial in trials]
    unworked = [trial["setup"] + trial["overhead"] for trial in trials]
    begin = min(
        trial["end"] - work - rest
        for trial, work, rest in zip(trials, worked, unworked, strict=True)
    )
    wall_s = trials[-1]["end"] - begin
    # A lane's first trial loads the dataset, and no trial is before it.
    first = sorted(range(len(trials)), key=lambda i: trials[i]["setup"])[-lanes:]
    gaps = [rest for i, rest in enumerate(unworked) if i not in first]
    return {
        "lanes": lanes,
        "trials": len(trials),
        "trial_s": statistics.mean(worked),
        "trials_per_hour": 3600 * len(trials) / wall_s,
        "trials_per_hour_with_start": 3600 * len(trials) / (search["ended"] - search["started"]),
        "busy_share": sum(worked) / (lanes * wall_s),
        "overhead_share": sum(unworked) / (sum(worked) + sum(unworked)),
        "gap_p50_s": float(np.percentile(gaps, 50)),
        "gap_p95_s": float(np.percentile(gaps, 95)),
        "start_s": begin - search["started"],
        "wall_s": wall_s,
    }


def short_epochs(directory: Path, threads: int) -> int:
    """Epochs that the small model trains in about `TRIAL_S` on so many threads."""
    torch.set_num_threads(threads)
    dataset = open_dataset(str(directory / "short"))
    workers = Workers(device=torch.device("cpu"))
    splits = [
        DeviceImpressions.from_impressions(dataset.load(name), workers.device)
        for name in ("train", "valid")
    ]
    inputs = inputs_of(dataset)
    configuration = TrialConfiguration.create(
        "mmoe", SMALL_MODEL, training=TrainingSettings(epochs=2)
    )
    seconds = [
        evaluation.training_s + evaluation.evaluation_s
        for evaluation, _ in train(configuration, inputs, *splits, workers)
    ]
    return max(round(TRIAL_S / (seconds[1] - seconds[0])), 1)


def measure_on_lanes(size: str, data: Path, trials: int) -> Figures:
    """Search on 1 and on 2 lanes; print and return the figures."""
    print(f"\n{size}: {trials} trials of {IMPRESSIONS[size]:,} impressions")
    rows = {}
    for lanes in LANES:
        epochs = short_epochs(data, cores() // lanes) if size == "short" else 1
        arguments = {"size": size, "lanes": lanes, "trials": trials, "epochs": epochs}
        row = rows[str(lanes)] = figures_of(search_apart(data, arguments), lanes)
        print(
            f"  {lanes} lane(s): {row['trials_per_hour']:,.0f} trials/hour "
            f"({row['trials_per_hour_with_start']:,.0f} with start), {row['trial_s']:.2f} s each, "
            f"busy {row['busy_share']:.1%}, overhead {row['overhead_share']:.1%}, "
            f"gap p50 {row['gap_p50_s']:.2f} p95 {row['gap_p95_s']:.2f} s, "
            f"start {row['start_s']:.1f} s",
            flush=True,
        )
    return rows


def measure_linearity(data: Path) -> Figures:
    """Search with ever more trials on one lane; print and return seconds and seconds per trial."""
    print("\nlinearity: tiny trials on one lane")
    rows: Figures = {}
    for trials in LINEARITY:
        search = search_apart(data, {"size": "tiny", "lanes": 1, "trials": trials})
        row = figures_of(search, 1)
        rows[str(trials)] = {name: row[name] for name in ("wall_s", "trial_s", "gap_p50_s")}
        print(
            f"  {trials:>3} trials: {row['wall_s']:.1f} s, {row['wall_s'] / trials:.3f} s each, "
            f"of them training and evaluation {row['trial_s']:.3f}, gap p50 {row['gap_p50_s']:.3f}",
            flush=True,
        )
    few, many = (rows[str(trials)]["wall_s"] / trials for trials in (LINEARITY[0], LINEARITY[-1]))
    rows["ratio_per_trial"] = many / few
    print(f"  a trial of {LINEARITY[-1]} takes {many / few:.2f} times that of {LINEARITY[0]}")
    return rows


def measure_steadiness(data: Path, trials: int) -> Figures:
    """Search long; print and return what grew, and the configurations whose metrics differ."""
    space = {
        "loss.alpha": {"values": [0.1, 0.5]},
        "loss.m1": {"values": [0.2, 0.4]},
        "model.num_experts": {"values": [2, 8]},
        "training.batch_size": {"values": [512, 2048]},
    }
    search = search_apart(data, {"size": "tiny", "lanes": 1, "trials": trials, "space": space})
    print(f"\nsteadiness: {trials} trials on one lane; MB of its own, first and last quarter")
    grown = []
    for row in search["memory"]:
        growth = row["late_mb"] - row["early_mb"]
        flat = growth <= max(FLAT_MB, FLAT_SHARE * row["early_mb"])
        if not flat:
            grown.append(row["process"])
        print(
            f"  {row['process']:<24} {row['early_mb']:>8.1f} {row['late_mb']:>8.1f} "
            f"{growth:>+7.1f}{'' if flat else '  GROWN'}"
        )
    metrics: dict[str, list[dict[str, float]]] = defaultdict(list)
    for trial in search["trials"]:
        if not trial["baseline"]:  # it has alpha 0 beside its params
            metrics[trial["params"]].append(trial["metrics"])
    differing = [params for params, found in metrics.items() if any(m != found[0] for m in found)]
    repeated = sum(len(found) for found in metrics.values() if len(found) > 1)
    print(
        f"  {repeated} trials of {len(metrics)} configurations: "
        f"{len(differing)} configurations whose metrics differ from trial to trial"
    )
    gaps = figures_of(search, 1)
    return {
        "trials": trials,
        "memory": search["memory"],
        "grown": grown,
        "repeated_trials": repeated,
        "configurations": len(metrics),
        "differing": differing,
        "gap_p95_s": gaps["gap_p95_s"],
    }


def search_apart(data: Path, arguments: Figures) -> Figures:
    """`run_search` in a process and a directory of its own; nothing of either stays."""
    with tempfile.TemporaryDirectory() as directory:
        for size in IMPRESSIONS:
            (Path(directory) / size).symlink_to(data / size)
        return measured_apart(
            __file__, "--measure", directory, json.dumps(arguments), shown=str(arguments)
        )


def main() -> None:
    """Measure every part, or run one search in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--trials", type=int, help="of paper, short and steadiness each")
    parser.add_argument("--measure", nargs=2, metavar=("DIRECTORY", "ARGUMENTS"))
    arguments = parser.parse_args()
    if arguments.measure:
        directory, options = arguments.measure
        print(json.dumps(run_search(make_job(Path(directory), **json.loads(options)))))
        return
    if arguments.trials is not None and arguments.trials < max(LANES) + 1:
        parser.error(f"--trials: at least {max(LANES) + 1}, got {arguments.trials}")
    header = run_header(SEED, "ray", "torch", "mlflow")
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory)
        for size, impressions in IMPRESSIONS.items():
            synthesize(out=str(data / size), impressions=impressions, preset="demo", seed=SEED)
        for size, trials in TRIALS.items():
            if size in arguments.only:
                figures[size] = measure_on_lanes(size, data, arguments.trials or trials)
        if "linearity" in arguments.only:
            figures["linearity"] = measure_linearity(data)
        if "steadiness" in arguments.only:
            trials = arguments.trials or STEADY_TRIALS
            figures["steadiness"] = measure_steadiness(data, trials)
    print(json.dumps({**figures, **header}))


if __name__ == "__main__":
    main()
