"""Seconds per trial beyond training: lanes against a Tune trial that starts a TorchTrainer itself.

    python benchmarks/trial_overhead.py

Both sides train the same tiny trials one after another on the same dataset with the same workers,
and save a checkpoint of each. The documented pattern is that of Ray's guide "Hyperparameter Tuning
with Ray Tune" for Ray Train: a Tune function that runs a TorchTrainer with TuneReportCallback (its
driver takes 0.01 CPU, so that it cannot starve its own worker). The lanes are a whole `run_job`,
which also writes MLflow, while the documented side writes no record of its own. Every measurement
has a process and a Ray of its own, in turns.

What counts: the wall time of a search, from its start on a Ray that is up to its return, less the
seconds that `trainables.train` spent in steps and evaluations, divided by the trials. So all
else is in it: for the lanes MLflow's store, the lanes' start and end and the winner's test
evaluation; for both schedulers, queues, process groups, loading the dataset, checkpoints. The start
of the lanes is spread over the 40 trials that a study has by default. `steady` is the same without
start and end: from the end of the first trial to the end of the last. `start_up_s` is what passed
before the first trial ended, less its training; `ray_s`, Ray's own start, is the same thing on both
sides and in no other figure. Medians over the rounds. The last line is one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from apart import measured_apart
from mlflow.tracking import MlflowClient
from ray import train as ray_train
from ray import tune
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console
from run_header import run_header

from datasets import open_dataset, synthesize
from trainables import DeviceImpressions, TrialConfiguration, Workers, inputs_of, train
from trainables.checkpoint import save_checkpoint
from tuner.cluster import Lanes, alive_nodes, connected, plan_lanes
from tuner.job import Job
from tuner.tuning import run_job

SEED = 0
SEARCH = {"replicates": 0, "sampler": "random", "pruner": "none", "seed": SEED}
IMPRESSIONS = 20_000
ROUNDS = 3
LANE_TRIALS = 40
DOCUMENTED_TRIALS = 4
DRIVER_CPUS = 0.01
JOB_NAME = "trial-overhead"
MODEL = "mmoe"
SIDES = ("lanes", "documented")

Figures = dict[str, float]


def make_job(directory: Path, trials: int) -> Job:
    """The job that the lanes run, and from which the other side takes its trials."""
    return Job.model_validate(
        {
            "name": JOB_NAME,
            "datasets": [str(directory / "data")],
            "models": [MODEL],
            "search": SEARCH | {"trials": trials},
            "training": {"epochs": 1},
            "model": {
                "embedding_dim": 8,
                "num_experts": 2,
                "expert_units": [32],
                "gate_units": [],
                "tower_units": [16],
            },
            "resources": {"lanes": 1, "workers_per_lane": 1, "cpus_per_worker": 1},
            "tracking": {"uri": f"sqlite:///{directory / 'mlflow.db'}"},
            "storage": str(directory / "storage"),
        }
    )


def measure_lanes(job: Job, _lanes: Lanes) -> tuple[list[float], list[float]]:
    """Run the job; return when each trial ended and how long each trained, in order."""
    with Path(os.devnull).open("w") as nowhere:
        run_job(job, "", Console(file=nowhere))
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name(job.name)
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], "tags.`pwiser.kind` = 'trial'", order_by=["end_time"]
    )
    assert [run.info.status for run in runs] == ["FINISHED"] * job.search.trials
    ends = [run.info.end_time / 1000 for run in runs]
    metrics = [run.data.metrics for run in runs]
    return ends, [found["time/training_s"] + found["time/evaluation_s"] for found in metrics]


class EndTimes(tune.Callback):  # type: ignore[misc]
    """Notes when the driver hears that a trial is complete."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_trial_complete(self, **_event: Any) -> None:  # noqa: ANN401 - Tune's signature
        """Note the time."""
        self.ends.append(time.time())


def measure_documented(job: Job, lanes: Lanes) -> tuple[list[float], list[float]]:
    """Run as many trials in the documented way; return the same as `measure_lanes`."""
    ends = EndTimes()
    base, storage = job.configuration(MODEL), job.storage
    resources = {"CPU": float(lanes.cpus_per_worker), "GPU": lanes.gpus_per_worker}

    def train_driver(config: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "dataset": job.datasets[0],
                "threads": lanes.cpus_per_worker,
                "configuration": base.replace(config).model_dump(mode="json"),
            },
            scaling_config=ray_train.ScalingConfig(
                num_workers=lanes.workers_per_lane,
                use_gpu=bool(lanes.gpus_per_worker),
                resources_per_worker={name: amount for name, amount in resources.items() if amount},
            ),
            run_config=ray_train.RunConfig(
                name=f"train-{tune.get_context().get_trial_id()}",
                storage_path=storage,
                callbacks=[TuneReportCallback()],
            ),
        )
        trainer.fit()

    results = tune.Tuner(
        tune.with_resources(train_driver, {"CPU": DRIVER_CPUS}),
        param_space={
            "loss.alpha": tune.loguniform(0.001, 1.0),
            "loss.m1": tune.uniform(0.0, 0.5),
            "loss.m2": tune.uniform(0.0, 0.5),
        },
        tune_config=tune.TuneConfig(num_samples=job.search.trials, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            name="documented", storage_path=storage, callbacks=[ends], verbose=0
        ),
    ).fit()
    assert results.num_errors == 0, results.errors
    return ends.ends, [result.metrics["trained_s"] for result in results]


