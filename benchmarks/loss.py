"""The PWiseR loss against the broadcast over all pairs: time, memory, exactness, share of a step.

    python benchmarks/loss.py

Time and peak memory: forward and backward, float32 scores, 5% conversions, one process per figure;
peak memory is what the process's resident set grew by at most (Linux). The broadcast is the common
way: a matrix of all gaps per term, with autograd. Exactness: against a float64 brute force over all
pairs, in chunks. Share: the loss alone, called once after each training step (cold caches), over
the step of MMoE at the paper's sizes, in turns in one run. The last line is one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from run_header import run_header
from torch import Tensor

from trainables.loss import Gate, pwiser, training_loss
from trainables.models import Inputs, MMoE

SEED = 0
SIZES = (2_048, 16_384, 65_536, 262_144, 1_048_576)
CLICK_RATE, CONVERSION_RATE = 0.2, 0.05
M1, M2 = 0.3, 0.1
MAX_BROADCAST_PAIRS = 400_000_000  # about 8 GB and 10 s
MAX_BRUTE_FORCE_PAIRS = 400_000_000
NUM_SAMPLED = 500
BATCH = 2_048
STEP_ROUNDS = 9

Impressions = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def impressions(num_rows: int, conversion_rate: float = CONVERSION_RATE) -> Impressions:
    """Scores, clicks and conversions; conversions score higher, as under a trained model."""
    generator = torch.Generator().manual_seed(SEED)
    chances_N = torch.rand(num_rows, generator=generator)
    clicks_N, conversions_N = chances_N < CLICK_RATE, chances_N < conversion_rate
    logits_N = torch.randn(num_rows, generator=generator) - 2.0 + 0.7 * clicks_N + conversions_N
    return logits_N.sigmoid(), clicks_N, conversions_N


def by_sorting(scores_N: Tensor, clicks_N: Tensor, conversions_N: Tensor) -> Tensor:
    """Ours."""
    return pwiser(scores_N, clicks_N, conversions_N, M1, M2)


def by_broadcast(scores_N: Tensor, clicks_N: Tensor, conversions_N: Tensor) -> Tensor:
    """The common way."""
    scores_v = scores_N[conversions_N]
    loss = scores_N.new_zeros(())
    for rows, margin in ((clicks_N & ~conversions_N, M1), (~clicks_N, M2)):
        gaps = torch.relu(scores_N[rows, None] + margin - scores_v[None, :])
        loss = loss + gaps.square().mean()
    return loss


def num_pairs(num_rows: int) -> int:
    """Pairs of both terms together."""
    return int(num_rows * CONVERSION_RATE * num_rows * (1 - CONVERSION_RATE))


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_backward(loss: Loss, batch: Impressions) -> None:
    """One loss and its gradient."""
    scores_N, clicks_N, conversions_N = batch
    loss(scores_N.detach().requires_grad_(), clicks_N, conversions_N).backward()


def peak_resident_mb() -> float:
    """Largest resident set of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(variant: str, num_rows: int) -> dict[str, float]:
    """Time and peak memory of one variant at one size, in this process."""
    loss = {"sorting": by_sorting, "broadcast": by_broadcast}[variant]
    batch = impressions(num_rows)
    forward_backward(loss, impressions(256))  # loads the kernels
    # Not ru_maxrss: a child process starts with its parent's.
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before_mb = peak_resident_mb()
    first = seconds(lambda: forward_backward(loss, batch))
    rounds = 3 if first > 1.0 else 31
    times = [seconds(lambda: forward_backward(loss, batch)) for _ in range(rounds)]
    return {
        "ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "peak_mb": peak_resident_mb() - before_mb,
    }


