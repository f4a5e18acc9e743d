import pytest

from tuner.objective import OBJECTIVES, computable_objectives, objective_values, score

METRICS = {"ctr_auc": 0.6, "ctcvr_auc": 0.8, "cvr_auc": None}


def test_objectives_are_means_of_their_metrics() -> None:
    assert objective_values(METRICS, ["mean_auc", "ctr_auc", "ctcvr_auc"]) == (0.7, 0.6, 0.8)


def test_the_score_is_the_mean_of_the_objectives() -> None:
    assert score((0.6, 0.9)) == 0.75
    assert score((0.6,)) == 0.6


@pytest.mark.parametrize("objective", ["mean_auc", "ctcvr_auc"])
def test_an_undefined_metric_is_never_passed_over(objective: str) -> None:
    with pytest.raises(ValueError, match=f"objective {objective} is undefined: one class only"):
        objective_values(METRICS | {"ctcvr_auc": None}, [objective])
    assert objective_values(METRICS | {"ctcvr_auc": None}, ["ctr_auc"]) == (0.6,)


def test_a_missing_metric_is_an_error() -> None:
    with pytest.raises(KeyError, match="ctcvr_auc"):
        objective_values({"ctr_auc": 0.5}, ["mean_auc"])


@pytest.mark.parametrize(
    ("clicks", "conversions", "computable"),
    [
        (10, 5, list(OBJECTIVES)),
        (10, 0, ["ctr_auc"]),
        (0, 0, []),
        (100, 5, ["ctcvr_auc"]),
        (100, 100, []),
        (100, 0, []),
    ],
)
def test_an_objective_needs_both_classes(
    clicks: int, conversions: int, computable: list[str]
) -> None:
    found = computable_objectives(impressions=100, clicks=clicks, conversions=conversions)
    assert found == computable
