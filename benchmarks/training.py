"""Impressions per second of our models and of torch-rechub's, side by side.

    pip install -e '.[benchmarks]'
    python benchmarks/training.py                   # on the CPU, torch-rechub beside ours, and
                                                    # small mmoe compiled (training.compile)
    python benchmarks/training.py --clock cpu       # on a busy machine: one thread, its CPU time
    python benchmarks/training.py --device cuda     # on one GPU, batches 2048 and 16384, share of
                                                    # its ceiling, an epoch of AliExpress-US, and
                                                    # mmoe compiled (training.compile)

Same synthetic impressions in AliExpress's form (16 fields, 63 numericals), same batch, same layer
sizes, Adam; each figure from a process of its own, ours and theirs in turns, round after round.
Ours is `trainables.train` as a trial runs it, PWiseR loss included; theirs is `MTLTrainer` over
`DataGenerator` as its documentation has it. Both are timed over an epoch of a model that has been
trained before (ours in an epoch, theirs in two batches), data access included, evaluation not;
`fit` adds the evaluation of 4,096 impressions. Ratios are of the medians; the spread is that of the
rounds. On a GPU our epoch is of 2 million impressions, theirs of 80 thousand. Where the sides
differ, docs/performance.md says how. The last line is one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_header import run_header
from step_profile import Step, ceilings, wall_clock

from datasets import Impressions, open_dataset
from datasets.sources.synthetic import synthesize
from trainables import (
    DeviceImpressions,
    Inputs,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    inputs_of,
)
from trainables.execution import compute_dtype
from trainables.training import train

SEED = 0
BATCH = 2_048
VALID_ROWS = 4_096
US_IMPRESSIONS = 27_392_613
Clock = Callable[[], float]
PEER = {"shared_bottom", "mmoe", "ple"}
SIZES: dict[str, dict[str, Any]] = {
    "paper": {"embedding_dim": 128, "units": (512, 256, 128), "tower_units": (128, 64)},
    "small": {"embedding_dim": 8, "units": (32, 16), "tower_units": (16,)},
}
SETTINGS: dict[str, list[str]] = {
    "shared_bottom": ["bottom_units"],
    "mmoe": ["expert_units"],
    "ple": ["expert_units"],
}
CASES = [
    ("paper", "mmoe"),
    ("paper", "shared_bottom"),
    ("paper", "ple"),
    ("paper", "dnn"),
    ("paper", "masknet"),
    ("small", "mmoe"),
]
ROWS = {"paper": 10 * BATCH, "small": 120 * BATCH}
GPU_ROWS = {"ours": 1_000 * BATCH, "peer": 40 * BATCH}
WARM_UP_ROWS = 2 * BATCH


def our_configuration(
    size: str, model: str, precision: str, batch: int, **training_settings: float
) -> TrialConfiguration:
    """A trial at the given sizes; gates are linear, as the peer's are."""
    sizes = SIZES[size]
    settings: dict[str, Any] = {}
    if model in SETTINGS:
        settings = dict.fromkeys(SETTINGS[model], sizes["units"])
        settings |= {"embedding_dim": sizes["embedding_dim"], "tower_units": sizes["tower_units"]}
    if model in {"mmoe", "ple"}:
        settings["gate_units"] = ()
    training = TrainingSettings.model_validate(
        {"epochs": 2, "batch_size": batch, "precision": precision} | training_settings
    )
    return TrialConfiguration.create(model, settings, training=training)


def rows_of(impressions: Impressions, num_rows: int) -> Impressions:
    """The first rows, and all again until there are enough."""
    return impressions.take(np.arange(num_rows) % impressions.num_impressions)


