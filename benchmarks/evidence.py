"""How often the verdict over seeds is wrong, and how large a gain it finds.

    python benchmarks/evidence.py [--comparisons 400]

Every simulated comparison scores one synthetic test split, whose true click probabilities are
known, by R models per side: the true logit blurred by noise, of a level that varies from seed to
seed. Their CTR AUCs are weighed as a job weighs its replicates.

- nothing to gain: both sides are drawn alike, so that every "better" is wrong;
- a planted gain: the winner's noise is smaller. How small a gain is shows d, the mean difference
  over the standard deviation of one seed's difference, measured over 400 pairs.

The sides share no noise: pairing by seed can only make a real job sharper. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from run_header import run_header

from datasets import open_dataset, synthesize
from trainables.metrics import auc
from tuner.evidence import compare

SEED = 0
IMPRESSIONS = 60_000
NOISE, SPREAD = 1.0, 0.05
"""Standard deviation of the noise in logits, and how much it differs between seeds."""
SEEDS = (3, 5, 10)
REDUCTIONS = (0.0, 0.05, 0.1, 0.2, 0.3)
"""By how much the winner's noise is smaller."""
PAIRS = 400


class Simulation:
    """Draws models that click scores come from."""

    def __init__(self, directory: Path) -> None:
        out = str(directory / "data")
        synthesize(out=out, impressions=IMPRESSIONS, seed=SEED)
        true_N = pq.read_table(f"{out}/truth/test")["p_click"].to_numpy()
        self.logits_N: npt.NDArray[np.float64] = np.log(true_N / (1 - true_N))
        self.clicks_N = torch.from_numpy(open_dataset(out).load("test").clicks_N)
        self.rng = np.random.default_rng(SEED)

    def aucs(self, count: int, reduction: float) -> list[float]:
        """Train so many models, one might say; return their CTR AUCs."""
        found = []
        for _ in range(count):
            level = NOISE * (1 - reduction) * (1 + SPREAD * self.rng.normal())
            scores_N = self.logits_N + level * self.rng.normal(size=len(self.logits_N))
            found.append(auc(torch.from_numpy(scores_N), self.clicks_N) or 0.0)
        return found

    def effect(self, reduction: float) -> tuple[float, float]:
        """Return the mean gain in AUC, and d."""
        gains = np.subtract(self.aucs(PAIRS, reduction), self.aucs(PAIRS, 0.0))
        return float(gains.mean()), float(gains.mean() / gains.std(ddof=1))

    def verdicts(self, seeds: int, reduction: float, comparisons: int) -> dict[str, float]:
        """Return the share of each verdict."""
        found = Counter(
            compare(self.aucs(seeds, 0.0), self.aucs(seeds, reduction)).verdict
            for _ in range(comparisons)
        )
        return {verdict: count / comparisons for verdict, count in found.items()}


def main() -> None:
    """Print a table of verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comparisons", type=int, default=400, help="of each row")
    comparisons = parser.parse_args().comparisons
    header = run_header(SEED, "scipy", "torch", comparisons=comparisons)
    rows: list[dict[str, Any]] = []
    print("gain in AUC      d   seeds   better   worse   no difference shown")
    with tempfile.TemporaryDirectory() as directory:
        simulation = Simulation(Path(directory))
        for reduction in REDUCTIONS:
            gain, effect = simulation.effect(reduction) if reduction else (0.0, 0.0)
            for seeds in SEEDS:
                shares = simulation.verdicts(seeds, reduction, comparisons)
                better, worse, none = (
                    shares.get(name, 0.0) for name in ("better", "worse", "no difference shown")
                )
                print(
                    f"{gain:11.4f} {effect:6.2f} {seeds:7} {better:8.1%} {worse:7.1%} {none:8.1%}",
                    flush=True,
                )
                rows.append({"gain": gain, "d": effect, "seeds": seeds, **shares})
    print(json.dumps({"header": header, "rows": rows}))


if __name__ == "__main__":
    main()
