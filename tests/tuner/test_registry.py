"""The registry of a real store, and a registered model behind a real server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from torch import nn

from datasets import Dataset, open_dataset, prepare_table
from trainables import TrialConfiguration, inputs_of, load
from trainables.checkpoint import save_checkpoint
from trainables.configuration import build_model
from tuner.errors import EvidenceError, JobNotFoundError
from tuner.evidence import Evidence, weigh
from tuner.export import ENCODER_DIRECTORY, export_winner, save_encoder
from tuner.registry import CHAMPION, PREVIOUS, register_winner
from tuner.results import BaselineResult, DatasetResult, JobResult
from tuner.tracking import connect

pytestmark = pytest.mark.slow

NUM_ROWS = 1_000
SERVER_TIMEOUT_S = 120.0
SCHEMA = """
labels: {click: click, conversion: conversion}
categorical: {item: {}, color: {min_count: 2}, topics: {max_values: 3}}
numerical: {price: {fill: 0}, age: {normalize: log}}
split: {valid: 0.2, test: 0.2}
"""


def raw_rows(num_rows: int) -> pd.DataFrame:
    """Rows with missing categories and prices."""
    rng = np.random.default_rng(0)
    click = rng.random(num_rows) < 0.4
    rows = pd.DataFrame(
        {
            "item": rng.integers(40, size=num_rows),
            "color": rng.choice(["red", "blue", "green"], num_rows).astype(object),
            "topics": [
                " ".join(rng.choice(["a", "b", "c"], n)) for n in rng.integers(4, size=num_rows)
            ],
            "price": rng.normal(size=num_rows).round(3),
            "age": rng.gamma(3, 10, num_rows).round(1),
            "click": click.astype(int),
            "conversion": (click & (rng.random(num_rows) < 0.3)).astype(int),
        }
    )
    rows.loc[::7, "color"] = None
    rows.loc[::5, "price"] = np.nan
    return rows


ENDED_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Finished:
    """A job that has ended: its store, its results, and rows that its model never saw."""

    client: MlflowClient
    results: JobResult
    rows: pd.DataFrame

    def with_evidence(self, *gains: float, failed: tuple[int, ...] = ()) -> JobResult:
        evidence = weigh(
            model="mmoe",
            winner=1,
            loss={"alpha": 0.3, "m1": 0.3, "m2": 0.1, "gate": "hinge"},
            objectives=("mean_auc",),
            baselines={seed: {"ctr_auc": 0.7, "ctcvr_auc": 0.8} for seed in range(len(gains))},
            winners={
                seed: {"ctr_auc": 0.7 + gain, "ctcvr_auc": 0.8} for seed, gain in enumerate(gains)
            },
            failed_winners=failed,
        )
        assert isinstance(evidence, Evidence)
        result = self.results.datasets["shop"].model_copy(update={"evidence": {"mmoe": evidence}})
        return JobResult(job="job", datasets={"shop": result})


def save_winner(root: Path, dataset: Dataset) -> Path:
    checkpoint = root / "shop" / "mmoe" / "trial-0001"
    checkpoint.mkdir(parents=True)
    settings = {"embedding_dim": 4, "expert_units": [8], "num_experts": 2}
    configuration = TrialConfiguration.create("mmoe", settings)
    inputs = inputs_of(dataset)
    torch.manual_seed(0)
    model = build_model(configuration, inputs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    save_checkpoint(checkpoint, configuration, inputs, model)
    save_encoder(dataset, str(root / "shop" / ENCODER_DIRECTORY))
    return checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("finished")
    (directory / "schema.yaml").write_text(SCHEMA)
    rows = raw_rows(3_000)
    rows.to_csv(directory / "rows.csv", index=False)
    prepare_table(
        input=directory / "rows.csv", schema=directory / "schema.yaml", out=directory / "shop"
    )
    checkpoint = save_winner(directory / "storage", open_dataset(str(directory / "shop")))
    client = connect(f"sqlite:///{directory / 'mlflow.db'}")
    experiment = client.create_experiment("job", artifact_location=str(directory / "artifacts"))
    run = client.create_run(experiment)
    client.set_terminated(run.info.run_id, "KILLED", ENDED_MS)  # pruned
    result = DatasetResult(
        model="mmoe",
        config={},
        metrics={},
        baseline=BaselineResult(metrics={}),
        checkpoint=str(checkpoint),
        run_id=run.info.run_id,
    )
    given = rows[:NUM_ROWS].drop(columns=["click", "conversion"])
    given.loc[::11, "item"] = 4711  # unseen
    return Finished(client, JobResult(job="job", datasets={"shop": result}), given)


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ((), "job 'job': nothing shows whether the winner of shop is better than BCE"),
        ((0.1, -0.1), r"over 2 seeds: no difference shown \(\+0\.0000, 95% interval "),
        ((-0.01, -0.01), "over 2 seeds: worse"),
    ],
)
def test_a_winner_that_is_not_shown_to_be_better_is_refused(
    finished: Finished, gains: tuple[float, ...], message: str
) -> None:
    results = finished.with_evidence(*gains) if gains else finished.results
    with pytest.raises(EvidenceError, match=message) as caught:
        register_winner(finished.client, results, "shop")
    assert "--force" in str(caught.value)
    with pytest.raises(JobNotFoundError, match="no such dataset"):
        register_winner(finished.client, results, "other")


def test_a_winner_that_failed_with_fresh_seeds_is_refused(finished: Finished) -> None:
    results = finished.with_evidence(0.01, 0.01, failed=(2, 3, 4))
    with pytest.raises(EvidenceError, match=r"no difference shown .* PWiseR: seeds 2, 3, 4 "):
        register_winner(finished.client, results, "shop")


@pytest.fixture(scope="module")
def champion(finished: Finished) -> str:
    """Register three winners; give the URI of the champion."""
    with pytest.raises(MlflowException):
        finished.client.get_registered_model("pwiser-shop")  # what was refused left nothing
    before = os.environ.get("MLFLOW_TRACKING_URI")
    first = register_winner(finished.client, finished.with_evidence(0.01, 0.01), "shop")
    register_winner(finished.client, finished.results, "shop", force=True)
    last = register_winner(finished.client, finished.with_evidence(0.02, 0.02), "shop")
    assert (first, last) == (1, 3)
    assert os.environ.get("MLFLOW_TRACKING_URI") == before
    return f"models:/pwiser-shop@{CHAMPION}"


def test_the_winners_run_ended_when_it_ended(finished: Finished, champion: str) -> None:
    run_id = finished.results.datasets["shop"].run_id
    info = finished.client.get_run(run_id).info
    assert (info.status, info.end_time) == ("KILLED", ENDED_MS)


def test_the_champion_before_stays_as_the_previous(finished: Finished, champion: str) -> None:
    found = {
        alias: finished.client.get_model_version_by_alias("pwiser-shop", alias)
        for alias in (CHAMPION, PREVIOUS)
    }
    assert {alias: int(version.version) for alias, version in found.items()} == {
        CHAMPION: 3,
        PREVIOUS: 2,
    }
    assert found[CHAMPION].tags == {
        "pwiser.job": "job",
        "pwiser.model": "mmoe",
        "pwiser.verdict": "better",
    }
    assert "pwiser.verdict" not in found[PREVIOUS].tags


@pytest.fixture
def server(finished: Finished, champion: str, tmp_path: Path) -> Iterator[str]:
    """Serve the champion from another directory, with nothing of this repository on the path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", champion]
    command += ["--env-manager", "local", "--port", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": str(finished.client.tracking_uri),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # of uvicorn
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/ping", process, tmp_path / "log")
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        else:
            return


def ask(url: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Score rows by the server."""
    records = json.loads(rows.to_json(orient="records"))
    request = urllib.request.Request(
        f"{url}/invocations",
        json.dumps({"dataframe_records": records}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return pd.DataFrame(json.load(answer)["predictions"])


def test_all_forms_of_a_winner_agree_on_raw_rows(
    finished: Finished, server: str, tmp_path: Path
) -> None:
    rows = finished.rows
    exports: dict[str, Path] = {name: tmp_path / name for name in ("safetensors", "pt2", "onnx")}
    programs: dict[str, Any] = {"safetensors": None, "pt2": "pt2", "onnx": "onnx"}
    for name, program in programs.items():
        export_winner(finished.results, "shop", exports[name], program)
    predictor = load(exports["safetensors"])
    expected = predictor.predict(rows)
    assert len(np.unique(expected["pctr"].round(4))) > NUM_ROWS / 4

    ids, numericals = predictor.encoder.encode(rows)
    assert (ids == 0).any()  # unseen and missing
    inputs = ids.astype(np.int64), numericals.astype(np.float32)
    exported = torch.export.load(exports["pt2"] / "model.pt2").module()
    of_pt2 = exported(*map(torch.from_numpy, inputs))
    session = onnxruntime.InferenceSession(exports["onnx"] / "model.onnx")
    of_onnx = session.run(list(expected), dict(zip(("ids", "numericals"), inputs, strict=True)))
    served = ask(server, rows)
    one = ask(server, rows[:1])
    for name, onnx_values in zip(expected, of_onnx, strict=True):
        np.testing.assert_allclose(of_pt2[name].numpy(), expected[name], atol=1e-5)
        np.testing.assert_allclose(onnx_values, expected[name], atol=1e-5)
        np.testing.assert_allclose(served[name], expected[name], atol=1e-5)
        np.testing.assert_allclose(one[name], expected[name][:1], atol=1e-5)
