"""Objectives: the validation metrics that a study maximises."""

from collections.abc import Mapping, Sequence
from typing import Literal

__all__ = ["OBJECTIVES", "Objective", "computable_objectives", "objective_values", "score"]

Objective = Literal["mean_auc", "ctr_auc", "ctcvr_auc"]

OBJECTIVES: dict[Objective, tuple[str, ...]] = {
    "mean_auc": ("ctr_auc", "ctcvr_auc"),
    "ctr_auc": ("ctr_auc",),
    "ctcvr_auc": ("ctcvr_auc",),
}
"""Each objective is the mean of these metrics."""


def objective_values(
    metrics: Mapping[str, float | None], objectives: Sequence[Objective]
) -> tuple[float, ...]:
    """Compute each objective from an evaluation's metrics.

    Raises:
        ValueError: if a metric that an objective needs is missing (one class only).
    """
    values = []
    for objective in objectives:
        parts = [metrics[name] for name in OBJECTIVES[objective]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            raise ValueError(f"objective {objective} is undefined: one class only among the labels")
        values.append(sum(known) / len(known))
    return tuple(values)


def score(values: Sequence[float]) -> float:
    """Rank trials by one number: the mean of their objectives. Higher is better."""
    return sum(values) / len(values)


def computable_objectives(*, impressions: int, clicks: int, conversions: int) -> list[Objective]:
    """List the objectives that a split with these counts defines: each needs both classes."""
    defined = {
        "ctr_auc": 0 < clicks < impressions,
        "ctcvr_auc": 0 < conversions < impressions,
    }
    return [name for name, parts in OBJECTIVES.items() if all(defined[part] for part in parts)]
