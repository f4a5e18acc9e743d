import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datasets import Dataset
from tuner.cli import run
from tuner.job import Job
from tuner.plan import Plan
from tuner.planning import plan_job

pytestmark = pytest.mark.slow

SMALL = {
    "models": ["dnn"],
    "search": {"trials": 3, "pruner": "none"},
    "training": {"epochs": 2, "batch_size": 256},
    "model": {"embedding_dim": 4, "hidden_units": [8]},
    "resources": {"lanes": 1, "cpus_per_worker": 1},
}


@pytest.fixture(autouse=True)
def this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWISER_ADDRESS", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def settings(dataset: Dataset, directory: Path, **content: Any) -> dict[str, Any]:
    own = {"name": "us", "datasets": [dataset.uri], "storage": str(directory / "storage")}
    return SMALL | own | content


def write(directory: Path, content: dict[str, Any]) -> Path:
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def pwiser(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pwiser", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    return run()


def test_a_job_is_measured_on_this_machine(tiny_dataset: Dataset, tmp_path: Path) -> None:
    found = plan_job(Job.model_validate(settings(tiny_dataset, tmp_path)))
    assert (found.job, found.trials, found.obstacles) == ("us", 3, ())
    (study,) = found.studies
    assert study.parameters > 0
    assert study.impressions_per_s > 0
    assert study.trial_s > 0
    assert found.lanes is not None
    assert found.lanes.memory_bytes > 50 * 1024**2
    assert found.hours > 0
    assert re.fullmatch(r"CPU, 1 threads", found.measured_on)
    assert list((tmp_path / "storage").iterdir()) == []


def test_a_plan_is_printed(
    tiny_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "model_of_a_plan.py").write_text(
        "from trainables.models import DNN\nclass Mine(DNN):\n    pass\n"
    )
    content = settings(tiny_dataset, tmp_path, models=["model_of_a_plan:Mine"])
    job = write(tmp_path, content)
    assert pwiser(monkeypatch, "plan", job, "--working-dir", tmp_path / "modules") == 0
    out = capsys.readouterr().out
    assert "tiny/model_of_a_plan:Mine" in out
    assert "1 lanes of 1 workers; each worker 1 CPUs, 0 GPUs, " in out
    assert "1 studies, 3 trials, about 0.01 hours (measured on CPU, 1 threads)\n" in out
    assert out.endswith("nothing stands in the way\n")


def test_what_stands_in_the_way_is_told_with_exit_code_2(
    tiny_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "storage").write_text("in the way")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    content = settings(tiny_dataset, tmp_path, resources={"lanes": 3, "gpus_per_worker": 0})
    job = write(tmp_path, content)
    assert pwiser(monkeypatch, "plan", job, "--json") == 2
    content = json.loads(capsys.readouterr().out)
    found = Plan.model_validate(content)
    assert found.lanes is None
    storage, lanes = found.obstacles
    assert storage.startswith(f"storage {tmp_path / 'storage'} cannot be written and read back (")
    assert lanes == (
        "resources: 3 lane(s) of 1 worker(s) need 3 CPUs and 0 GPUs, the cluster has 2 and 0; "
        "set resources.lanes to 2 or less"
    )
    assert found.studies[0].trials == 3


def test_a_model_that_cannot_be_trained_is_an_obstacle(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model.py").write_text(
        "from trainables.models import DNN\n"
        "class Broken(DNN):\n"
        "    def forward(self, ids, numericals):\n"
        "        raise RuntimeError('no such layer')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    content = settings(tiny_dataset, tmp_path, models=["broken_model:Broken"])
    found = plan_job(Job.model_validate(content))
    assert found.obstacles == (
        "tiny/broken_model:Broken: the probe failed (RuntimeError: no such layer)",
    )
    assert (found.studies, found.lanes) == ((), None)


@pytest.mark.parametrize(
    ("training", "workers", "reason"),
    [
        ({"cuda_graph": "on"}, 1, "training.cuda_graph: on needs a GPU, one worker per lane"),
        ({"compile": True}, 1, "training.compile: true needs a C++ compiler on the lane's node"),
        ({"compile": True}, 2, "training.compile: true needs one worker per lane"),
        ({"cuda_graph": "on"}, 2, "training.cuda_graph: on needs one worker per lane"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_training_that_the_lanes_cannot_do_is_an_obstacle(
    tiny_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    workers: int,
    reason: str,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    resources = {"lanes": 1, "workers_per_lane": workers}
    content = settings(tiny_dataset, tmp_path, training=training, resources=resources)
    found = plan_job(Job.model_validate(content))
    assert any(reason in obstacle for obstacle in found.obstacles), found.obstacles


@pytest.mark.parametrize("name", ["PWISER_ADDRESS", "RAY_ADDRESS"])
def test_a_plan_is_asked_for_where_a_cluster_is_named(
    tiny_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and does not listen
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv(name, address)
        job = write(tmp_path, settings(tiny_dataset, tmp_path))
        assert pwiser(monkeypatch, "plan", job) == 2
    assert capsys.readouterr().err == (
        f"pwiser: --address {address}: the cluster does not answer as it should (Failed to connect "
        f"to Ray at address: {address}.); is this the address of its Ray dashboard?\n"
    )
