import io

import pytest
from rich.console import Console, RenderableType

from tuner.evidence import weigh
from tuner.job import Job
from tuner.messages import Report, Seconds
from tuner.results import BaselineResult, DatasetResult, JobResult
from tuner.search import StudySearch
from tuner.study import Study
from tuner.tables import evidence_tables, results_markdown, results_tables, time_table

WIDTH = 80


def metrics(ctr_auc: float, cvr_auc: float | None) -> dict[str, float | None]:
    return {
        "ctr_auc": ctr_auc,
        "ctr_logloss": 0.3,
        "ctcvr_auc": 0.8,
        "ctcvr_logloss": 0.1,
        "cvr_auc": cvr_auc,
    }


@pytest.fixture
def results() -> JobResult:
    def result(model: str) -> DatasetResult:
        return DatasetResult(
            model=model,
            config={"model": {}, "training": {}, "loss": {"alpha": 0.01234, "m1": 0.3, "m2": 0.1}},
            metrics={"valid": metrics(0.71234, 0.6), "test": metrics(0.7, None)},
            baseline=BaselineResult(
                metrics={"valid": metrics(0.5, 0.55), "test": metrics(0.4, 0.45)}
            ),
            checkpoint="/storage",
            run_id="1",
        )

    return JobResult(job="job", datasets={"us": result("mmoe"), "fr": result("dnn")})


def test_the_evidence_stands_per_study_with_its_verdict(results: JobResult) -> None:
    better = weigh(
        model="mmoe",
        winner=2,
        loss={"alpha": 0.1, "m1": 0.3, "m2": 0.1, "gate": "hinge"},
        objectives=("ctr_auc",),
        baselines={1: metrics(0.70, 0.6), 2: metrics(0.72, 0.6)},
        winners={1: metrics(0.80, 0.6), 2: metrics(0.82, 0.6)},
    )
    assert better is not None
    same = better.model_copy(
        update={"loss": better.loss | {"alpha": 0.0}, "verdict": "no difference shown"}
    )
    us = results.datasets["us"].model_copy(update={"evidence": {"mmoe": better, "dnn": same}})
    found = JobResult(job="job", datasets={"us": us, "fr": results.datasets["fr"]})
    (table,) = (shown(table) for table in evidence_tables(found))
    assert table[0].startswith("us: test over 2 fresh seeds")
    rows = [cells(line) for line in table[2:] if "±" in line]
    assert rows[:3] == [
        ["mmoe", "BCE", "0.7100±0.0141", "0.8000±0.0000", "0.7100±0.0141"],
        ["mmoe", "PWiseR", "0.8100±0.0141", "0.8000±0.0000", "0.8100±0.0141"],
        ["better", "difference", "+0.1000±0.0000", "+0.0000±0.0000", "+0.1000±0.0000"],
    ]
    assert rows[4][:4] == ["dnn", "BCE", "(won)", "0.8100±0.0141"]
    markdown = results_markdown(found)
    assert "| better | difference | +0.1000±0.0000 | +0.0000±0.0000 | +0.1000±0.0000 |" in markdown


def test_replicates_that_failed_stand_below_the_evidence(results: JobResult) -> None:
    found = weigh(
        model="mmoe",
        winner=2,
        loss={"alpha": 0.1, "m1": 0.3, "m2": 0.1, "gate": "hinge"},
        objectives=("ctr_auc",),
        baselines={seed: metrics(0.70, 0.6) for seed in range(1, 5)},
        winners={1: metrics(0.80, 0.6), 2: metrics(0.82, 0.6)},
        failed_winners=(3, 4),
    )
    assert found is not None
    us = results.datasets["us"].model_copy(update={"evidence": {"mmoe": found}})
    job = JobResult(job="job", datasets={"us": us})
    (table,) = (shown(table) for table in evidence_tables(job))
    line = "mmoe: failed with PWiseR: seeds 3, 4 (a winner that fails is not called better)"
    assert line in " ".join(table)
    assert line in results_markdown(job).splitlines()


def shown(table: RenderableType) -> list[str]:
    """Give the lines of a table on a narrow terminal, without borders and spaces at the ends."""
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= WIDTH
    return [line.strip() for line in lines]


def cells(line: str) -> list[str]:
    return line.replace("|", " ").split()


def test_the_winner_stands_below_its_baseline_per_split_and_dataset(results: JobResult) -> None:
    us, fr = (shown(table) for table in results_tables(results))
    assert us[0] == "us: mmoe, baseline (BCE) against winner (alpha 0.01234, m1 0.3, m2 0.1)"
    assert fr[0].startswith("fr: dnn, baseline (BCE) against winner")
    rows = [cells(line) for line in us if line.startswith(("valid", "test"))]
    assert rows == [
        ["valid", "baseline", "0.5000", "0.8000", "0.5500", "0.3000", "0.1000"],
        ["valid", "winner", "0.7123", "0.8000", "0.6000", "0.3000", "0.1000"],
        ["test", "baseline", "0.4000", "0.8000", "0.4500", "0.3000", "0.1000"],
        ["test", "winner", "0.7000", "0.8000", "-", "0.3000", "0.1000"],
    ]


def test_markdown_has_the_same_rows(results: JobResult) -> None:
    lines = results_markdown(results).splitlines()
    assert lines[0] == "**us: mmoe, baseline (BCE) against winner (alpha 0.01234, m1 0.3, m2 0.1)**"
    assert lines[2] == (
        "| split | trial | CTR AUC | CTCVR AUC | CVR AUC | CTR logloss | CTCVR logloss |"
    )
    assert lines[3] == "|---|---|---:|---:|---:|---:|---:|"
    assert lines[7] == "| test | winner | 0.7000 | 0.8000 | - | 0.3000 | 0.1000 |"
    assert sum(line.startswith("**") for line in lines) == 2


def test_the_time_table_says_what_was_overhead() -> None:
    job = Job.model_validate({"name": "job", "datasets": ["us"], "models": ["mmoe", "dnn"]})
    mmoe, dnn = (
        StudySearch(Study(dataset="us", dataset_uri="/us", model=model), job)
        for model in job.models
    )
    for _ in range(2):
        trial = mmoe.ask()
        assert trial is not None
        seconds = Seconds(setup=1.0, training=6.0, evaluation=2.0, lane=10.0)
        trial.record(
            Report(
                index=1,
                last=True,
                step=1,
                epoch=1,
                metrics={"ctr_auc": 0.5, "ctcvr_auc": 0.5},
                seconds=seconds,
            )
        )
    lines = shown(time_table([mmoe, dnn]))
    rows = [cells(line) for line in lines if line.startswith("us/")]
    assert lines[0] == "lane time in seconds"
    assert rows == [
        ["us/mmoe", "2", "2.0", "12.0", "4.0", "2.0", "(10%)", "1.00"],
        ["us/dnn", "0", "0.0", "0.0", "0.0", "0.0", "(0%)", "0.00"],
    ]
