"""`pwiser export`: all that is needed to load a winner elsewhere and predict from raw features."""

import shutil
from pathlib import Path

from datasets import OutputExistsError
from tuner.errors import JobNotFoundError
from tuner.results import JobResult
from tuner.storage import download, join

__all__ = ["ENCODER_DIRECTORY", "export_winner"]

ENCODER_DIRECTORY = "encoder"
"""Beside a dataset's studies in a job's storage: what encodes its raw features."""


def export_winner(results: JobResult, dataset: str, out: Path) -> None:
    """Copy a dataset's winner and its encoder into a new directory, whole or not at all.

    Raises:
        OutputExistsError: if the directory is there already.
        JobNotFoundError: if the job has no such dataset.
        StorageError: if the checkpoint is gone.
    """
    if dataset not in results.datasets:
        raise JobNotFoundError(
            f"--dataset {dataset}: job {results.job!r} has {', '.join(results.datasets)}"
        )
    if out.exists():
        raise OutputExistsError(f"--out {out}: is there already; name a new directory")
    checkpoint = results.datasets[dataset].checkpoint
    encoder = join(checkpoint.rsplit("/", 2)[0], ENCODER_DIRECTORY)
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(parents=True)
    try:
        for uri in (checkpoint, encoder):
            with download(uri) as directory:
                shutil.copytree(directory, partial, dirs_exist_ok=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
