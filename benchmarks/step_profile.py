"""Where a training step's time goes, and how near it comes to the machine's ceilings.

    python benchmarks/step_profile.py [--model mmoe] [--clock cpu]

Data access, forward, loss, backward and optimiser of one model at the paper's sizes, batch 2048,
folded or not, in both precisions, and the evaluation of as many impressions. Ceilings: a square
matrix product of either precision and a copy beyond every cache, measured in the same run. The
operations are those of the matrix products that the step really does, counted by
torch.utils.flop_counter. ``--clock cpu`` is for a busy machine: one thread and its CPU time. The
last line is one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from run_header import run_header
from torch.utils.flop_counter import FlopCounterMode

from trainables.configuration import TrialConfiguration, build_model
from trainables.execution import Folding, fold_embeddings, keep_freed_memory
from trainables.loss import training_loss
from trainables.metrics import evaluate
from trainables.models import Inputs

SEED = 0
BATCH = 2_048
NUM_ROWS = 40 * BATCH
STEPS = 5
VOCABULARIES = (6, 13, 101, 9, 41, 21, 7, 61, 31, 101, 17, 81, 11, 51, 25, 71)  # synthetic data's
PHASES = ("data", "forward", "loss", "backward", "optimiser")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_of(run: Callable[[], object], clock: Callable[[], float], rounds: int = 5) -> float:
    """Shortest of several calls, in seconds."""
    times = []
    for _ in range(rounds):
        started = clock()
        run()
        times.append(clock() - started)
    return min(times[1:])


def ceilings(clock: Callable[[], float]) -> dict[str, float]:
    """GFLOP/s of a matrix product by precision, and GB/s of a copy (read and write)."""
    figures = {}
    for name, dtype in PRECISIONS.items():
        left, right = torch.randn(2_048, 2_048).to(dtype), torch.randn(2_048, 2_048).to(dtype)
        seconds = best_of(lambda left=left, right=right: left @ right, clock)
        figures[name] = 2 * 2_048**3 / seconds / 1e9
    source = torch.zeros(64 * 1024 * 1024)
    target = torch.zeros_like(source)
    figures["copy"] = 2 * source.nbytes / best_of(lambda: target.copy_(source), clock) / 1e9
    return figures


class Step:
    """One model's training step, as `trainables.training` takes it, in phases."""

    def __init__(self, model: str, precision: str, folding: Folding) -> None:
        torch.manual_seed(SEED)
        inputs = Inputs(vocabulary_sizes=VOCABULARIES, num_numericals=63)
        self.model = build_model(TrialConfiguration.create(model), inputs)
        fold_embeddings(self.model, folding, BATCH)
        self.dtype = PRECISIONS[precision]
        self.optimizer = torch.optim.Adam(self.model.parameters(), weight_decay=1e-6, fused=True)
        columns = [torch.randint(size, (NUM_ROWS,), dtype=torch.int8) for size in VOCABULARIES]
        self.ids_NF = torch.stack(columns, 1)
        self.numericals_ND = torch.randn(NUM_ROWS, 63)
        self.clicks_N = (torch.rand(NUM_ROWS) < 0.1).to(torch.uint8)
        self.conversions_N = self.clicks_N * (torch.rand(NUM_ROWS) < 0.3).to(torch.uint8)
        self.weights = [torch.tensor(value) for value in (0.3, 0.3, 0.1)]
        self.order = torch.randperm(NUM_ROWS)
        self.position = 0

    def rows(self) -> list[torch.Tensor]:
        """The next batch."""
        index = self.order[self.position : self.position + BATCH]
        self.position = (self.position + BATCH) % NUM_ROWS
        parts = (self.ids_NF, self.numericals_ND, self.clicks_N, self.conversions_N)
        return [part[index] for part in parts]

    def logits(self, ids_BF: torch.Tensor, numericals_BN: torch.Tensor) -> torch.Tensor:
        """The forward pass in the step's precision."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits_BT: torch.Tensor = self.model(ids_BF, numericals_BN)
        return logits_BT

    def run(self, clock: Callable[[], float]) -> list[float]:
        """Take a step; return the seconds of each phase."""
        marks = [clock()]
        ids_BF, numericals_BN, clicks_B, conversions_B = self.rows()
        marks.append(clock())
        logits_BT = self.logits(ids_BF, numericals_BN)
        marks.append(clock())
        losses = training_loss(logits_BT, clicks_B, conversions_B, *self.weights)
        marks.append(clock())
        self.optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        marks.append(clock())
        self.optimizer.step()
        marks.append(clock())
        return [after - before for before, after in pairwise(marks)]

    @torch.no_grad()
    def evaluate(self) -> None:
        """Evaluate as many impressions as a step trains, in float32."""
        ids_BF, numericals_BN, clicks_B, conversions_B = self.rows()
        self.model.eval()
        evaluate(self.model(ids_BF, numericals_BN), clicks_B, conversions_B)
        self.model.train()


def profile(
    model: str, precision: str, folding: Folding, top: dict[str, float], clock: Callable[[], float]
) -> dict[str, float]:
    """Print and return one form's figures."""
    step = Step(model, precision, folding)
    with FlopCounterMode(display=False) as counter:
        step.run(clock)
    phases = [step.run(clock) for _ in range(STEPS)]
    row = {
        f"{name}_ms": 1e3 * statistics.median(column)
        for name, column in zip(PHASES, zip(*phases, strict=True), strict=True)
    }
    total_s = statistics.median(sum(times) for times in phases)
    row["step_ms"], row["step_min_ms"] = 1e3 * total_s, 1e3 * min(sum(times) for times in phases)
    row["evaluation_ms"] = 1e3 * best_of(step.evaluate, clock, 4)
    row["gflop"] = counter.get_total_flops() / 1e9
    row["gflop_s"] = row["gflop"] / total_s
    row["share_of_gemm_ceiling"] = row["gflop_s"] / top[precision]
    num_weights = sum(parameter.numel() for parameter in step.model.parameters())
    # Adam reads weights, gradients and two moments, and writes all but the gradients: float32.
    row["optimiser_gb_s"] = 28 * num_weights / row["optimiser_ms"] / 1e6
    row["loss_share"] = row["loss_ms"] / row["step_ms"]
    row["data_share"] = row["data_ms"] / row["step_ms"]
    row["impressions_per_s"] = BATCH / total_s
    times = " ".join(f"{name} {row[f'{name}_ms']:.1f}" for name in PHASES)
    print(
        f"{precision:>8}, folding {folding:<4}: step {row['step_ms']:.1f} ms "
        f"(min {row['step_min_ms']:.1f}): {times}; evaluation {row['evaluation_ms']:.1f}; "
        f"{row['gflop']:.0f} GFLOP, {row['gflop_s']:.0f} GFLOP/s, "
        f"{row['share_of_gemm_ceiling']:.0%} of the ceiling; "
        f"loss {row['loss_share']:.1%}, data {row['data_share']:.1%}; "
        f"{row['impressions_per_s']:,.0f} impressions/s",
        flush=True,
    )
    return row


def main() -> None:
    """Profile one model in four forms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mmoe")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    kept = keep_freed_memory()
    top = ceilings(clock)
    threads = torch.get_num_threads()
    header = run_header(SEED, "torch", threads=threads, clock=arguments.clock, memory_kept=kept)
    print(
        f"ceilings: float32 {top['float32']:.0f} and bfloat16 {top['bfloat16']:.0f} GFLOP/s, "
        f"copy {top['copy']:.1f} GB/s"
    )
    forms: dict[str, Any] = {}
    for precision in PRECISIONS:
        for folding in ("off", "auto"):
            row = profile(arguments.model, precision, folding, top, clock)
            forms[f"{precision}_{'folded' if folding == 'auto' else 'plain'}"] = row
    print(json.dumps({"model": arguments.model, "ceilings": top, "forms": forms, **header}))


if __name__ == "__main__":
    main()
