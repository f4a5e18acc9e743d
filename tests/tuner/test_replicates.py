"""Which replicates there are; `test_tuning.py` runs them."""

import subprocess
import sys

import pytest

from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report
from tuner.replicates import plan_replicates
from tuner.search import StudySearch
from tuner.study import Study


def searched(*values: float | None, seed: int = 0, models: tuple[str, ...] = ("dnn",)) -> JobSearch:
    """Search every model with trials of these scores; None for a trial that fails."""
    job = Job.model_validate(
        {
            "name": "job",
            "datasets": ["us"],
            "models": models,
            "search": {"trials": len(values), "sampler": "random", "pruner": "none"},
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


def test_winner_and_baseline_are_repeated_with_the_same_seeds_in_pairs() -> None:
    search = searched(0.6, 0.7, 0.9, seed=10, models=("dnn", "mmoe"))
    found = plan_replicates(search.searches, 2)
    assert [replicate.id for replicate in found] == [
        f"us/{model}/{number}/seed-{seed}"
        for model in ("dnn", "mmoe")
        for seed in (11, 12)
        for number in (0, 2)
    ]
    assert len({replicate.directory for replicate in found}) == len(found)
    for replicate in found:
        repeated = f"{replicate.study.name}/{replicate.number}"
        trial = next(trial for trial in search.trials if trial.id == repeated)
        seeded = trial.configuration.replace({"training.seed": replicate.seed})
        assert replicate.configuration == seeded
        assert (replicate.params, replicate.best) == (trial.params, None)


def test_a_baseline_that_wins_has_nothing_beside_it() -> None:
    found = plan_replicates(searched(0.9, 0.7).searches, 3)
    assert [replicate.number for replicate in found] == [0, 0, 0]


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
