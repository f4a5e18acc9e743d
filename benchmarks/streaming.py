"""Training from a stream beside training from memory: speed, memory held, and the metrics.

    python benchmarks/streaming.py

A synthetic dataset in AliExpress's form is made, several times larger than what the stream may
hold. Each figure has a process of its own, the two kinds in turns: it opens the dataset as a lane
does, trains one epoch and evaluates valid. Memory is the most anonymous memory of the process (peak
resident set, mapped files left out) less what it held before it opened the dataset; in memory the
rows are not counted there, since lanes map them, so their size is printed beside it. The last line
is one line of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from datasets import Dataset, open_dataset, synthesize
from trainables.batches import WINDOWS_HELD, DeviceImpressions, Rows, StreamedRows, inputs_of
from trainables.configuration import TrialConfiguration
from trainables.training import train
from trainables.workers import Workers

CPU = torch.device("cpu")
SAMPLE_S = 0.05
MIB = 1024**2

SIZES: dict[str, dict[str, Any]] = {
    "small": {"embedding_dim": 8, "num_experts": 8, "expert_units": [32, 16]},
    "paper": {"embedding_dim": 128, "num_experts": 8, "expert_units": [512, 256, 128]},
}


def anonymous_bytes() -> int:
    """Give the memory of this process that no file backs."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup: no such line")


class Peak:
    """Samples the anonymous memory of this process until it is closed."""

    def __init__(self) -> None:
        self.before = self.highest = anonymous_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.highest = max(self.highest, anonymous_bytes())

    def close(self) -> int:
        """End, and give the most that was held beyond the beginning."""
        self._over.set()
        self._thread.join()
        return self.highest - self.before


def rows_of(dataset: Dataset, split: str, mode: str, buffer_bytes: int) -> Rows:
    """Open a split as a lane does."""
    if mode == "memory":
        return DeviceImpressions.from_impressions(dataset.load_shared(split), CPU)
    window_rows = buffer_bytes // (WINDOWS_HELD * dataset.row_bytes)
    return StreamedRows(dataset.stream(split), CPU, window_rows, labelled=split != "train")


def measure(uri: str, mode: str, size: str, buffer_bytes: int) -> dict[str, Any]:
    """Train one epoch, and print what it took."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dataset = open_dataset(uri)
    inputs = inputs_of(dataset)
    configuration = TrialConfiguration.create("mmoe", SIZES[size]).replace({"training.epochs": 1})
    peak = Peak()
    split, valid = (rows_of(dataset, name, mode, buffer_bytes) for name in ("train", "valid"))
    started = time.perf_counter()
    ((evaluation, _),) = train(configuration, inputs, split, valid, Workers(device=CPU))
    return {
        "impressions_per_s": round(len(split) / evaluation.training_s),
        "evaluated_per_s": round(len(valid) / evaluation.evaluation_s),
        "wall_s": round(time.perf_counter() - started, 1),
        "held_mib": round(peak.close() / MIB),
        "ctr_auc": evaluation.metrics["ctr_auc"],
        "ctcvr_auc": evaluation.metrics["ctcvr_auc"],
    }


def main() -> None:
    """Make the dataset, measure in turns, print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--impressions", type=int, default=3_000_000)
    parser.add_argument("--buffer-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--measure", nargs=2, metavar=("URI", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    buffer_bytes = arguments.buffer_mib * MIB
    if arguments.measure:
        uri, mode = arguments.measure
        print(json.dumps(measure(uri, mode, arguments.size, buffer_bytes)))
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PWISER_CACHE_DIR"] = f"{directory}/cache"
        uri = f"{directory}/streamed"
        synthesize(out=Path(uri), impressions=arguments.impressions, seed=0)
        dataset = open_dataset(uri)
        size_mib = sum(dataset.size_bytes(name) for name in ("train", "valid")) / MIB
        print(f"train and valid {size_mib:.0f} MiB, the stream may hold {arguments.buffer_mib}")
        found: dict[str, list[dict[str, Any]]] = {"memory": [], "stream": []}
        for number in range(arguments.rounds):
            for mode, rounds in found.items():
                command = [sys.executable, __file__, "--measure", uri, mode]
                command += ["--size", arguments.size, "--buffer-mib", str(arguments.buffer_mib)]
                printed = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds.append(json.loads(printed.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {mode}: {rounds[-1]}", flush=True)
    rates = {
        mode: statistics.median(one["impressions_per_s"] for one in rounds)
        for mode, rounds in found.items()
    }
    held_mib = max(one["held_mib"] for one in found["stream"])
    print(
        json.dumps(
            {
                "dataset_mib": round(size_mib),
                "stream_held_mib": held_mib,
                "dataset_to_held": round(size_mib / max(held_mib, 1), 1),
                "speed_ratio": round(rates["stream"] / rates["memory"], 3),
                "rounds": found,
            }
        )
    )


if __name__ == "__main__":
    main()
