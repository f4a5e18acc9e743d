import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from datasets import Dataset
from tuner.errors import JobNotFoundError, TrackingError
from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Report
from tuner.outbox import Outbox
from tuner.records import RecordWriter
from tuner.results import METRICS, find_experiment, read_results
from tuner.search import StudySearch
from tuner.study import Study, Trial
from tuner.tracking import Tracker, connect
from tuner.tracking_store import default_uri, existing_uri

VALID = {
    "ctr_auc": 0.7,
    "ctr_logloss": 0.3,
    "ctcvr_auc": 0.8,
    "ctcvr_logloss": 0.1,
    "cvr_auc": None,
}


def values(shift: float) -> dict[str, float | None]:
    return {name: value if value is None else value + shift for name, value in VALID.items()}


def search_job(
    client: MlflowClient, directory: Path, dataset: Dataset, name: str, model: str = "mmoe"
) -> dict[str, Trial]:
    """Log a job of three trials whose last is the best; its winner only if its name says so."""
    experiment_id = client.create_experiment(
        name, artifact_location=str(directory / "artifacts"), tags={"pwiser.job": name}
    )
    job = Job.model_validate(
        {
            "name": name,
            "datasets": [dataset.uri],
            "models": [model],
            "search": {"sampler": "random", "trials": 3},
            "training": {"batch_size": 64},
            "loss": {"gate": "literal"},
        }
    )
    writer = RecordWriter(client, experiment_id, Outbox(directory / "outbox.db"))
    tracker = Tracker(writer, job, "/s")
    study = Study(dataset=dataset.name, dataset_uri=dataset.uri, model=model)
    study_search = StudySearch(study, job)
    tracker.start_study(study_search, dataset, "name: job\n", num_lanes=1)
    search = JobSearch([study_search], [tracker])
    for shift in (0.0, 0.05, 0.125):
        trial = search.next_trial()
        assert trial is not None
        search.evaluated(trial, Report(index=1, last=False, step=1, epoch=1, metrics=values(shift)))
        search.ended(trial, Report(index=2, last=True, step=2, epoch=2, metrics=values(-0.1)))
    baseline, _, winner = search.trials
    if name == "finished":
        for trial, shift in ((winner, 0.0625), (baseline, 0.03125)):
            trial.test_metrics = values(shift)
            tracker.log_test(trial)
        tracker.log_winner(winner, baseline)
    tracker.close()
    return {"winner": winner, "baseline": baseline}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return connect(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture(scope="module")
def finished(
    client: MlflowClient, tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trial]:
    return search_job(client, tmp_path_factory.mktemp("finished"), tiny_dataset, "finished")


def test_the_winner_is_read_back_as_it_was(
    client: MlflowClient, finished: dict[str, Trial]
) -> None:
    winner = finished["winner"]
    result = read_results(client, find_experiment(client, "finished"))
    (run,) = client.search_runs(
        [client.get_experiment_by_name("finished").experiment_id],
        filter_string="tags.`pwiser.winner` = 'true'",
    )
    assert json.loads(result.model_dump_json()) == {
        "job": "finished",
        "datasets": {
            "tiny": {
                "model": "mmoe",
                "config": {
                    "model": json.loads(json.dumps(winner.configuration.model_settings)),
                    "training": winner.configuration.training.model_dump(),
                    "loss": winner.configuration.loss.model_dump(),
                },
                "metrics": {"valid": values(0.125), "test": values(0.0625)},
                "baseline": {"metrics": {"valid": values(0.0), "test": values(0.03125)}},
                "checkpoint": "/s/tiny/mmoe/trial-0002",
                "run_id": run.info.run_id,
                "evidence": {},
            }
        },
    }
    assert result.datasets["tiny"].config["loss"]["gate"] == "literal"
    assert list(result.datasets["tiny"].metrics["valid"]) == list(METRICS)


def test_a_job_without_a_winner_is_told_so(
    client: MlflowClient, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    search_job(client, tmp_path, tiny_dataset, "unfinished", "dnn")
    with pytest.raises(JobNotFoundError) as caught:
        read_results(client, find_experiment(client, "unfinished"))
    assert str(caught.value) == (
        "job 'unfinished': has no winner yet; it is still running or was stopped (see pwiser ui)"
    )


def test_a_job_whose_name_another_has_taken_is_read_by_its_experiment(
    client: MlflowClient, finished: dict[str, Trial]
) -> None:
    experiment = find_experiment(client, "finished")
    before = read_results(client, experiment)
    client.rename_experiment(experiment.experiment_id, "archived")
    taken = client.create_experiment("finished", tags={"pwiser.job": "finished"})
    assert read_results(client, experiment) == before
    client.rename_experiment(taken, "taken")
    client.rename_experiment(experiment.experiment_id, "finished")


def test_an_unknown_job_is_told_with_the_known_ones(
    client: MlflowClient, finished: dict[str, Trial]
) -> None:
    client.create_experiment("somebody else's")
    with pytest.raises(JobNotFoundError) as caught:
        find_experiment(client, "finnished")
    message = str(caught.value)
    assert message.startswith("job 'finnished': not in the tracking store; it holds finished")
    assert "somebody" not in message


def test_the_experiment_of_somebody_else_is_no_job(client: MlflowClient) -> None:
    client.create_experiment("theirs", tags={"team": "fraud"})
    with pytest.raises(JobNotFoundError, match=r"^job 'theirs': not in the tracking store; it h"):
        find_experiment(client, "theirs")


def test_a_deleted_job_is_unknown(client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone", tags={"pwiser.job": "gone"}))
    with pytest.raises(JobNotFoundError, match=r"^job 'gone': not in the tracking store; it holds"):
        find_experiment(client, "gone")


def test_a_reading_command_needs_a_store_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    expected = (
        "{}: no tracking store on this machine; pwiser tune makes one here, that of a job "
        "elsewhere is named by --tracking or MLFLOW_TRACKING_URI"
    )
    with pytest.raises(TrackingError) as caught:
        existing_uri(None)
    assert str(caught.value) == expected.format(tmp_path / "pwiser" / "mlflow.db")
    with pytest.raises(TrackingError) as caught:
        existing_uri("sqlite:///other.db")
    assert str(caught.value) == expected.format("other.db")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.db").touch()
    assert existing_uri("sqlite:///other.db") == "sqlite:///other.db"
    assert existing_uri("http://mlflow:5000") == "http://mlflow:5000"


def test_the_store_is_in_the_storage_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri("/data/pwiser") == "sqlite:////data/pwiser/mlflow.db"
    assert default_uri("file:///data/pwiser") == "sqlite:////data/pwiser/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert default_uri("/data/pwiser") == "http://mlflow:5000"


def test_a_remote_storage_needs_a_store_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = "s3://bucket/pwiser?region=eu-west-1"
    with pytest.raises(TrackingError) as caught:
        default_uri(storage)
    assert str(caught.value) == (
        f"tracking.uri: is needed where storage is {storage}; "
        "name an MLflow server there or in MLFLOW_TRACKING_URI"
    )