def measure_ours(
    configuration: TrialConfiguration,
    inputs: Inputs,
    splits: dict[str, Impressions],
    device: torch.device,
    clock: Clock,
) -> dict[str, float]:
    """Seconds of a trial's last epoch, and with its evaluation."""
    workers = Workers(device=device)
    on_device = {
        name: DeviceImpressions.from_impressions(splits[name], device)
        for name in ("train", "valid")
    }
    marks: list[float] = []  # after every step, and at every evaluation's end
    trained_s, evaluated_s = [0.0], [0.0]

    def mark() -> bool:
        marks.append(clock())
        return False

    for evaluation, _ in train(
        configuration, inputs, on_device["train"], on_device["valid"], workers, mark
    ):
        marks.append(clock())
        # By the trainer's own clock, which waits for a GPU; it has no clock of CPU time.
        trained_s.append(evaluation.training_s)
        evaluated_s.append(evaluation.evaluation_s)
    epoch_s, evaluation_s = trained_s[-1] - trained_s[-2], evaluated_s[-1] - evaluated_s[-2]
    if clock is time.process_time:
        *steps, end = marks[-len(marks) // configuration.training.epochs - 1 :]
        epoch_s, evaluation_s = steps[-1] - steps[0], end - steps[-1]
    return {"epoch_s": epoch_s, "fit_s": epoch_s + evaluation_s}


def peer_columns(split: Impressions) -> tuple[dict[str, Any], Any]:
    """A split as torch-rechub takes it: a dictionary of columns, and the labels."""
    columns = {f"c{i}": split.ids_NF[:, i].astype(np.int64) for i in range(split.ids_NF.shape[1])}
    columns |= {f"n{i}": split.numericals_ND[:, i] for i in range(split.numericals_ND.shape[1])}
    return columns, np.stack([split.clicks_N, split.conversions_N], axis=1)


def peer_model(size: str, model: str, inputs: Inputs) -> torch.nn.Module:
    """torch-rechub's model of that name, at the same sizes."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, PLE, SharedBottom

    sizes = SIZES[size]
    features = [
        SparseFeature(f"c{i}", vocab_size=count, embed_dim=sizes["embedding_dim"])
        for i, count in enumerate(inputs.vocabulary_sizes)
    ]
    features += [DenseFeature(f"n{i}") for i in range(inputs.num_numericals)]
    tasks = ["classification", "classification"]
    hidden = {"dims": list(sizes["units"])}
    towers = [{"dims": list(sizes["tower_units"])} for _ in tasks]
    built: torch.nn.Module
    if model == "mmoe":
        built = MMOE(features, tasks, 8, hidden, towers)
    elif model == "ple":
        built = PLE(features, tasks, 1, 1, 8, hidden, towers)
    else:
        built = SharedBottom(features, tasks, hidden, towers)
    return built


def measure_peer(
    model: torch.nn.Module,
    splits: dict[str, Impressions],
    device: torch.device,
    batch: int,
    clock: Clock,
) -> dict[str, float]:
    """Seconds of an epoch, and with its evaluation."""
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    valid = peer_columns(splits["valid"])
    loaders = {}
    for name in ("warm_up", "train"):
        generator = DataGenerator(*peer_columns(splits[name]))
        loaders[name] = generator.generate_dataloader(
            x_val=valid[0], y_val=valid[1], x_test=valid[0], y_test=valid[1], batch_size=batch
        )
    trainer = MTLTrainer(
        model,
        task_types=["classification", "classification"],
        optimizer_params={"lr": 1e-3, "weight_decay": 1e-6},
        n_epoch=1,
        device=str(device),
    )
    trainer.train_one_epoch(loaders["warm_up"][0])
    started = clock()
    trainer.train_one_epoch(loaders["train"][0])
    epoch_s = clock() - started
    trainer.evaluate(trainer.model, loaders["train"][1])
    return {"epoch_s": epoch_s, "fit_s": clock() - started}


def measure(side: str, size: str, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One side's figures, in this process."""
    torch.manual_seed(SEED)
    clock = time.perf_counter
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    device = torch.device(arguments.device)
    dataset = open_dataset(arguments.data)
    inputs = inputs_of(dataset)
    gpu_rows = GPU_ROWS["peer" if side == "peer" else "ours"]
    num_rows = arguments.rows or (ROWS[size] if arguments.device == "cpu" else gpu_rows)
    loaded = {name: dataset.load(name) for name in ("train", "valid")}
    splits = {
        "warm_up": rows_of(loaded["train"], WARM_UP_ROWS),
        "train": rows_of(loaded["train"], num_rows),
        "valid": rows_of(loaded["valid"], VALID_ROWS),
    }
    if side == "peer":
        figures = measure_peer(
            peer_model(size, model, inputs), splits, device, arguments.batch, clock
        )
    else:
        precision = "float32" if side == "ours_float32" else "auto"
        others = {"epochs": arguments.epochs, "compile": side == "ours_compiled"}
        configuration = our_configuration(size, model, precision, arguments.batch, **others)
        figures = measure_ours(configuration, inputs, splits, device, clock)
    return {name: num_rows / seconds for name, seconds in figures.items()}


def measure_apart(side: str, size: str, model: str, *options: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", side, size, model, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def compare(
    size: str, model: str, rounds: int, sides: Sequence[str], *options: str
) -> dict[str, float]:
    """Print and return one case's figures, all sides in turns."""
    rates: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            rates[side].append(measure_apart(side, size, model, *options))
    row: dict[str, float] = {}
    text = f"{size:>6} {model:<14}"
    for side in sides:
        values = [rate["epoch_s"] for rate in rates[side]]
        row[side] = statistics.median(values)
        row[f"{side}_min"], row[f"{side}_max"] = min(values), max(values)
        text += f" {side} {row[side]:>9,.0f}/s ({min(values):,.0f}-{max(values):,.0f})"
    if "peer" in sides:
        ratios = [
            ours["epoch_s"] / peer["epoch_s"]
            for ours, peer in zip(rates["ours"], rates["peer"], strict=True)
        ]
        row["ratio"] = row["ours"] / row["peer"]
        row["ratio_min"], row["ratio_max"] = min(ratios), max(ratios)
        fits = [statistics.median(rate["fit_s"] for rate in rates[s]) for s in ("ours", "peer")]
        row["fit_ratio"] = fits[0] / fits[1]
        text += f"  ratio {row['ratio']:.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
        for side in ("float32", "compiled"):
            if f"ours_{side}" in sides:
                row[f"ratio_{side}"] = row[f"ours_{side}"] / row["peer"]
                text += f", {side} {row[f'ratio_{side}']:.1f}"
        text += f", with evaluation {row['fit_ratio']:.1f}"
    print(text, flush=True)
    return row


def on_gpu(device: torch.device, data: str, rounds: int) -> dict[str, Any]:
    """Print and return our five models' figures at batch 2048 and 16384, and MMoE's epoch."""
    top = ceilings(device, wall_clock(device))
    ceiling = top["bfloat16" if compute_dtype("auto", device) == torch.bfloat16 else "float32"]
    print(f"ceiling of matrix products: {ceiling:,.0f} GFLOP/s", flush=True)
    figures: dict[str, Any] = {"ceilings": top}
    for batch in (BATCH, 8 * BATCH):
        print(f"batch {batch:,}", flush=True)
        figures[str(batch)] = {
            model: on_gpu_at(device, data, rounds, model, batch, ceiling)
            for size, model in CASES
            if size == "paper"
        }
        if batch == BATCH:  # not at the end: the time on a card may be short
            figures["us_epoch_s"] = us_epoch(device, data)
    return figures


def us_epoch(device: torch.device, data: str) -> float:
    """Print and return the seconds of MMoE's first epoch of AliExpress-US's size."""
    options = ("--device", device.type, "--data", data, "--rows", str(US_IMPRESSIONS))
    rate = measure_apart("ours", "paper", "mmoe", *options, "--epochs", "1")
    seconds = US_IMPRESSIONS / rate["epoch_s"]
    print(
        f"the first epoch of {US_IMPRESSIONS:,} impressions at batch {BATCH:,}, mmoe: "
        f"{seconds:.1f} s",
        flush=True,
    )
    return seconds


def on_gpu_at(
    device: torch.device, data: str, rounds: int, model: str, batch: int, ceiling: float
) -> dict[str, float]:
    """Print and return one model's figures; at batch 2048 the peer's too, and MMoE compiled."""
    sides = ["ours"]
    if batch == BATCH:
        sides += ["ours_compiled"] if model == "mmoe" else []
        sides += ["peer"] if model in PEER else []
    options = ("--device", device.type, "--data", data, "--batch", str(batch))
    row = compare("paper", model, rounds, sides, *options)
    row["gflop"] = Step(our_configuration("paper", model, "auto", batch), device, batch).gflop()
    row["share_of_gemm_ceiling"] = row["gflop"] * row["ours"] / batch / ceiling
    print(
        f"{'':>6} {row['gflop']:,.0f} GFLOP a step, {row['share_of_gemm_ceiling']:.1%} of the "
        "ceiling",
        flush=True,
    )
    return row


def main() -> None:
    """Run everything, or one measurement in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "SIZE", "MODEL"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread, its CPU time"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--epochs", type=int, default=2, help="of our side; the last one is timed")
    parser.add_argument("--rows", type=int, help="impressions of an epoch, if not the usual ones")
    parser.add_argument("--data", help="a prepared synthetic dataset; made where left out")
    parser.add_argument("--only", nargs="*", metavar="SIZE/MODEL", help="cases; all if left out")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if arguments.clock == "cpu" and arguments.epochs < 2:
        parser.error("--clock cpu needs --epochs of at least 2")
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments)))
        return
    header = run_header(SEED, "torch", clock=arguments.clock)
    with tempfile.TemporaryDirectory() as directory:
        data = arguments.data or str(Path(directory) / "us")
        if not arguments.data:
            synthesize(out=data, impressions=100_000, preset="us", seed=SEED)
        if arguments.device == "cuda":
            header["gpu_name"] = torch.cuda.get_device_name()
            figures = on_gpu(torch.device("cuda"), data, arguments.rounds)
            print(json.dumps({"gpu": figures, **header}))
            return
        print("GPU figures were not run: --device cuda runs them")
        figures = {"gpu": "not run", **header, "paper": {}, "small": {}}
        for size, model in CASES:
            if not arguments.only or f"{size}/{model}" in arguments.only:
                options = ("--data", data, "--batch", str(arguments.batch))
                options += ("--clock", arguments.clock)
                sides = ["ours", "ours_float32", *(["ours_compiled"] if size == "small" else [])]
                sides += ["peer"] if model in PEER else []
                figures[size][model] = compare(size, model, arguments.rounds, sides, *options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
