"""`pwiser export`: all that is needed to load a winner elsewhere and predict from raw features.

Beside each dataset's studies a job's storage holds its encoder and some raw rows as an example; an
export is these, the winner's weights and configuration, and on demand the model as a program.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from datasets import Dataset
from datasets.filesystem import locate, staged_directory
from tuner.errors import JobNotFoundError, StorageError
from tuner.results import DatasetResult, JobResult
from tuner.storage import download, join, parent, upload

if TYPE_CHECKING:
    from trainables.program import ProgramFormat

__all__ = ["ENCODER_DIRECTORY", "EXAMPLE_FILE", "export_winner", "find_winner", "save_encoder"]

ENCODER_DIRECTORY = "encoder"
"""Beside a dataset's studies in a job's storage: what encodes its raw features."""

EXAMPLE_FILE = "example.parquet"
"""Raw features of a few test rows, to try an export with."""

EXAMPLE_ROWS = 5


def save_encoder(dataset: Dataset, uri: str) -> None:
    """Write what an export of a dataset's winner will need beside its checkpoint.

    Raises:
        StorageError: if the storage cannot be written.
    """
    with tempfile.TemporaryDirectory() as directory:
        dataset.encoder().save(directory)
        pq.write_table(dataset.raw_rows("test", EXAMPLE_ROWS), Path(directory) / EXAMPLE_FILE)
        upload(Path(directory), uri)


def find_winner(results: JobResult, dataset: str) -> DatasetResult:
    """Find a dataset's winner.

    Raises:
        JobNotFoundError: if the job has no such dataset.
    """
    if dataset not in results.datasets:
        raise JobNotFoundError(
            f"--dataset {dataset}: no such dataset in job {results.job!r}; "
            f"it has {', '.join(results.datasets)}"
        )
    return results.datasets[dataset]


def export_winner(
    results: JobResult, dataset: str, out: Path, program: "ProgramFormat | None" = None
) -> None:
    """Copy a dataset's winner and its encoder into a new directory, whole or not at all.

    Args:
        results: of the job.
        dataset: whose winner.
        out: the directory to make.
        program: also write the model as a program that needs none of this package.

    Raises:
        OutputExistsError: if the directory is there already.
        JobNotFoundError: if the job has no such dataset.
        CheckpointError: if the model cannot be written as that program.
        StorageError: if the checkpoint is gone, or the directory cannot be written.
    """
    checkpoint = find_winner(results, dataset).checkpoint
    encoder = join(parent(checkpoint, 2), ENCODER_DIRECTORY)
    try:
        with staged_directory(locate(out), shown=str(out)) as stage:
            for uri in (checkpoint, encoder):
                with download(uri) as directory:
                    shutil.copytree(directory, stage.path, dirs_exist_ok=True)
            if program is not None:
                from trainables.program import write_program

                write_program(Path(stage.path), program)
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written ({error.strerror or error}); name another directory"
        ) from error
