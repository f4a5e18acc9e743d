"""What came out of a job, said in the MLflow UI where a reader looks for it."""

import tempfile
from pathlib import Path

from mlflow.entities import Experiment
from mlflow.tracking import MlflowClient
from rich.console import Console

from tuner.tables import results_markdown
from tuner.tracking import log_evidence, wait_longer

__all__ = ["describe_job", "is_described", "mark_described"]

FIGURES = ("curves", "history", "landscape")
"""Of a study's report, kept with its run."""
NOTE_TAG = "mlflow.note.content"
DESCRIBED_TAG = "pwiser.described"


def describe_job(client: MlflowClient, experiment: Experiment, console: Console) -> None:
    """Describe a job on its experiment, and each study on its run, with evidence and figures.

    Figures that the store does not take are told on the console.
    """
    from tuner.report import read_report, study_figures, study_markdown  # draws: slow to import

    wait_longer()
    report = read_report(client, experiment)
    if report.results is not None:
        note = results_markdown(report.results)
        client.set_experiment_tag(experiment.experiment_id, NOTE_TAG, note)
    for study in report.studies:
        if study.evidence is not None:
            log_evidence(client, study.run_id, study.evidence)
        client.set_tag(study.run_id, NOTE_TAG, study_markdown(study))
        with tempfile.TemporaryDirectory() as directory:
            for name, _, png in study_figures(study, FIGURES):
                (Path(directory) / f"{name}.png").write_bytes(png)
            try:
                client.log_artifacts(study.run_id, directory, "figures")
            except Exception as error:  # noqa: BLE001 - of any store; the job is done
                console.print(f"the figures of {study.name} cannot be stored: {error}")
    mark_described(client, experiment.experiment_id, described=True)


def is_described(experiment: Experiment) -> bool:
    """Whether all is said that `describe_job` says; it may have ended on the way."""
    return bool(experiment.tags.get(DESCRIBED_TAG) == "true")


def mark_described(client: MlflowClient, experiment_id: str, *, described: bool) -> None:
    """Note whether all is said that `describe_job` says."""
    client.set_experiment_tag(experiment_id, DESCRIBED_TAG, str(described).lower())
