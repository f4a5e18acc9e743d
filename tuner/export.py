"""`pwiser export`: all that is needed to load a winner elsewhere and predict from raw features."""

import shutil
from pathlib import Path

from datasets.filesystem import locate, staged_directory
from tuner.errors import JobNotFoundError, StorageError
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
        StorageError: if the checkpoint is gone, or the directory cannot be written.
    """
    if dataset not in results.datasets:
        raise JobNotFoundError(
            f"--dataset {dataset}: no such dataset in job {results.job!r}; "
            f"it has {', '.join(results.datasets)}"
        )
    checkpoint = results.datasets[dataset].checkpoint
    encoder = join(checkpoint.rsplit("/", 2)[0], ENCODER_DIRECTORY)
    try:
        with staged_directory(locate(out), shown=str(out)) as stage:
            for uri in (checkpoint, encoder):
                with download(uri) as directory:
                    shutil.copytree(directory, stage.path, dirs_exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written ({error.strerror or error}); name another directory"
        ) from error
