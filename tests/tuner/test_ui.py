"""What a browser shows of a job: the MLflow UI that `pwiser ui` opens."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from datasets import Dataset
from tuner.cli import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT_S = 120

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    """A job that has run, with its winner registered."""
    directory = tmp_path_factory.mktemp("shown")
    job = {
        "name": "shown",
        "datasets": [tiny_dataset.uri],
        "models": ["dnn"],
        "search": {"sampler": "random", "pruner": "none", "trials": 3, "replicates": 2},
        "training": {"epochs": 2, "batch_size": 256},
        "model": {"embedding_dim": 2, "hidden_units": [4]},
        "resources": {"lanes": 1, "cpus_per_worker": 1},
        "storage": str(directory),
    }
    (directory / "job.yaml").write_text(yaml.safe_dump(job))
    register = ["register", "shown", "--dataset", "tiny", "--force"]
    tracking = ["--tracking", f"sqlite:///{directory / 'mlflow.db'}"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for arguments in (["tune", str(directory / "job.yaml")], [*register, *tracking]):
            monkeypatch.setattr(sys, "argv", ["pwiser", *arguments])
            assert run() == 0
    return directory


@pytest.fixture(scope="module")
def url(storage: Path) -> Iterator[str]:
    """Serve the UI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracking = f"sqlite:///{storage / 'mlflow.db'}"
    command = [sys.executable, "-m", "tuner", "ui", "--tracking", tracking, "--port", str(port)]
    with (storage / "ui.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                said = (storage / "ui.log").read_text()
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT_S * 1000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def runs(storage: Path) -> dict[str, Any]:
    """The ids of the experiment and of a run of each kind."""
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shown")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    kinds = {run.data.tags["pwiser.kind"]: run.info.run_id for run in found}
    columns = {name for run in found for name in (*run.data.metrics, *run.data.params)}
    return {"experiment": experiment.experiment_id, **kinds, "columns": columns}


def test_the_table_has_fewer_than_thirty_columns(runs: dict[str, Any]) -> None:
    assert len(runs["columns"]) < 30


def test_the_list_of_experiments_names_the_job(page: Any, url: str) -> None:
    page.goto(f"{url}/#/experiments")
    page.get_by_text("shown", exact=True).first.wait_for()


def test_the_experiment_shows_its_study_and_what_came_out(
    page: Any, url: str, runs: dict[str, Any]
) -> None:
    page.goto(f"{url}/#/experiments/{runs['experiment']}/runs")
    page.get_by_text("tiny/dnn", exact=True).first.wait_for()
    page.get_by_text("tiny: dnn, baseline (BCE) against winner").first.wait_for()


def test_a_study_shows_its_verdict_and_its_trials(
    page: Any, url: str, runs: dict[str, Any]
) -> None:
    page.goto(f"{url}/#/experiments/{runs['experiment']}/runs/{runs['study']}")
    page.get_by_text("evidence/difference").first.wait_for()
    page.get_by_text("tiny/dnn baseline", exact=True).first.wait_for()  # a child run


def test_a_trial_has_charts_of_its_metrics(page: Any, url: str, runs: dict[str, Any]) -> None:
    page.goto(f"{url}/#/experiments/{runs['experiment']}/runs/{runs['trial']}/model-metrics")
    for metric in ("ctr_auc", "ctcvr_auc", "objective"):
        page.get_by_text(metric, exact=True).first.wait_for()


def test_the_registered_model_has_its_champion(page: Any, url: str) -> None:
    page.goto(f"{url}/#/models/pwiser-tiny")
    page.get_by_text("Version 1").first.wait_for()
    page.get_by_text("champion").first.wait_for()
