"""Whole jobs on a real Ray and a real MLflow store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from sklearn.metrics import log_loss, roc_auc_score

from datasets import prepare_table
from datasets.node_cache import CACHE_VARIABLE
from datasets.schema import Schema
from tuner.cli import run
from tuner.cluster import connected
from tuner.tracking import connect

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = {
    "training": {"epochs": 2, "batch_size": 256, "learning_rate": 0.01},
    "model": {"embedding_dim": 4},
    "resources": {"lanes": 1, "cpus_per_worker": 1},
}


@dataclass(frozen=True)
class Workshop:
    """A directory with a prepared dataset, its raw test rows, and the jobs run in it."""

    directory: Path
    test_rows: pd.DataFrame

    def write_job(self, **content: Any) -> Path:
        job = SMALL | {"datasets": [str(self.directory / "shop")]} | content
        job["search"] = {"replicates": 0} | job.get("search", {})
        job.setdefault("storage", str(self.directory / "storage"))
        path = self.directory / f"{job['name']}.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.directory / 'storage' / 'mlflow.db'}"

    def runs(self, job: str, kind: str | None = None) -> list[Run]:
        client = MlflowClient(self.tracking)
        experiment = client.get_experiment_by_name(job)
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id])
        return [run for run in found if kind in {None, run.data.tags["pwiser.kind"]}]

    def trials(self, job: str) -> list[Run]:
        return sorted(
            self.runs(job, "trial"),
            key=lambda r: (r.data.tags["pwiser.model"], int(r.data.tags["pwiser.trial"])),
        )


def make_rows(num_rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    channel = rng.choice(["app", "web", "mail"], num_rows, p=[0.5, 0.3, 0.2])
    age = rng.gamma(4, 10, num_rows).round(1)
    taste = rng.integers(0, 20, num_rows)
    pull = (channel == "app") * 0.8 + np.sin(taste) + (age - 40) / 40
    click = rng.random(num_rows) < 1 / (1 + np.exp(1.5 - pull))
    conversion = click & (rng.random(num_rows) < 1 / (1 + np.exp(1.0 - pull)))
    rows = {"channel": channel, "taste": taste, "age": age}
    return pd.DataFrame(rows | {"visit": click.astype(int), "order": conversion.astype(int)})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    directory = tmp_path_factory.mktemp("workshop")
    rows = make_rows(6_000)
    rows[:4_000].to_csv(directory / "train.csv", index=False)
    rows[4_000:5_000].to_csv(directory / "valid.csv", index=False)
    rows[5_000:].to_csv(directory / "test.csv", index=False)
    schema = Schema.model_validate(
        {
            "labels": {"click": "visit", "conversion": "order"},
            "categorical": {"channel": {}, "taste": {"min_count": 2}},
            "numerical": {"age": {"normalize": "log"}},
        }
    )
    prepare_table(
        input=directory / "train.csv",
        valid=directory / "valid.csv",
        test=directory / "test.csv",
        schema=schema,
        out=str(directory / "shop"),
    )
    return Workshop(directory, rows[5_000:].reset_index(drop=True))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connected():
        yield


def pwiser(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pwiser", *arguments])
    return run()


@pytest.fixture(scope="module")
def shop_job(workshop: Workshop, ray_session: None) -> Workshop:
    job = workshop.write_job(
        name="shop-job",
        models=["mmoe", "dnn"],
        model={"embedding_dim": 4, "expert_units": [8], "hidden_units": [16]},
        search={"trials": 4, "pruner": "asha"},
        training=SMALL["training"] | {"evaluate_every": 0.5},
        resources={"lanes": 2},
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert pwiser(monkeypatch, "tune", str(job)) == 0
    return workshop


def best(workshop: Workshop, job: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        capsys.readouterr()
        assert pwiser(monkeypatch, "best", job, "--tracking", workshop.tracking, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_streamed_job_finds_what_one_in_memory_finds(
    workshop: Workshop, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    aucs = []
    for mode in ("memory", "stream"):
        job = workshop.write_job(
            name=f"shop-{mode}",
            models=["shared_bottom"],
            model={"embedding_dim": 4, "bottom_units": [8]},
            search={"trials": 2, "pruner": "none"},
            training=SMALL["training"] | {"epochs": 4},
            data={"mode": mode, "buffer_mib": 16},
        )
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert pwiser(monkeypatch, "tune", str(job)) == 0
        found = best(workshop, f"shop-{mode}", capsys)["datasets"]["shop"]["metrics"]["test"]
        aucs.append((found["ctr_auc"], found["ctcvr_auc"]))
    assert aucs[1] == pytest.approx(aucs[0], abs=0.03)


def test_every_trial_has_one_run_with_its_end_and_metrics(shop_job: Workshop) -> None:
    trials = shop_job.trials("shop-job")
    assert [run.data.tags["pwiser.trial"] for run in trials] == ["0", "1", "2", "3"] * 2
    for trial in trials:
        state = trial.data.tags["pwiser.state"]
        assert trial.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[state]
        assert trial.data.metrics["best/objective"] > 0.5
        assert trial.data.metrics["time/training_s"] > 0
        assert {"alpha", "m1", "m2"} <= trial.data.params.keys()
        assert trial.inputs.dataset_inputs[0].dataset.name == "shop"


def test_trial_0_is_the_baseline_and_trial_1_the_papers_point(shop_job: Workshop) -> None:
    trials = shop_job.trials("shop-job")
    for baseline, paper in (trials[0:2], trials[4:6]):
        assert baseline.data.tags["pwiser.baseline"] == "true"
        assert float(baseline.data.params["alpha"]) == 0.0
        point = [float(paper.data.params[name]) for name in ("alpha", "m1", "m2")]
        assert point == [0.3, 0.3, 0.1]


def test_studies_end_finished_with_their_time(shop_job: Workshop) -> None:
    studies = [r for r in shop_job.runs("shop-job") if r.data.tags["pwiser.kind"] == "study"]
    assert {study.info.run_name for study in studies} == {"shop/mmoe", "shop/dnn"}
    for study in studies:
        assert study.info.status == "FINISHED"
        assert 0 <= study.data.metrics["time/overhead_share"] < 1


def test_best_is_the_best_validation_evaluation_and_has_test_metrics(
    shop_job: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    found = best(shop_job, "shop-job", capsys)
    assert found["job"] == "shop-job"
    winner = found["datasets"]["shop"]
    keys = {"model", "config", "metrics", "baseline", "checkpoint", "run_id", "evidence"}
    assert set(winner) == keys
    scores = {
        run.info.run_id: run.data.metrics["best/objective"] for run in shop_job.trials("shop-job")
    }
    assert winner["run_id"] == max(scores, key=lambda run_id: scores[run_id])
    for metrics in (winner["metrics"], winner["baseline"]["metrics"]):
        assert set(metrics) == {"valid", "test"}
        assert all(0.5 < metrics[split]["ctr_auc"] < 1 for split in metrics)


def test_only_winners_and_baselines_keep_checkpoints(shop_job: Workshop) -> None:
    weights = list((shop_job.directory / "storage" / "shop-job").rglob("model.safetensors"))
    kept = [
        run.data.tags["pwiser.checkpoint"]
        for run in shop_job.trials("shop-job")
        if "pwiser.checkpoint" in run.data.tags
    ]
    assert sorted(str(path.parent) for path in weights) == sorted(kept)
    assert 2 <= len(kept) <= 4


def test_ray_state_is_gone(shop_job: Workshop) -> None:
    assert not list((shop_job.directory / "storage" / "shop-job").rglob("ray"))


def test_the_export_gives_the_logged_test_metrics_in_a_fresh_process(
    shop_job: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shop_job.directory / "exported"
    arguments = ["shop-job", "--dataset", "shop", "--out", str(out)]
    assert pwiser(monkeypatch, "export", *arguments, "--tracking", shop_job.tracking) == 0
    program = (
        "import json, sys, pandas as pd, trainables\n"
        "rows = pd.read_csv(sys.argv[2])\n"
        "found = trainables.load(sys.argv[1]).predict(rows.drop(columns=['visit', 'order']))\n"
        "print(json.dumps({name: list(values) for name, values in found.items()}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program, str(out), str(shop_job.directory / "test.csv")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    predictions = json.loads(printed)
    logged = best(shop_job, "shop-job", capsys)["datasets"]["shop"]["metrics"]["test"]
    clicks = shop_job.test_rows["visit"]
    assert roc_auc_score(clicks, predictions["pctr"]) == pytest.approx(logged["ctr_auc"], abs=1e-6)
    assert log_loss(clicks, predictions["pctr"]) == pytest.approx(logged["ctr_logloss"], abs=1e-6)
    if "pctcvr" in predictions:
        auc = roc_auc_score(shop_job.test_rows["order"], predictions["pctcvr"])
        assert auc == pytest.approx(logged["ctcvr_auc"], abs=1e-6)


def test_an_existing_export_is_left_alone(
    shop_job: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shop_job.directory / "there"
    out.mkdir()
    arguments = ["shop-job", "--dataset", "shop", "--out", str(out)]
    assert pwiser(monkeypatch, "export", *arguments, "--tracking", shop_job.tracking) == 2
    assert f"--out {out}: already exists; give another directory" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_finished_job_shows_its_results_again_and_trains_nothing(
    shop_job: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = best(shop_job, "shop-job", capsys)
    assert pwiser(monkeypatch, "tune", str(shop_job.directory / "shop-job.yaml")) == 0
    assert "starting Ray" not in capsys.readouterr().out
    assert best(shop_job, "shop-job", capsys) == before
    assert len(shop_job.trials("shop-job")) == 8


def test_a_job_that_ended_before_its_winner_was_marked_and_told_goes_on_there(
    workshop: Workshop,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = {"sampler": "random", "trials": 3, "pruner": "none"}
    job = workshop.write_job(name="cut-short", models=["dnn"], search=search)
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    found = best(workshop, "cut-short", capsys)
    # as if an earlier winner were marked still, and nothing described
    client = MlflowClient(workshop.tracking)
    for trial in workshop.trials("cut-short"):
        marked = trial.info.run_id != found["datasets"]["shop"]["run_id"]
        client.set_tag(trial.info.run_id, "pwiser.winner", str(marked).lower())
    (study,) = workshop.runs("cut-short", "study")
    client.delete_tag(study.info.run_id, "mlflow.note.content")
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    assert "3 of which have ended already" in capsys.readouterr().out
    assert best(workshop, "cut-short", capsys) == found
    assert len(workshop.trials("cut-short")) == 3
    # as if it had ended while it was described
    client.delete_tag(study.info.run_id, "mlflow.note.content")
    client.set_experiment_tag(study.info.experiment_id, "pwiser.described", "false")
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    assert "starting Ray" not in capsys.readouterr().out
    (study,) = workshop.runs("cut-short", "study")
    assert "**shop/dnn: " in study.data.tags["mlflow.note.content"]


@pytest.mark.parametrize("options", [(), ("--fresh",)], ids=["tune", "fresh"])
def test_a_job_whose_experiment_was_deleted_in_the_ui_begins_anew(
    workshop: Workshop,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    name = f"deleted{len(options)}"
    search = {"sampler": "random", "trials": 2, "pruner": "none"}
    job = workshop.write_job(name=name, models=["dnn"], search=search)
    client = MlflowClient(workshop.tracking)
    deleted = client.create_experiment(name, tags={"pwiser.job": name})
    client.delete_experiment(deleted)
    assert pwiser(monkeypatch, "tune", str(job), *options) == 0
    assert [run.info.status for run in workshop.trials(name)] == ["FINISHED"] * 2
    archived = client.get_experiment(deleted)
    assert archived.lifecycle_stage == "deleted"
    assert archived.name.startswith(f"{name}-archived-")


@pytest.mark.parametrize("options", [(), ("--fresh",)], ids=["tune", "fresh"])
@pytest.mark.parametrize("deleted", [False, True], ids=["active", "deleted"])
@pytest.mark.parametrize(
    ("tags", "tag"), [({}, "missing"), ({"pwiser.job": "other"}, "'other'")], ids=["none", "other"]
)
def test_an_experiment_of_somebody_else_is_left_as_it_is(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    deleted: bool,
    tags: dict[str, str],
    tag: str,
) -> None:
    name = f"fraud-{len(options)}-{deleted}-{len(tags)}"
    job = workshop.write_job(name=name, models=["dnn"])
    client = connect(workshop.tracking)
    theirs = client.create_experiment(name, tags=tags)
    if deleted:
        client.delete_experiment(theirs)
    before = client.get_experiment(theirs)
    assert pwiser(monkeypatch, "tune", str(job), *options) == 2
    assert capsys.readouterr().err == (
        f"pwiser: {job}: name: the experiment {name!r} in the tracking store is not this job's "
        f"(its tag pwiser.job is {tag}); choose another name\n"
    )
    assert dict(client.get_experiment(theirs)) == dict(before)


def test_a_begun_job_refuses_a_changed_file(
    shop_job: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = yaml.safe_load((shop_job.directory / "shop-job.yaml").read_text())
    changed = shop_job.directory / "changed.yaml"
    changed.write_text(yaml.safe_dump(job | {"loss": {"gate": "literal"}}))
    assert pwiser(monkeypatch, "tune", str(changed)) == 2
    assert (
        "name: job 'shop-job' was begun with other settings (loss.gate was hinge, is literal); "
        "undo the change (only search.trials, search.replicates, budget.hours, "
        "budget.trial_hours may grow)"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_the_same_job_twice_gives_the_same_trials_and_metrics(
    workshop: Workshop,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sampler: str,
) -> None:
    space = {"loss.alpha": {"values": [0.01, 0.1]}, "training.weight_decay": {"values": [0.0, 0.1]}}
    search: dict[str, Any] = {"sampler": sampler, "trials": 5, "pruner": "none"}
    search |= {"space": space} if sampler == "grid" else {}
    job = workshop.write_job(name=f"twice-{sampler}", models=["shared_bottom"], search=search)
    seen = []
    for _ in range(2):
        assert pwiser(monkeypatch, "tune", str(job), "--fresh") == 0
        seen.append(
            [
                (run.data.params, {k: v for k, v in run.data.metrics.items() if "time/" not in k})
                for run in workshop.trials(f"twice-{sampler}")
            ]
        )
    assert len(seen[0]) == 5
    assert seen[0] == seen[1]
    told = " ".join(capsys.readouterr().out.split())
    assert ("5 trials (search.trials leaves out 1 of the grid's points)" in told) == (
        sampler == "grid"
    )


def test_a_lane_of_two_workers_finds_what_one_worker_finds(
    workshop: Workshop, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = []
    for workers in (1, 2):
        job = workshop.write_job(
            name=f"workers-{workers}",
            models=["mmoe"],
            search={"sampler": "random", "trials": 2, "pruner": "none"},
            resources={"lanes": 1, "workers_per_lane": workers},
            training=SMALL["training"] | {"precision": "float32"},
        )
        assert pwiser(monkeypatch, "tune", str(job)) == 0
        objectives.append(
            [run.data.metrics["best/objective"] for run in workshop.trials(f"workers-{workers}")]
        )
    assert objectives[0] == pytest.approx(objectives[1], abs=1e-4)


def test_a_trial_that_raises_fails_with_its_reason_and_the_search_goes_on(
    workshop: Workshop, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = workshop.write_job(
        name="raises",
        models=["dnn"],
        search={
            "sampler": "grid",
            "trials": 4,
            "pruner": "none",
            "space": {"training.learning_rate": {"values": [1.0e30, 0.01]}},
        },
    )
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    trials = workshop.trials("raises")
    failed = [run for run in trials if run.info.status == "FAILED"]
    assert [run.data.params["training.learning_rate"] for run in failed] == ["1e+30"]
    assert "the loss became nan before step" in failed[0].data.tags["pwiser.failure"]
    assert [run.info.status for run in trials].count("FINISHED") == len(trials) - 1


def test_a_killed_worker_loses_no_trial(
    workshop: Workshop, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = workshop.directory / "killer.py"
    killer.write_text(
        "import os, pathlib, signal\n"
        "from torch import nn\n"
        "from trainables.models import DNN, Inputs\n"
        f"MARK = pathlib.Path({str(workshop.directory / 'killed')!r})\n"
        "class Killer(DNN):\n"
        "    def __init__(self, inputs: Inputs, *, embedding_dim: int = 4) -> None:\n"
        "        super().__init__(inputs, embedding_dim=embedding_dim, hidden_units=(8,))\n"
        "    def forward(self, ids, numericals):\n"
        "        if ids.device.type != 'meta' and not MARK.exists():\n"
        "            MARK.touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().forward(ids, numericals)\n"
    )
    job = workshop.write_job(
        name="killed",
        models=["killer:Killer"],
        model={},
        search={"sampler": "random", "trials": 3, "pruner": "none"},
    )
    environment = os.environ | {"PYTHONPATH": str(workshop.directory)}
    found = subprocess.run(
        [sys.executable, "-m", "tuner", "tune", str(job)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert (workshop.directory / "killed").exists()
    assert [run.info.status for run in workshop.trials("killed")] == ["FINISHED"] * 3


def test_a_spent_budget_ends_the_search_with_a_winner(
    workshop: Workshop,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = workshop.write_job(
        name="budget",
        models=["dnn"],
        search={"sampler": "random", "trials": 10_000, "pruner": "none", "replicates": 2},
        budget={"hours": 20 / 3600},
    )
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    printed = capsys.readouterr().out
    assert workshop.runs("budget", "replicate") == []
    trials = workshop.trials("budget")
    assert 2 <= len(trials) < 10_000
    num_ended = sum(run.info.status == "FINISHED" for run in trials)
    (winner,) = (run for run in trials if run.data.tags.get("pwiser.winner") == "true")
    has_alpha = float(winner.data.params["alpha"]) > 0
    assert (
        f"the budget is spent: {10_000 - num_ended} trials and {4 if has_alpha else 2} replicates "
        "are left; the same command goes on with them"
    ) in printed
    assert all(run.info.status in {"FINISHED", "KILLED"} for run in trials)
    assert any(run.data.tags.get("pwiser.winner") == "true" for run in trials)


SPACE = {"loss.alpha": {"values": [0.01, 0.03, 0.1]}, "loss.m1": {"values": [0.1, 0.3]}}


def start_tune(job: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner", "tune", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("job ")
    return process


def test_a_job_whose_nodes_cannot_load_its_dataset_ends_with_the_reason_and_goes_on_once_mended(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"sampler": "random", "trials": 3, "pruner": "none"}
    job = workshop.write_job(name="no-cache", models=["dnn"], search=search)
    in_the_way = workshop.directory / "in-the-way"
    in_the_way.write_text("no directory")
    monkeypatch.setenv(CACHE_VARIABLE, str(in_the_way))
    broken = start_tune(job)
    _, errors = broken.communicate(timeout=300)
    assert broken.returncode == 1
    assert errors.startswith(
        "pwiser: job 'no-cache': no lane is left: no-cache-lane-0 gave back its trials, at last on "
        f"node {ray.util.get_node_ip_address()}: {in_the_way}/"
    ), errors
    assert errors.endswith(
        f"make room or set {CACHE_VARIABLE} to another directory of this node; the same command "
        "goes on with it\n"
    )
    assert all(run.info.status == "KILLED" for run in workshop.trials("no-cache"))
    monkeypatch.delenv(CACHE_VARIABLE)
    mended = start_tune(job)
    mended.communicate(timeout=300)
    assert mended.returncode == 0
    assert [run.info.status for run in workshop.trials("no-cache")] == ["FINISHED"] * 3


def test_replicates_weigh_the_winner_and_steer_nothing(
    workshop: Workshop,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content: dict[str, Any] = {
        "models": ["dnn", "mmoe"],  # of both, the paper's point is well ahead of the baseline
        "model": {"embedding_dim": 4, "hidden_units": [8], "expert_units": [8], "num_experts": 2},
    }
    search = {"sampler": "random", "trials": 3, "pruner": "none"}
    job = workshop.write_job(name="weighed", search=search, **content)
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    trials, result = (
        workshop.trials("weighed"),
        best(workshop, "weighed", capsys)["datasets"]["shop"],
    )
    assert workshop.runs("weighed", "replicate") == []

    # the same job with replicates runs these alone, of both studies, with the seeds that follow
    job = workshop.write_job(name="weighed", search=search | {"replicates": 2}, **content)
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    printed = capsys.readouterr().out
    assert "4/8 replicates" in printed
    assert [facts([run]) for run in workshop.trials("weighed")] == [facts([run]) for run in trials]
    replicates = workshop.runs("weighed", "replicate")
    assert sorted(run.data.tags["pwiser.seed"] for run in replicates) == ["1"] * 4 + ["2"] * 4
    for replicate in replicates:
        configuration = json.loads(replicate.data.tags["pwiser.configuration"])
        assert str(configuration["training"]["seed"]) == replicate.data.tags["pwiser.seed"]
        assert (configuration["loss"]["alpha"] == 0) == (
            replicate.data.tags["pwiser.plain"] == "true"
        )
        assert replicate.info.status == "FINISHED"
        assert replicate.data.metrics["test/ctr_auc"] > 0.5
    assert not list(workshop.directory.glob("storage/weighed/*/shop/*/*-seed-*"))

    evidence = best(workshop, "weighed", capsys)["datasets"]["shop"]["evidence"]
    assert list(evidence) == ["dnn", "mmoe"]
    for model, found in evidence.items():
        pairs = {
            seed: {
                run.data.tags["pwiser.plain"]: run.data.metrics["test/ctr_auc"]
                for run in replicates
                if (run.data.tags["pwiser.model"], run.data.tags["pwiser.seed"]) == (model, seed)
            }
            for seed in ("1", "2")
        }
        differences = [pair["false"] - pair["true"] for pair in pairs.values()]
        assert found["seeds"] == [1, 2]
        assert found["metrics"]["ctr_auc"]["difference"] == pytest.approx(np.mean(differences))
    for study in workshop.runs("weighed", "study"):
        shown = evidence[study.data.tags["pwiser.model"]]
        assert study.data.tags["pwiser.verdict"] == shown["verdict"]
        assert study.data.metrics["evidence/difference"] == shown["objective"]["difference"]
        assert study.data.tags["pwiser.evidence"].endswith("] over 2 seeds")
        assert f"**{study.data.tags['pwiser.study']}: " in study.data.tags["mlflow.note.content"]
        pictures = MlflowClient(workshop.tracking).list_artifacts(study.info.run_id, "figures")
        assert [picture.path for picture in pictures] == [
            "figures/curves.png",
            "figures/history.png",
        ]

    # all is there now: nothing runs again
    assert pwiser(monkeypatch, "tune", str(job)) == 0
    assert "replicates" not in capsys.readouterr().out
    assert best(workshop, "weighed", capsys)["datasets"]["shop"]["evidence"] == evidence
    assert result["metrics"] == best(workshop, "weighed", capsys)["datasets"]["shop"]["metrics"]


def end_first_trials(process: subprocess.Popen[str], number: int) -> None:
    """Wait until so many trials have ended."""
    assert process.stdout is not None
    for _ in range(number):
        assert " done, best " in process.stdout.readline()


def assert_no_process_is_left(session: int) -> None:
    deadline = (
        time.monotonic() + 120
    )  # Ray's agents notice after a minute that its raylet was killed
    while processes_of_session(session):
        assert time.monotonic() < deadline, processes_of_session(session)
        time.sleep(0.2)


def facts(trials: list[Run]) -> list[tuple[dict[str, str], str, dict[str, float]]]:
    """What must not depend on interruptions: all but the clock."""
    return [
        (
            run.data.params,
            run.data.tags["pwiser.state"],
            {name: value for name, value in run.data.metrics.items() if "time/" not in name},
        )
        for run in trials
    ]


def test_an_interrupted_and_a_killed_job_go_on_to_what_an_undisturbed_one_finds(
    workshop: Workshop, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"sampler": "grid", "trials": 8, "space": SPACE}
    training = SMALL["training"] | {"epochs": 20, "evaluate_every": 0.2}
    jobs = {
        name: workshop.write_job(name=name, models=["dnn"], search=search, training=training)
        for name in ("undisturbed", "disturbed")
    }
    assert pwiser(monkeypatch, "tune", str(jobs["undisturbed"])) == 0

    interrupted = start_tune(jobs["disturbed"])
    end_first_trials(interrupted, 2)
    os.killpg(interrupted.pid, signal.SIGTERM)  # to the whole group, as `timeout` does
    _, errors = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130
    assert errors.startswith("pwiser: job 'disturbed' was interrupted after ")
    assert "the same command goes on with it, --fresh starts anew" in errors
    assert "Traceback" not in errors
    assert all(run.info.status != "RUNNING" for run in workshop.runs("disturbed"))
    assert_no_process_is_left(interrupted.pid)

    killed = start_tune(jobs["disturbed"])
    end_first_trials(killed, 2)
    killed.kill()
    killed.communicate(timeout=120)

    assert pwiser(monkeypatch, "tune", str(jobs["disturbed"])) == 0
    undisturbed, disturbed = workshop.trials("undisturbed"), workshop.trials("disturbed")
    assert [run.data.tags["pwiser.trial"] for run in disturbed] == [str(n) for n in range(8)]
    assert facts(disturbed) == facts(undisturbed)
    winners = [
        [run.data.tags.get("pwiser.winner") for run in trials]
        for trials in (undisturbed, disturbed)
    ]
    assert winners[0] == winners[1]
    assert winners[0].count("true") == 1
    assert_no_process_is_left(killed.pid)


def test_a_running_job_refuses_a_second_process(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"sampler": "random", "trials": 10_000, "pruner": "none"}
    job = workshop.write_job(name="running", models=["dnn"], search=search)
    process = start_tune(job)
    end_first_trials(process, 1)
    try:
        assert pwiser(monkeypatch, "tune", str(job)) == 2
        assert "name: job 'running' is running already" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert_no_process_is_left(process.pid)


def processes_of_session(session: int) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(str(status))
    return found


def test_ray_is_still_there(ray_session: None) -> None:
    assert ray.is_initialized()
