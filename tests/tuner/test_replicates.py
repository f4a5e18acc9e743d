"""Which replicates there are; `test_tuning.py` runs them."""

import subprocess
import sys
from typing import Any

import pytest

from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report
from tuner.replicates import plan_replicates
from tuner.search import StudySearch
from tuner.study import Study

RATES = {"training.learning_rate": {"values": [3e-3, 1e-2]}}
SPACE = {"loss.alpha": {"low": 0.1, "high": 1.0}, **RATES}


def searched(
    *values: float | None,
    seed: int = 0,
    models: tuple[str, ...] = ("dnn",),
    space: dict[str, Any] = SPACE,
) -> JobSearch:
    """Search every model with trials of these scores; None for a trial that fails."""
    job = Job.model_validate(
        {
            "name": "job",
            "datasets": ["us"],
            "models": models,
            "search": {
                "trials": len(values),
                "sampler": "random",
                "pruner": "none",
                "space": space,
            },
            "training": {"seed": seed},
        }
    )
    search = JobSearch(
        [StudySearch(Study(dataset="us", dataset_uri="/us", model=model), job) for model in models]
    )
    for value in values * len(models):
        trial = search.next_trial()
        assert trial is not None
        if value is None:
            search.ended(trial, Ended(kind="failed", reason="no"))
        else:
            metrics = {"ctr_auc": value, "ctcvr_auc": value}
            report = Report(index=1, last=True, step=1, epoch=1, metrics=metrics)
            search.ended(trial, report)
    return search


def test_winners_are_repeated_with_the_same_seeds_in_pairs_that_differ_in_alpha_alone() -> None:
    search = searched(0.6, 0.7, 0.9, seed=10, models=("dnn", "mmoe"))
    found = plan_replicates(search.searches, 2)
    assert [replicate.id for replicate in found] == [
        f"us/{model}/2/{loss}seed-{seed}"
        for model in ("dnn", "mmoe")
        for seed in (11, 12)
        for loss in ("plain/", "")
    ]
    assert len({replicate.directory for replicate in found}) == len(found)
    for replicate in found:
        repeated = f"{replicate.study.name}/{replicate.number}"
        trial = next(trial for trial in search.trials if trial.id == repeated)
        assert trial.configuration.loss.alpha > 0
        assert trial.params["training.learning_rate"] != 1e-3  # the job file's own, the baseline's
        changes = {"training.seed": replicate.seed} | (
            {"loss.alpha": 0.0} if replicate.plain else {}
        )
        assert replicate.configuration == trial.configuration.replace(changes)
        assert (replicate.params, replicate.best) == (trial.params, None)


@pytest.mark.parametrize(
    ("values", "number"),
    [((0.9, 0.7, 0.6), 0), ((0.6, 0.7, 0.9), 2)],
    ids=["the baseline", "a later trial that drew alpha 0"],
)
def test_a_winner_with_plain_bce_has_nothing_beside_it(
    values: tuple[float, ...], number: int
) -> None:
    space = {"loss.alpha": {"values": [0.0]}, **RATES}
    found = plan_replicates(searched(*values, space=space).searches, 3)
    assert [(replicate.number, replicate.plain) for replicate in found] == [(number, False)] * 3


@pytest.mark.parametrize(
    ("values", "num_seeds"), [((None, None), 5), ((0.6, 0.7), 0)], ids=["no winner", "no seeds"]
)
def test_there_may_be_none(values: tuple[float | None, ...], num_seeds: int) -> None:
    assert plan_replicates(searched(*values).searches, num_seeds) == []


def test_what_reads_records_does_not_wait_for_ray() -> None:
    program = "import sys, tuner.tracking, tuner.results; print('ray' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert found.stdout == "False\n", found.stderr
