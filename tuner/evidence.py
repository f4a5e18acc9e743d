"""Is a study's winner better than plain BCE: the comparison over fresh seeds, and its verdict.

The winner is trained again with fresh seeds, and with the same ones its baseline, which is the
winner with alpha 0 (`tuner.replicates`); the differences of their test metrics, pair by pair, give
Student's t interval at 95% (W. S. Gosset, "The probable error of a mean", Biometrika 1908). It
covers what the initial weights and the order of the data change, not which rows the test split
happens to hold.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from tuner.objective import OBJECTIVES, Objective

__all__ = ["CONFIDENCE", "METHOD", "Comparison", "Evidence", "Verdict", "compare", "weigh"]

CONFIDENCE = 0.95
METHOD = "paired t interval at 95% over seeds"
Verdict = Literal["better", "worse", "no difference shown"]
Metrics = Mapping[str, float | None]


class Comparison(BaseModel):
    """One metric of winner and baseline over the seeds that both were trained with.

    Attributes:
        baseline: mean over the seeds.
        baseline_sd: standard deviation over the seeds, with n - 1.
        winner: as baseline.
        winner_sd: as baseline_sd.
        difference: winner less baseline.
        low: lower end of the difference's 95% interval.
        high: upper end.
    """

    model_config = ConfigDict(frozen=True)

    baseline: float
    baseline_sd: float
    winner: float
    winner_sd: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Where the interval lies, for a metric of which more is better; at 0 nothing is shown."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


class Evidence(BaseModel):
    """What the replicates of a study show, on test.

    Attributes:
        model: of the study.
        winner: number of the trial that was repeated.
        loss: alpha, m1 and m2 of the winner, and its gate; with alpha 0 plain BCE has won.
        seeds: that both were trained with.
        objective: winner against baseline by what the search maximised; decides the verdict.
        metrics: the same for each metric that is defined for all seeds.
        verdict: better, worse or no difference shown; never better where the winner failed.
        failed_baselines: seeds with which plain BCE failed.
        failed_winners: seeds with which the winner failed.
        method: of the interval.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    winner: int
    loss: dict[str, float | str]
    seeds: tuple[int, ...]
    objective: Comparison
    metrics: dict[str, Comparison]
    verdict: Verdict
    failed_baselines: tuple[int, ...] = ()
    failed_winners: tuple[int, ...] = ()
    method: str = METHOD

    @property
    def failures(self) -> str | None:
        """Which replicates failed, and what follows, in one line; None where none did."""
        parts = []
        if self.failed_winners:
            name = "PWiseR" if self.loss["alpha"] else "BCE"
            parts.append(
                f"failed with {name}: {_listed(self.failed_winners)} "
                "(a winner that fails is not called better)"
            )
        if self.failed_baselines:
            parts.append(f"failed with BCE: {_listed(self.failed_baselines)}")
        return "; ".join(parts) or None

    @property
    def single_task(self) -> bool:
        """Whether the model has one head: its score is no conversion probability to have a loss."""
        return "ctcvr_logloss" not in self.metrics


def _listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def compare(baseline: Sequence[float], winner: Sequence[float]) -> Comparison:
    """Compare paired values.

    Equal differences, as of a winner that is the baseline, give an interval without width.

    Args:
        baseline: one value per seed, at least 2.
        winner: the values of the same seeds.

    Raises:
        ValueError: if there are fewer than 2 pairs, or a value is not finite.
    """
    baseline_R, winner_R = np.asarray(baseline, float), np.asarray(winner, float)
    if len(baseline_R) != len(winner_R) or len(baseline_R) < 2:
        raise ValueError(f"at least 2 pairs, got {len(baseline_R)} and {len(winner_R)} values")
    if not (np.isfinite(baseline_R).all() and np.isfinite(winner_R).all()):
        raise ValueError("every value must be finite")
    from scipy import stats  # takes a second to import

    difference_R = winner_R - baseline_R
    error = float(difference_R.std(ddof=1)) / math.sqrt(len(difference_R))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(difference_R) - 1)) * error
    difference = float(difference_R.mean())
    return Comparison(
        baseline=float(baseline_R.mean()),
        baseline_sd=float(baseline_R.std(ddof=1)),
        winner=float(winner_R.mean()),
        winner_sd=float(winner_R.std(ddof=1)),
        difference=difference,
        low=difference - reach,
        high=difference + reach,
    )


def weigh(
    *,
    model: str,
    winner: int,
    loss: Mapping[str, float | str],
    objectives: Sequence[Objective],
    baselines: Mapping[int, Metrics],
    winners: Mapping[int, Metrics],
    failed_baselines: Sequence[int] = (),
    failed_winners: Sequence[int] = (),
) -> Evidence | None:
    """Weigh the replicates of one study.

    A winner that failed with any seed is not better *whatever the seed*: where the seeds that are
    left would say so, no difference is shown.

    Args:
        model: of the study.
        winner: number of its trial.
        loss: the winner's.
        objectives: of the search; the mean of all of them is compared.
        baselines: test metrics of the winner with alpha 0 by seed; those of seeds that failed are
            not there.
        winners: the same of the winner.
        failed_baselines: those seeds of the winner with alpha 0.
        failed_winners: those of the winner.

    Returns:
        None where fewer than two seeds have both.
    """
    names = {name for objective in objectives for name in OBJECTIVES[objective]}
    seeds = [
        seed
        for seed in sorted(baselines.keys() & winners.keys())
        if all(
            found[seed].get(name) is not None for found in (baselines, winners) for name in names
        )
    ]
    if len(seeds) < 2:
        return None

    def values(found: Mapping[int, Metrics], name: str) -> list[float]:
        return [value for seed in seeds if (value := found[seed].get(name)) is not None]

    def scores(found: Mapping[int, Metrics]) -> list[float]:
        parts = [
            np.mean([values(found, name) for name in OBJECTIVES[objective]], axis=0)
            for objective in objectives
        ]
        return [float(value) for value in np.mean(parts, axis=0)]

    metrics = {}
    for name in baselines[seeds[0]]:
        pair = values(baselines, name), values(winners, name)
        if all(len(part) == len(seeds) for part in pair):
            metrics[name] = compare(*pair)
    objective = compare(scores(baselines), scores(winners))
    verdict = objective.verdict
    if failed_winners and verdict == "better":
        verdict = "no difference shown"
    return Evidence(
        model=model,
        winner=winner,
        loss=dict(loss),
        seeds=tuple(seeds),
        objective=objective,
        metrics=metrics,
        verdict=verdict,
        failed_baselines=tuple(sorted(failed_baselines)),
        failed_winners=tuple(sorted(failed_winners)),
    )
