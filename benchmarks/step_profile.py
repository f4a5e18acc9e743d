"""Where a training step's time goes, and how near it comes to the machine's ceilings.

    python benchmarks/step_profile.py [--model mmoe] [--clock cpu] [--device cuda] [--batch 2048]

Data access, forward, loss, backward and optimiser of one model at the paper's sizes, folded or not,
in every precision that the device has, and the evaluation of as many impressions. Ceilings: a
square matrix product of that precision and a copy beyond every cache, the best of those measured
before and after every form, since whatever else the machine does only slows them. The operations
are those of the matrix products that the step really does, counted by torch.utils.flop_counter.
``--clock cpu`` is for a busy machine: one thread and its CPU time. On a GPU every phase waits for
the device, which a real step does not. The last line is one line of JSON.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from run_header import run_header
from torch.utils.flop_counter import FlopCounterMode

from trainables import DeviceImpressions, Inputs, TrainingSettings, TrialConfiguration, Workers
from trainables.batches import BatchShape
from trainables.configuration import build_model
from trainables.execution import compute_dtype, fold_embeddings, keep_freed_memory
from trainables.loss import training_loss
from trainables.metrics import evaluate
from trainables.optimizers import make_optimizers

SEED = 0
BATCH = 2_048
NUM_ROWS = 81_920
STEPS = 10
VOCABULARIES = (6, 13, 101, 9, 41, 21, 7, 61, 31, 101, 17, 81, 11, 51, 25, 71)  # synthetic data's
PHASES = ("data", "forward", "loss", "backward", "optimiser")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GEMM_SIZE = {"cpu": 2_048, "cuda": 8_192}
Clock = Callable[[], float]


def wall_clock(device: torch.device) -> Clock:
    """Seconds, once the device has done what it was told."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def best_of(run: Callable[[], object], clock: Clock, rounds: int = 5) -> float:
    """Shortest of several calls, in seconds."""
    times = []
    for _ in range(rounds):
        started = clock()
        run()
        times.append(clock() - started)
    return min(times[1:])


def precisions_of(device: torch.device) -> dict[str, torch.dtype]:
    """Those that the device has; others are computed too, but hundreds of times as slowly."""
    quickest = compute_dtype("auto", device)
    return {name: dtype for name, dtype in PRECISIONS.items() if dtype in {torch.float32, quickest}}


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """GFLOP/s of a matrix product by precision, and GB/s of a copy (read and write)."""
    figures = {}
    size = GEMM_SIZE[device.type]
    for name, dtype in precisions_of(device).items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = best_of(lambda left=left, right=right: left @ right, clock)
        figures[name] = 2 * size**3 / seconds / 1e9
    source = torch.zeros(64 * 1024 * 1024, device=device)
    target = torch.zeros_like(source)
    figures["copy"] = 2 * source.nbytes / best_of(lambda: target.copy_(source), clock) / 1e9
    return figures


