"""`pwiser register`: a winner becomes a version of its dataset's registered model.

The model `pwiser-<dataset>` is an MLflow pyfunc that takes raw features. Its alias `champion` is
the version to serve, `previous` the one before it.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow.parquet as pq
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType

import datasets
import trainables
from tuner import pyfunc_model
from tuner.errors import EvidenceError
from tuner.export import EXAMPLE_FILE, export_winner, find_winner
from tuner.results import DatasetResult, JobResult
from tuner.versions import installed_versions

__all__ = ["CHAMPION", "PREVIOUS", "model_name", "register_winner"]

CHAMPION = "champion"
PREVIOUS = "previous"
PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "torch")
"""What `trainables.load` needs."""


def model_name(dataset: str) -> str:
    """The registered model of a dataset."""
    return f"pwiser-{dataset}"


def register_winner(
    client: MlflowClient, results: JobResult, dataset: str, *, force: bool = False
) -> int:
    """Register a dataset's winner, and make it the champion.

    Args:
        client: of the tracking store, which holds the registry too.
        results: of the job.
        dataset: whose winner.
        force: also without evidence that it is better than BCE.

    Returns:
        The new version.

    Raises:
        JobNotFoundError: if the job has no such dataset.
        EvidenceError: if the evidence does not say better.
        StorageError: if the checkpoint is gone.
    """
    result = find_winner(results, dataset)
    if not force:
        _check_evidence(results.job, dataset, result)
    with tempfile.TemporaryDirectory() as directory:
        export = Path(directory) / "export"
        export_winner(results, dataset, export)
        version = _log(client, result, model_name(dataset), export)
    tags = {"pwiser.job": results.job, "pwiser.model": result.model}
    evidence = result.evidence.get(result.model)
    if evidence is not None:
        tags["pwiser.verdict"] = evidence.verdict
    for name, value in tags.items():
        client.set_model_version_tag(model_name(dataset), str(version), name, value)
    _crown(client, model_name(dataset), version)
    return version


def _check_evidence(job: str, dataset: str, result: DatasetResult) -> None:
    found = result.evidence.get(result.model)
    if found is None:
        raise EvidenceError(
            f"job {job!r}: nothing shows whether the winner of {dataset} is better than BCE; run "
            "it again with search.replicates, or register it with --force"
        )
    if found.verdict != "better":
        shown = found.objective
        failures = f"; {found.failures}" if found.failures else ""
        raise EvidenceError(
            f"job {job!r}: the winner of {dataset} against BCE over {len(found.seeds)} seeds: "
            f"{found.verdict} ({shown.difference:+.4f}, 95% interval {shown.low:+.4f} to "
            f"{shown.high:+.4f}){failures}; register it nevertheless with --force"
        )


def _log(client: MlflowClient, result: DatasetResult, name: str, export: Path) -> int:
    predictor = trainables.load(export)
    example = pq.read_table(export / EXAMPLE_FILE).to_pandas()
    found = installed_versions()
    code = [str(Path(str(package.__file__)).parent) for package in (datasets, trainables)]
    with _stores(str(client.tracking_uri)), _going_on_with(client, result.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(pyfunc_model.__file__)),
            artifacts={"export": str(export)},
            code_paths=code,
            signature=_signature(predictor, example),
            input_example=example,
            pip_requirements=[
                *(f"{package}=={found[package]}" for package in PACKAGES),
                "safetensors",
            ],
            registered_model_name=name,
        )
    return int(logged.registered_model_version)


@contextmanager
def _going_on_with(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Log to a run that has ended, and leave its end as it was."""
    before = client.get_run(run_id).info
    try:
        with mlflow.start_run(run_id=run_id):
            yield
    finally:
        client.set_terminated(run_id, before.status, before.end_time)


@contextmanager
def _stores(uri: str) -> Iterator[None]:
    """Point MLflow's module, which alone can log models, to a store for a while.

    It keeps the store in the environment too, for processes that it starts.
    """
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _signature(predictor: trainables.Predictor, example: pd.DataFrame) -> ModelSignature:
    """Categories may be of any type or missing; numericals may be missing where they are filled."""
    encoder = predictor.encoder
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(AnyType(), name, required=False)  # type: ignore[no-untyped-call]
        for name in encoder.categorical
    ]
    inputs += [
        ColSpec(DataType.double, name, required=field.fill is None)
        for name, field in encoder.numerical.items()
    ]
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.double, name) for name in predictor.predict(example)
    ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _crown(client: MlflowClient, name: str, version: int) -> None:
    former = client.get_registered_model(name).aliases.get(CHAMPION)
    if former is not None:
        client.set_registered_model_alias(name, PREVIOUS, former)
    client.set_registered_model_alias(name, CHAMPION, str(version))
