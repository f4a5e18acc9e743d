"""The figures of a study, drawn by Optuna's own plots on matplotlib."""

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.visualization import matplotlib as plots

from tuner.report.reading import StudyReport, TrialRow

__all__ = ["study_figures"]

SIZE_INCHES = (7.2, 4.0)
LANDSCAPE_INCHES = (8.4, 7.2)
DOTS_PER_INCH = 140
LANDSCAPE = ("loss.alpha", "loss.m1", "loss.m2")
LOG_SPREAD = 50.0
"""A positive parameter whose values span more than this factor is drawn on a log axis."""


def study_figures(
    study: StudyReport, names: Collection[str] | None = None
) -> Iterator[tuple[str, str, bytes]]:
    """Draw what can be drawn of a study.

    Trials that failed or have no evaluation are left out, and so is the baseline where parameters
    are drawn, since it has none. A figure that needs more trials than there are is left out too.

    Args:
        study: what to draw.
        names: those of `history`, `importance`, `parallel`, `landscape`, `curves` and `pareto` that
            are wanted; all if left out.

    Yields:
        File name, caption and PNG of each figure.
    """
    mpl.use("Agg")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = _optuna_study(study)
    num_trials = sum(bool(trial.params) for trial in found.trials)
    several = len(study.objectives) > 1
    plane = [name for name in LANDSCAPE if name in _varied(found)]
    target: dict[str, Any] = {"target_name": " and ".join(study.objectives)}
    if several:
        target |= {"target": lambda trial: float(np.mean(trial.values)), "target_name": "mean"}
    drawings: list[tuple[str, str, bool, Callable[[], Any]]] = [
        (
            "history",
            "Best evaluation of each trial on valid, and the best so far",
            num_trials > 0,
            lambda: plots.plot_optimization_history(found, **target),
        ),
        (
            "importance",
            "How much of the objective's variation each hyperparameter explains (fANOVA)",
            num_trials > 3 and len(_varied(found)) > 1,
            lambda: plots.plot_param_importances(found, params=_varied(found), **target),
        ),
        (
            "parallel",
            "Parallel coordinates of all trials",
            num_trials > 1 and len(_varied(found)) > 1,
            lambda: plots.plot_parallel_coordinate(found, params=_varied(found), **target),
        ),
        (
            "landscape",
            "The objective over pairs of alpha, m1 and m2, with the trials drawn in",
            num_trials > 3 and len(plane) > 1,
            lambda: plots.plot_contour(found, params=plane, **target),
        ),
        ("curves", "Objective on valid while training", bool(study.curves), lambda: _curves(study)),
        (
            "pareto",
            "Pareto front of the objectives",
            several and len(study.objectives) < 4 and num_trials > 0,
            lambda: plots.plot_pareto_front(found, target_names=list(study.objectives)),
        ),
    ]
    for name, caption, possible, draw in drawings:
        if possible and (names is None or name in names):
            inches = LANDSCAPE_INCHES if name == "landscape" else SIZE_INCHES
            yield name, caption, _png(draw, inches)


def _optuna_study(study: StudyReport) -> optuna.Study:
    """Make an Optuna study with the same trial numbers; the baseline has no parameters there."""
    searched = [row for row in study.trials if row.usable and not row.baseline]
    names = sorted({name for row in searched for name in row.params})
    distributions = {name: _distribution(name, searched) for name in names}
    found = optuna.create_study(directions=["maximize"] * len(study.objectives))
    for number in range(max(row.number for row in study.trials) + 1):
        row = next((row for row in study.trials if row.number == number), None)
        if row is None or not row.usable:
            found.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
            continue
        params = {} if row.baseline else {n: _drawn(value) for n, value in row.params.items()}
        for name, value in params.items():
            if isinstance(distributions[name], CategoricalDistribution):
                params[name] = str(value)  # a number here, none in another trial
        found.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions={name: distributions[name] for name in params},
                values=list(row.values),
            )
        )
    return found


def _drawn(value: Any) -> float | str:  # noqa: ANN401 - of a job file
    """A parameter as the figures show it: a number, or a category's name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return str(value)


def _distribution(name: str, rows: list[TrialRow]) -> BaseDistribution:
    values = [_drawn(row.params[name]) for row in rows if name in row.params]
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high / low > LOG_SPREAD)


def _varied(found: optuna.Study) -> list[str]:
    """The parameters that differ between trials."""
    values = defaultdict(set)
    for trial in found.trials:
        for name, value in trial.params.items():
            values[name].add(value)
    return sorted(name for name, different in values.items() if len(different) > 1)


def _curves(study: StudyReport) -> None:
    for name, points in study.curves.items():
        plt.plot([step for step, _ in points], [value for _, value in points], "o-", label=name)
    plt.xlabel("steps")
    plt.ylabel(" and ".join(study.objectives))
    plt.legend()


def _png(draw: Callable[[], Any], inches: tuple[float, float]) -> bytes:
    with warnings.catch_warnings(), plt.style.context("ggplot"):
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)
        plt.close("all")
        plt.rcParams["figure.figsize"] = inches  # Optuna opens the figure itself
        draw()
        figure: Figure = plt.gcf()
        content = io.BytesIO()
        figure.savefig(
            content, format="png", dpi=DOTS_PER_INCH, facecolor="white", bbox_inches="tight"
        )
        plt.close("all")
    return content.getvalue()
