"""Loading a prepared dataset into training tensors: speed, and what a second lane costs.

    pwiser data synth --out /tmp/demo --impressions 1000000
    python benchmarks/loading.py /tmp/demo

Speed: ``Dataset.load`` of train, then ``torch.from_numpy``, several times; beside it the processor
time of a row, over all threads, which other work on the machine disturbs less.
A second lane: processes that load train and valid and read every tensor; memory is the sum of the
proportional set sizes of one such process, and of two, less that of a process which has imported
the same and loaded nothing. The last line is one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from resident_memory import resident_bytes

from datasets import Impressions, open_dataset


def tensors_of(impressions: Impressions) -> list[torch.Tensor]:
    """Return the arrays as tensors, without a copy."""
    arrays: list[Any] = [impressions.ids_NF, impressions.numericals_ND]
    arrays += [impressions.clicks_N, impressions.conversions_N]
    return [torch.from_numpy(array) for array in arrays]


def hold(uri: str, how: str) -> None:
    """Load as a lane does, read everything, say so, and wait for the end of the input."""
    dataset = open_dataset(uri)
    size_bytes, held = 0, []
    for split in ("train", "valid"):
        if how == "nothing":
            continue
        impressions = dataset.load_shared(split) if how == "shared" else dataset.load(split)
        size_bytes += impressions.size_bytes
        held += tensors_of(impressions)
    checksum = sum(float(part.sum()) for tensor in held for part in tensor.split(65_536))
    print(json.dumps({"size_bytes": size_bytes, "checksum": checksum}), flush=True)
    sys.stdin.read()


def measure_lanes(uri: str, how: str, num_lanes: int) -> tuple[int, int]:
    """Return the memory that so many lanes hold together, and the size of the table."""
    command = [sys.executable, __file__, uri, "--hold", how]
    lanes = []
    for _ in range(num_lanes):
        lane = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert lane.stdout is not None
        size_bytes = json.loads(lane.stdout.readline())["size_bytes"]
        lanes.append(lane)
    held_bytes = sum(resident_bytes(lane.pid) for lane in lanes)
    for lane in lanes:
        lane.communicate()
    return held_bytes, size_bytes


def main() -> None:
    """Measure speed, then memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--hold", choices=("nothing", "private", "shared"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        hold(arguments.dataset, arguments.hold)
        return
    rates, row_us = [], []
    for _ in range(arguments.repeat):
        started, cpu_started = time.perf_counter(), time.process_time()
        tensors = tensors_of(open_dataset(arguments.dataset).load("train"))
        rates.append(len(tensors[0]) / (time.perf_counter() - started))
        row_us.append((time.process_time() - cpu_started) / len(tensors[0]) * 1e6)
    shown = ", ".join(f"{rate:,.0f}" for rate in rates)
    print(f"load: {shown} impressions/s, {min(row_us):.2f} us of processor time a row")
    figures: dict[str, float] = {
        "impressions": len(tensors[0]),
        "load_best_per_s": round(max(rates)),
        "load_median_per_s": round(statistics.median(rates)),
        "load_processor_us_per_row": round(min(row_us), 3),
    }
    del tensors
    for how in ("private", "shared"):
        measure_lanes(arguments.dataset, how, 1)  # the first shared one writes the arrays
        one, size_bytes = measure_lanes(arguments.dataset, how, 1)
        two, _ = measure_lanes(arguments.dataset, how, 2)
        idle_two, _ = measure_lanes(arguments.dataset, "nothing", 2)
        idle_one, _ = measure_lanes(arguments.dataset, "nothing", 1)
        added = ((two - idle_two) - (one - idle_one)) / size_bytes
        print(f"{how}: a second lane adds {added:.1%} of the table's {size_bytes >> 20} MiB")
        figures["table_mib"] = size_bytes >> 20
        figures[f"second_lane_share_{how}"] = round(added, 4)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
