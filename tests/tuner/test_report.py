"""The report of a job whose trials are logged as a run of it would log them."""

import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from datasets import Dataset
from tuner.cli import run
from tuner.description import describe_job, is_described
from tuner.errors import JobNotFoundError
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report, Seconds
from tuner.outbox import Outbox
from tuner.records import RecordWriter
from tuner.replicates import plan_replicates
from tuner.report import (
    JobReport,
    html_page,
    json_page,
    markdown_page,
    read_report,
    study_figures,
)
from tuner.results import find_experiment
from tuner.search import StudySearch
from tuner.study import Study, TrialState
from tuner.tracking import Tracker, connect

NUM_TRIALS = 7
JOB_FILE = "name: shown  # <b>by hand</b>\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def metrics(value: float) -> dict[str, float | None]:
    names = ("ctr_auc", "ctcvr_auc", "cvr_auc")
    return dict.fromkeys(names, value) | {"ctr_logloss": 0.3, "ctcvr_logloss": 0.1}


def make_job(dataset: Dataset, name: str, **search: Any) -> Job:
    settings = {"sampler": "random", "pruner": "none", "trials": NUM_TRIALS} | search
    content = {"name": name, "datasets": [dataset.uri], "models": ["mmoe", "dnn"]}
    return Job.model_validate(content | {"search": settings})


def log_job(
    client: MlflowClient,
    directory: Path,
    dataset: Dataset,
    job: Job,
    diverging: Collection[int] = (),
) -> None:
    """Log a job whose trials get better by number; the last fails, and the one before is pruned.

    Of its winners' replicates two seeds are there, and `diverging`, which fail with PWiseR.
    """
    experiment_id = client.create_experiment(
        job.name, artifact_location=str(directory), tags={"pwiser.job": job.name}
    )
    writer = RecordWriter(client, experiment_id, Outbox(directory / "outbox.db"))
    tracker = Tracker(writer, job, "/s")
    searches = [
        StudySearch(Study(dataset=dataset.name, dataset_uri=dataset.uri, model=model), job)
        for model in job.models
    ]
    for search in searches:
        tracker.start_study(search, dataset, JOB_FILE, num_lanes=2)
    found = JobSearch(searches, [tracker])
    while (trial := found.next_trial()) is not None:
        for index in (1, 2):
            seconds = Seconds(training=90.0 * index, lane=100.0 * index)
            last = index == 2 and trial.number < NUM_TRIALS - 1
            value = 0.5 + 0.03 * trial.number + 0.05 * index
            report = Report(
                index=index,
                last=last,
                step=10 * index,
                epoch=index,
                metrics=metrics(value),
                seconds=seconds,
            )
            if last:
                found.ended(trial, report)
            else:
                found.evaluated(trial, report)
        if trial.number == NUM_TRIALS - 1:
            found.ended(trial, Ended(kind="failed", reason="loss <nan>"))
    found.close()
    num_seeds = 2 + len(diverging) if job.search.replicates else 0
    for replicate in plan_replicates(searches, num_seeds):
        tracker.replicate_started(replicate)
        if replicate.seed in diverging and not replicate.plain:
            replicate.state, replicate.failure = TrialState.FAILED, "loss <nan>"
            tracker.replicate_ended(replicate)
            continue
        value = 0.6 + (0.0 if replicate.plain else 0.05) + 0.02 * replicate.seed
        one_head = {"ctcvr_logloss": None} if replicate.study.model == "dnn" else {}
        replicate.test_metrics = metrics(value) | one_head
        replicate.state = TrialState.COMPLETE
        tracker.replicate_ended(replicate)
    tracker.close()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> str:
    directory = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    client = connect(uri)
    log_job(client, directory / "shown", tiny_dataset, make_job(tiny_dataset, "shown"))
    pareto = make_job(
        tiny_dataset,
        "pareto",
        objective=["ctr_auc", "ctcvr_auc"],
        replicates=0,
        space={
            "loss.alpha": {"low": 0.001, "high": 1.0, "log": True},
            "model.expert_units": {"values": [[8], [8, 4]]},
        },
    )
    log_job(client, directory / "pareto", tiny_dataset, pareto)
    diverged = make_job(tiny_dataset, "diverged")
    log_job(client, directory / "diverged", tiny_dataset, diverged, diverging=(3, 4, 5))
    client.create_experiment("empty", tags={"pwiser.job": "empty"})
    return uri


@pytest.fixture(scope="module")
def shown(tracking: str) -> JobReport:
    client = connect(tracking)
    return read_report(client, find_experiment(client, "shown"))


def test_a_report_counts_what_was_run(shown: JobReport) -> None:
    assert [study.name for study in shown.studies] == ["tiny/mmoe", "tiny/dnn"]
    for study in shown.studies:
        assert [trial.number for trial in study.trials] == list(range(NUM_TRIALS))
        assert study.states == {"complete": NUM_TRIALS - 1, "failed": 1}
        assert study.winner == NUM_TRIALS - 2  # the failed one was better
        assert study.trials[-1].failure == "loss <nan>"
        assert study.hours == pytest.approx(NUM_TRIALS * 200 / 3600)
        assert study.curves["BCE"] == ((10, pytest.approx(0.55)), (20, pytest.approx(0.6)))
        assert study.curves["winner"][-1] == (20, pytest.approx(0.75))
    assert shown.lane_hours == pytest.approx(2 * NUM_TRIALS * 200 / 3600)
    assert shown.num_trials == 2 * NUM_TRIALS
    assert shown.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert shown.job_file == JOB_FILE


def test_json_holds_all_of_it(shown: JobReport) -> None:
    assert JobReport.model_validate_json(json_page(shown)) == shown


