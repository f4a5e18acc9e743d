import numpy as np
import pytest
from scipy import stats

from tuner.evidence import Comparison, Evidence, compare, weigh

LOSS = {"alpha": 0.1, "m1": 0.3, "m2": 0.1, "gate": "hinge"}


def metrics(ctr_auc: float, ctcvr_auc: float | None = 0.8) -> dict[str, float | None]:
    return {"ctr_auc": ctr_auc, "ctcvr_auc": ctcvr_auc, "cvr_auc": None}


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    baseline, winner = rng.normal(0.7, 0.01, 5), rng.normal(0.71, 0.01, 5)
    found = compare(baseline.tolist(), winner.tolist())
    expected = stats.ttest_rel(winner, baseline).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx(winner.mean() - baseline.mean())
    assert (found.baseline, found.winner) == pytest.approx((baseline.mean(), winner.mean()))
    assert found.baseline_sd == pytest.approx(baseline.std(ddof=1))
    assert found.winner_sd == pytest.approx(winner.std(ddof=1))


def test_equal_values_show_no_difference() -> None:
    found = compare([0.5, 0.6], [0.5, 0.6])
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert found.verdict == "no difference shown"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.002, "better"),
        (-0.002, -0.001, "worse"),
        (-0.001, 0.001, "no difference shown"),
        (0.0, 0.002, "no difference shown"),
        (-0.002, 0.0, "no difference shown"),
    ],
)
def test_the_verdict_says_where_the_interval_lies(low: float, high: float, verdict: str) -> None:
    found = Comparison(
        baseline=0.5,
        baseline_sd=0.0,
        winner=0.5,
        winner_sd=0.0,
        difference=(low + high) / 2,
        low=low,
        high=high,
    )
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("baseline", "winner", "message"),
    [
        ([0.5], [0.6], "at least 2 pairs, got 1 and 1 values"),
        ([0.5, 0.6], [0.5, 0.6, 0.7], "at least 2 pairs, got 2 and 3 values"),
        ([0.5, float("nan")], [0.5, 0.6], "every value must be finite"),
    ],
)
def test_values_that_are_no_pairs_are_refused(
    baseline: list[float], winner: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(baseline, winner)


def test_seeds_that_only_one_of_the_two_has_are_left_out() -> None:
    evidence = weigh(
        model="mmoe",
        winner=3,
        loss=LOSS,
        objectives=("mean_auc",),
        baselines={1: metrics(0.70), 2: metrics(0.71), 3: metrics(0.72), 5: metrics(0.1, None)},
        winners={1: metrics(0.75), 2: metrics(0.77), 4: metrics(0.9), 5: metrics(0.9)},
    )
    assert evidence is not None
    assert evidence.seeds == (1, 2)
    assert evidence.objective == compare([0.75, 0.755], [0.775, 0.785])
    assert evidence.metrics.keys() == {"ctr_auc", "ctcvr_auc"}  # cvr_auc is undefined
    assert evidence.metrics["ctr_auc"] == compare([0.70, 0.71], [0.75, 0.77])
    assert (evidence.model, evidence.winner, evidence.loss) == ("mmoe", 3, LOSS)


def weigh_with_failures(winners: dict[int, float], **failed: tuple[int, ...]) -> Evidence:
    """Weigh a winner whose other seeds failed against a baseline of 0.7 on five seeds."""
    found = weigh(
        model="mmoe",
        winner=3,
        loss=LOSS,
        objectives=("mean_auc",),
        baselines={seed: metrics(0.7) for seed in range(1, 6)},
        winners={seed: metrics(value) for seed, value in winners.items()},
        **failed,
    )
    assert found is not None
    return found


def test_a_winner_that_failed_with_a_seed_is_not_better() -> None:
    found = weigh_with_failures({1: 0.8, 2: 0.8}, failed_winners=(5, 3, 4))
    assert found.objective.verdict == "better"
    assert found.verdict == "no difference shown"
    assert found.seeds == (1, 2)
    assert found.failed_winners == (3, 4, 5)
    assert found.failures == (
        "failed with PWiseR: seeds 3, 4, 5 (a winner that fails is not called better)"
    )
    assert weigh_with_failures({1: 0.6, 2: 0.6}, failed_winners=(3,)).verdict == "worse"


def test_a_baseline_that_failed_with_a_seed_is_named() -> None:
    found = weigh_with_failures({1: 0.8, 2: 0.8, 6: 0.8}, failed_baselines=(6,))
    assert found.verdict == "better"
    assert found.failures == "failed with BCE: seed 6"
    assert weigh_with_failures({1: 0.8, 2: 0.8}).failures is None


def test_a_pareto_study_is_weighed_by_the_mean_of_its_objectives() -> None:
    evidence = weigh(
        model="mmoe",
        winner=1,
        loss=LOSS,
        objectives=("ctr_auc", "ctcvr_auc"),
        baselines={1: metrics(0.5, 0.7), 2: metrics(0.5, 0.7)},
        winners={1: metrics(0.6, 0.7), 2: metrics(0.6, 0.8)},
    )
    assert evidence is not None
    assert evidence.objective.difference == pytest.approx(0.075)


@pytest.mark.parametrize("seeds", [(), (1,)])
def test_fewer_than_two_seeds_are_no_evidence(seeds: tuple[int, ...]) -> None:
    found = {seed: metrics(0.7) for seed in seeds}
    assert (
        weigh(
            model="dnn",
            winner=1,
            loss=LOSS,
            objectives=("ctr_auc",),
            baselines=found,
            winners=found | {7: metrics(0.7)},
        )
        is None
    )