def train_worker(config: dict[str, Any]) -> None:
    """Train one trial of the documented side: the same calls as in a lane."""
    torch.set_num_threads(config["threads"])
    configuration = TrialConfiguration.model_validate(config["configuration"])
    device = get_device()
    dataset = open_dataset(config["dataset"])
    train_split, valid_split = (
        DeviceImpressions.from_impressions(dataset.load(split), device)
        for split in ("train", "valid")
    )
    inputs = inputs_of(dataset)
    workers = Workers(device=device)
    for evaluation, model in train(configuration, inputs, train_split, valid_split, workers):
        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(Path(directory), configuration, inputs, model)
            ray_train.report(
                {
                    **evaluation.metrics,
                    "trained_s": evaluation.training_s + evaluation.evaluation_s,
                },
                checkpoint=ray_train.Checkpoint.from_directory(directory),
            )


def measure(side: str, directory: Path, trials: int) -> Figures:
    """Measure one side in this process, with a Ray of its own."""
    job = make_job(directory, trials)
    run = {"lanes": measure_lanes, "documented": measure_documented}[side]
    before = time.time()
    with connected():
        started = time.time()
        lanes = plan_lanes(job.resources, alive_nodes())
        ends, trained = run(job, lanes)
        returned = time.time()
    between = [
        end - end_before - trained_s
        for (end_before, end), trained_s in zip(pairwise(ends), trained[1:], strict=True)
    ]
    return {
        "s_per_trial": (returned - started - sum(trained)) / trials,
        "steady_s_per_trial": statistics.mean(between),
        "trained_s_per_trial": statistics.mean(trained),
        "ray_s": started - before,
        "start_up_s": ends[0] - started - trained[0],
    }


def measure_apart(side: str, data: Path, trials: int) -> Figures:
    """`measure` in a process and a directory of its own; nothing of either stays."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "data").symlink_to(data)
        return measured_apart(__file__, "--measure", side, directory, str(trials), shown=side)


def measure_rounds(rounds: int, trials: Mapping[str, int]) -> dict[str, list[Figures]]:
    """Measure both sides in turns, and print every round."""
    figures: dict[str, list[Figures]] = {side: [] for side in SIDES}
    print(
        f"{'round':>5}  {'side':<10} {'trials':>6} {'s/trial':>9} {'steady s/trial':>15} "
        f"{'start-up s':>11} {'Ray s':>7} {'training s/trial':>17}"
    )
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        synthesize(out=str(data), impressions=IMPRESSIONS, preset="demo", seed=SEED)
        for round_ in range(1, rounds + 1):
            for side in SIDES:
                found = measure_apart(side, data, trials[side])
                figures[side].append(found)
                print(
                    f"{round_:>5}  {side:<10} {trials[side]:>6} {found['s_per_trial']:>9.2f} "
                    f"{found['steady_s_per_trial']:>15.2f} {found['start_up_s']:>11.1f} "
                    f"{found['ray_s']:>7.1f} {found['trained_s_per_trial']:>17.2f}",
                    flush=True,
                )
    return figures


def summarize(figures: Mapping[str, list[Figures]]) -> dict[str, Any]:
    """Take medians over the rounds, and print them with their spread."""
    summary: dict[str, Any] = {}
    for side, name in zip(SIDES, ("lane", "documented"), strict=True):
        for key in ("s_per_trial", "steady_s_per_trial", "start_up_s", "ray_s"):
            values = [found[key] for found in figures[side]]
            summary[f"{name}_{key}"] = statistics.median(values)
            summary[f"{name}_{key}_range"] = [min(values), max(values)]
    for words, prefix in (("beyond training", ""), ("without start and end", "steady_")):
        lane, documented = (f"{name}_{prefix}s_per_trial" for name in ("lane", "documented"))
        summary[f"{prefix}ratio"] = summary[documented] / summary[lane]
        print(
            f"seconds per trial {words}: lanes {_spread(summary, lane)}, "
            f"documented {_spread(summary, documented)}, {summary[f'{prefix}ratio']:.1f} times"
        )
    return summary


def _spread(summary: Mapping[str, Any], key: str) -> str:
    low, high = summary[f"{key}_range"]
    return f"{summary[key]:.2f} s ({low:.2f}-{high:.2f})"


def main() -> None:
    """Run all rounds, or one measurement in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lane-trials", type=int, default=LANE_TRIALS)
    parser.add_argument("--documented-trials", type=int, default=DOCUMENTED_TRIALS)
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "DIRECTORY", "TRIALS"))
    arguments = parser.parse_args()
    if arguments.measure:
        side, directory, count = arguments.measure
        print(json.dumps(measure(side, Path(directory), int(count))))
        return
    trials = {"lanes": arguments.lane_trials, "documented": arguments.documented_trials}
    if min(trials.values()) < 2 or arguments.rounds < 1:
        parser.error("needs at least one round and two trials of each side")
    run = run_header(SEED, "ray", "torch", impressions=IMPRESSIONS, model=MODEL)
    summary = summarize(measure_rounds(arguments.rounds, trials))
    print(json.dumps({**summary, **run, "trials": trials, "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