def test_markdown_says_verdict_and_table(shown: JobReport) -> None:
    page = markdown_page(shown)
    assert "- **tiny/mmoe: better**. mean_auc on test\n  +0.0500, 95% interval +0.0500" in page
    assert "| mmoe | 63.00 ± 1.41 | **68.00 ± 1.41** (+5.00 [+5.00, +5.00]) |" in page
    assert "### tiny, STL: one head" in page
    assert "| 0 (BCE) | complete | 0.6000 | alpha 0 |" in page
    assert page.rstrip().endswith("```yaml\nname: shown  # <b>by hand</b>\n```")


def test_html_is_one_file_that_needs_nothing_else(shown: JobReport) -> None:
    page = html_page(shown)
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", page) == []
    assert "<script" not in page
    assert "name: shown  # &lt;b&gt;by hand&lt;/b&gt;" in page  # nobody's text becomes markup
    assert "loss &lt;nan&gt;" in page
    for caption in ("best so far", "fANOVA", "Parallel", "pairs of alpha, m1", "while training"):
        assert page.count(f"{caption}") >= 2 * 2, caption  # of each study, with its description
    assert "Pareto" not in page


def test_a_pareto_study_shows_its_front_and_no_verdict_without_replicates(tracking: str) -> None:
    client = connect(tracking)
    report = read_report(client, find_experiment(client, "pareto"))
    assert report.studies[0].objectives == ("ctr_auc", "ctcvr_auc")
    page = html_page(report)
    assert page.count("<figcaption>Pareto front of the objectives</figcaption>") == 2
    assert "no evidence" in page


def test_a_winner_that_diverged_with_some_seeds_is_shown_with_them(tracking: str) -> None:
    client = connect(tracking)
    report = read_report(client, find_experiment(client, "diverged"))
    evidence = report.studies[0].evidence
    assert evidence is not None
    assert (evidence.seeds, evidence.failed_winners) == ((1, 2), (3, 4, 5))
    assert evidence.failed_baselines == ()
    assert evidence.objective.low > 0
    assert evidence.verdict == "no difference shown"
    line = "failed with PWiseR: seeds 3, 4, 5 (a winner that fails is not called better)"
    assert line in markdown_page(report)
    assert line in html_page(report)


def test_a_report_does_without_a_job_file_that_the_store_never_got(
    tmp_path: Path, tiny_dataset: Dataset
) -> None:
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    log_job(client, tmp_path / "bare", tiny_dataset, make_job(tiny_dataset, "bare"))
    for found in (tmp_path / "bare").rglob("job.yaml"):
        found.unlink()
    report = read_report(client, find_experiment(client, "bare"))
    assert report.num_trials == 2 * NUM_TRIALS
    assert report.job_file.startswith("# job 'bare': its job file is not in the tracking store")
    assert report.job_file in markdown_page(report)


def test_figures_take_a_setting_that_is_a_number_here_and_none_there(shown: JobReport) -> None:
    study = shown.studies[0]
    trials = tuple(
        row.model_copy(update={"params": row.params | {"model.clip": clip}})
        for row, clip in zip(study.trials, [None, 1.0, 5.0] * 3, strict=False)
    )
    figures = study_figures(study.model_copy(update={"trials": trials}), ("history", "landscape"))
    assert all(png.startswith(b"\x89PNG") for _, _, png in figures)


def test_a_job_without_trials_is_told_so(tracking: str) -> None:
    client = connect(tracking)
    with pytest.raises(JobNotFoundError, match="job 'empty': has no trial yet"):
        read_report(client, find_experiment(client, "empty"))


def test_a_job_that_was_renamed_while_it_ran_is_described_where_it_is(
    tmp_path: Path, tiny_dataset: Dataset
) -> None:
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    log_job(client, tmp_path / "bare", tiny_dataset, make_job(tiny_dataset, "bare"))
    experiment = find_experiment(client, "bare")
    client.rename_experiment(experiment.experiment_id, "renamed")
    taken = client.create_experiment("bare", tags={"pwiser.job": "bare"})
    describe_job(client, experiment, Console())
    assert is_described(client.get_experiment(experiment.experiment_id))
    assert not is_described(client.get_experiment(taken))


@pytest.fixture
def pwiser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tracking: str) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pwiser", "report", *arguments, "--tracking", tracking])
        return run()

    yield call


def test_the_command_writes_a_file_or_prints(
    pwiser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pwiser("shown", "--out", "page.html") == 0
    assert capsys.readouterr().out == "page.html: the report of shown\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert pwiser("shown", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["job"] == "shown"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shown",), "a page of HTML needs a file"),
        (("shown", "--out", "gone/page.html"), "--out gone/page.html: cannot be written"),
        (("other", "--out", "page.html"), "job 'other': not in the tracking store"),
        (("shown", "--format", "pdf"), "'pdf' is not one of"),
    ],
)
def test_a_fault_is_told_and_nothing_is_written(
    pwiser: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert pwiser(*arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_is_whole_in_a_browser(
    shown: JobReport, tmp_path: Path, width: int, scheme: str
) -> None:
    from playwright.sync_api import sync_playwright

    page_file = tmp_path / "page.html"
    page_file.write_text(html_page(shown))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(page_file.as_uri())
        images = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        sizes = page.evaluate(
            "[...document.querySelectorAll('td')]"
            ".map(cell => parseFloat(getComputedStyle(cell).fontSize))"
        )
        browser.close()
    assert [url for url in said if not url.startswith(("file:", "data:"))] == []
    assert len(images) == 10
    assert min(images) > 0
    assert wide <= width  # only the tables scroll
    assert min(sizes) >= 14