def product_flop(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    """Operations of a product of these shapes, batched or not."""
    return 2 * math.prod(left) * right[-1]


def added_product_flop(_: Sequence[int], *factors: Sequence[int], **__: object) -> int:
    """Operations of a product that is added to what is there."""
    return product_flop(*factors)


PRODUCT_FLOP = {  # what torch's own counter does not know
    torch.ops.aten.addmm_: added_product_flop,
    torch.ops.aten.bmm: product_flop,  # where the type of the result is named
}


class Step:
    """A trial's training step at the synthetic data's shape, in phases."""

    def __init__(self, configuration: TrialConfiguration, device: torch.device, batch: int) -> None:
        torch.manual_seed(SEED)
        inputs = Inputs(vocabulary_sizes=VOCABULARIES, num_numericals=63)
        training = configuration.training
        self.device = device
        self.dtype = compute_dtype(training.precision, device)
        self.model = build_model(configuration, inputs).to(device)
        fold_embeddings(self.model, training.folding, batch)
        self.optimizers = make_optimizers(
            self.model,
            training.embedding_optimizer,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            rows_per_step=batch,
        )
        loss = configuration.loss
        self.weights = [
            torch.tensor(value, device=device) for value in (loss.alpha, loss.m1, loss.m2)
        ]
        columns = [torch.randint(size, (NUM_ROWS,), dtype=torch.int8) for size in VOCABULARIES]
        clicks_N = (torch.rand(NUM_ROWS) < 0.1).to(torch.uint8)
        conversions_N = clicks_N * (torch.rand(NUM_ROWS) < 0.3).to(torch.uint8)
        split = DeviceImpressions(
            torch.stack(columns, 1).to(device),
            torch.randn(NUM_ROWS, 63, device=device),
            torch.stack([clicks_N, conversions_N], 1).to(device),
        )
        self.batches = split.batches(
            BatchShape(steps_per_epoch=NUM_ROWS // batch, rows=batch, seed=SEED),
            Workers(device=device),
        )

    def logits(self, batch: DeviceImpressions) -> torch.Tensor:
        """The forward pass in the step's precision."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            logits_BT: torch.Tensor = self.model(batch.ids_NF, batch.numericals_ND)
        return logits_BT

    def run(self, clock: Clock) -> list[float]:
        """Take a step; return the seconds of each phase."""
        marks = [clock()]
        batch = self.batches.next().load()
        marks.append(clock())
        logits_BT = self.logits(batch)
        marks.append(clock())
        losses = training_loss(logits_BT, batch.clicks_N, batch.conversions_N, *self.weights)
        marks.append(clock())
        self.optimizers.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        marks.append(clock())
        self.optimizers.step()
        marks.append(clock())
        return [after - before for before, after in pairwise(marks)]

    def gflop(self) -> float:
        """Take a step and count the operations of its matrix products."""
        with FlopCounterMode(display=False, custom_mapping=PRODUCT_FLOP) as counter:
            self.run(time.perf_counter)
        return counter.get_total_flops() / 1e9

    @torch.no_grad()
    def evaluate(self) -> None:
        """Evaluate as many impressions as a step trains, in float32."""
        batch = self.batches.next().load()
        self.model.eval()
        logits_BT = self.model(batch.ids_NF, batch.numericals_ND)
        evaluate(logits_BT, batch.clicks_N, batch.conversions_N)
        self.model.train()


def profile(
    configuration: TrialConfiguration,
    device: torch.device,
    batch: int,
    clock: Clock,
) -> dict[str, float]:
    """Print and return one form's figures."""
    precision, folding = configuration.training.precision, configuration.training.folding
    step = Step(configuration, device, batch)
    gflop = step.gflop()
    phases = [step.run(clock) for _ in range(STEPS)]
    row = {
        f"{name}_ms": 1e3 * statistics.median(column)
        for name, column in zip(PHASES, zip(*phases, strict=True), strict=True)
    }
    total_s = statistics.median(sum(times) for times in phases)
    row["step_ms"], row["step_min_ms"] = 1e3 * total_s, 1e3 * min(sum(times) for times in phases)
    row["evaluation_ms"] = 1e3 * best_of(step.evaluate, clock, 4)
    row["gflop"] = gflop
    row["gflop_s"] = row["gflop"] / total_s
    num_weights = sum(parameter.numel() for parameter in step.model.parameters())
    # Adam reads weights, gradients and two moments, and writes all but the gradients: float32.
    row["optimiser_gb_s"] = 28 * num_weights / row["optimiser_ms"] / 1e6
    row["loss_share"] = row["loss_ms"] / row["step_ms"]
    row["data_share"] = row["data_ms"] / row["step_ms"]
    row["impressions_per_s"] = batch / total_s
    times = " ".join(f"{name} {row[f'{name}_ms']:.1f}" for name in PHASES)
    print(
        f"{precision:>8}, folding {folding:<4}: step {row['step_ms']:.1f} ms "
        f"(min {row['step_min_ms']:.1f}): {times}; evaluation {row['evaluation_ms']:.1f}; "
        f"{row['gflop']:.0f} GFLOP, {row['gflop_s']:.0f} GFLOP/s; "
        f"loss {row['loss_share']:.1%}, data {row['data_share']:.1%}; "
        f"{row['impressions_per_s']:,.0f} impressions/s",
        flush=True,
    )
    return row


def main() -> None:
    """Profile one model in every form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mmoe")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    device = torch.device(arguments.device)
    clock = wall_clock(device)
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    kept = keep_freed_memory()
    threads = torch.get_num_threads()
    header = run_header(SEED, "torch", threads=threads, clock=arguments.clock, memory_kept=kept)
    top = ceilings(device, clock)
    forms: dict[str, Any] = {}
    for precision in precisions_of(device):
        for folding in ("off", "auto"):
            training = TrainingSettings.model_validate(
                {"precision": precision, "folding": folding, "batch_size": arguments.batch}
            )
            configuration = TrialConfiguration.create(arguments.model, training=training)
            form = f"{precision}_{'folded' if folding == 'auto' else 'plain'}"
            forms[form] = profile(configuration, device, arguments.batch, clock)
            for name, rate in ceilings(device, clock).items():
                top[name] = max(top[name], rate)
    products = ", ".join(f"{name} {top[name]:.0f} GFLOP/s" for name in precisions_of(device))
    print(f"ceilings: {products}, copy {top['copy']:.1f} GB/s; of that of products reached:")
    for form, row in forms.items():
        row["share_of_gemm_ceiling"] = row["gflop_s"] / top[form.partition("_")[0]]
        print(f"{form:>15}: {row['share_of_gemm_ceiling']:.0%}")
    if "bfloat16" not in top:
        print("bfloat16 was not measured: the device has none")
    print(json.dumps({"model": arguments.model, "ceilings": top, "forms": forms, **header}))


if __name__ == "__main__":
    main()