def measure_apart(variant: str, num_rows: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", variant, str(num_rows)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def compare_time_and_memory() -> dict[str, dict[str, float]]:
    """Print the table of both variants by size."""
    header = f"{'impressions':>12} {'sorting ms (min-max)':>28} {'MB':>7}"
    print(f"{header} {'broadcast ms (min-max)':>32} {'MB':>7} {'ratio':>7}")
    table = {}
    for num_rows in SIZES:
        ours = measure_apart("sorting", num_rows)
        row = {f"sorting_{name}": value for name, value in ours.items()}
        line = f"{num_rows:>12,} {_time(ours):>28} {ours['peak_mb']:>7.0f}"
        pairs = num_pairs(num_rows)
        if pairs <= MAX_BROADCAST_PAIRS:
            theirs = measure_apart("broadcast", num_rows)
            row |= {f"broadcast_{name}": value for name, value in theirs.items()}
            row["ratio"] = theirs["ms"] / ours["ms"]
            line += f" {_time(theirs):>32} {theirs['peak_mb']:>7.0f} {row['ratio']:>7.1f}"
        else:
            line += f"   not run: {pairs:.1e} pairs, {pairs * 4 / 1e9:.0f} GB for each temporary"
        print(line, flush=True)
        table[str(num_rows)] = row
    return table


def _time(figures: dict[str, float]) -> str:
    return f"{figures['ms']:.2f} ({figures['min_ms']:.2f}-{figures['max_ms']:.2f})"


def gaps_of_term(scores_a: Tensor, scores_v: Tensor, margin: float, gate: Gate) -> Tensor:
    """Float64 gaps of all given pairs, 0 where a pair does not count."""
    reach = scores_a[:, None] + margin
    edge = reach if gate == "hinge" else scores_a[:, None] - margin
    return torch.where(scores_v < edge, reach - scores_v, 0.0)


def brute_force_error(num_rows: int, gate: Gate) -> tuple[float, str]:
    """Largest relative error of value and gradient, and what was compared.

    Where all pairs are too many, the gradients of sampled impressions: each still over all its
    pairs.
    """
    scores_N, clicks_N, conversions_N = impressions(num_rows)
    scores_N.requires_grad_()
    value = pwiser(scores_N, clicks_N, conversions_N, M1, M2, gate=gate)
    value.backward()  # type: ignore[no-untyped-call]
    assert scores_N.grad is not None
    exact_N, rows_v = scores_N.detach().double(), conversions_N.nonzero()[:, 0]
    grad_N, total = torch.zeros_like(exact_N), 0.0
    complete = num_pairs(num_rows) <= MAX_BRUTE_FORCE_PAIRS
    compared = torch.zeros(num_rows, dtype=torch.bool)
    sampled_v = rows_v if complete else rows_v[:: max(1, len(rows_v) // NUM_SAMPLED)]
    compared[sampled_v] = True
    for anchors_N, margin in ((clicks_N & ~conversions_N, M1), (~clicks_N, M2)):
        rows_a = anchors_N.nonzero()[:, 0]
        pairs = len(rows_a) * len(rows_v)
        sampled_a = rows_a if complete else rows_a[:: max(1, len(rows_a) // NUM_SAMPLED)]
        compared[sampled_a] = True
        for rows in sampled_a.split(256):
            gaps = gaps_of_term(exact_N[rows], exact_N[rows_v], margin, gate)
            total += gaps.square().sum().item() / pairs
            grad_N.index_add_(0, rows, 2 * gaps.sum(1) / pairs)
            if complete:
                grad_N.index_add_(0, rows_v, -2 * gaps.sum(0) / pairs)
        if not complete:
            for rows in sampled_v.split(16):
                gaps = gaps_of_term(exact_N[rows_a], exact_N[rows], margin, gate)
                grad_N.index_add_(0, rows, -2 * gaps.sum(0) / pairs)
    floor = 1e-9 * grad_N.abs().max()
    errors_N = (scores_N.grad - grad_N).abs() / grad_N.abs().clamp(min=floor)
    error = errors_N[compared].max().item()
    if complete:
        return max(error, abs(value.item() - total) / total), "value and all gradients"
    return error, f"gradients of {int(compared.sum()):,} impressions"


def check_exactness() -> float:
    """Print the relative errors; return the largest."""
    worst = 0.0
    for num_rows in SIZES:
        for gate in ("hinge", "literal"):
            if gate == "literal" and num_rows > SIZES[2]:
                continue  # the same sums; saves the time
            error, compared = brute_force_error(num_rows, gate)
            worst = max(worst, error)
            print(f"{num_rows:>12,} {gate:>8}: relative error {error:.1e} ({compared})", flush=True)
    return worst


def paper_step(dtype: torch.dtype) -> Callable[[], None]:
    """A training step of MMoE at the paper's sizes on AliExpress-shaped features."""
    torch.manual_seed(SEED)
    inputs = Inputs(vocabulary_sizes=(30,) * 16, num_numericals=63)
    model = MMoE(inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    ids_BF, numericals_BN = torch.randint(30, (BATCH, 16)), torch.randn(BATCH, 63)
    _, clicks_B, conversions_B = impressions(BATCH)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits_BT = model(ids_BF, numericals_BN)
        losses = training_loss(logits_BT, clicks_B, conversions_B, 0.3, M1, M2)
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure_share() -> dict[str, float]:
    """Print and return the loss's share of a training step at 2,048 impressions."""
    steps = {name: paper_step(getattr(torch, name)) for name in ("float32", "bfloat16")}
    batches = {"2": impressions(BATCH, 2 / BATCH), "100": impressions(BATCH, 100 / BATCH)}
    times: dict[str, list[float]] = {}
    for round_ in range(STEP_ROUNDS + 1):
        for precision, step in steps.items():
            spent = {f"step {precision}": seconds(step)}
            for conversions, batch in batches.items():
                name = f"loss {conversions} {precision}"
                spent[name] = seconds(lambda batch=batch: forward_backward(by_sorting, batch))
            if round_ > 0:  # the first warms up
                for name, value in spent.items():
                    times.setdefault(name, []).append(value)
    shares = {}
    for precision in steps:
        step_s = statistics.median(times[f"step {precision}"])
        print(f"MMoE step, {precision}: {_spread(times[f'step {precision}'])}")
        for conversions, (_, _, conversions_N) in batches.items():
            loss_times = times[f"loss {conversions} {precision}"]
            share = statistics.median(loss_times) / step_s
            shares[f"{precision}_{conversions}_conversions"] = share
            count = int(conversions_N.sum())
            print(f"  loss, {count} conversions: {_spread(loss_times)}, {share:.3%} of the step")
    return shares


def _spread(times: list[float]) -> str:
    median, low, high = (1e3 * pick(times) for pick in (statistics.median, min, max))
    return f"{median:.2f} ms ({low:.2f}-{high:.2f})"


def main() -> None:
    """Run everything, or one measurement in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "IMPRESSIONS"))
    chosen = parser.parse_args().measure
    if chosen:
        print(json.dumps(measure(chosen[0], int(chosen[1]))))
        return
    header = run_header(SEED, "torch", threads=torch.get_num_threads())
    table = compare_time_and_memory()
    error = check_exactness()
    shares = measure_share()
    print(f"largest relative error {error:.1e}; largest share of a step {max(shares.values()):.3%}")
    figures = {
        **header,
        "sizes": table,
        "max_relative_error": error,
        "shares_of_step": shares,
        "max_share_of_step": max(shares.values()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
