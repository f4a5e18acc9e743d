"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from tuner.errors import StorageError

__all__ = ["JobFile", "JobName", "Tracking", "local_path"]


def local_path(text: str) -> Path:
    """Read an argument that names a place on this machine; parses those of type Path.

    Raises:
        StorageError: if it is a URI, of which a Path would make a place below this directory.
    """
    if "://" in text:
        raise StorageError(
            f"{text}: is a URI, where a path on this machine is needed; name one, and copy from or "
            "to the URI with its storage's own tools"
        )
    return Path(text)


JobFile = Annotated[
    Path, typer.Argument(metavar="JOB.yaml", help="The job file.", parser=local_path)
]
JobName = Annotated[str, typer.Argument(metavar="JOB_NAME", help="The name in the job file.")]
Tracking = Annotated[
    str | None,
    typer.Option(
        "--tracking",
        metavar="URI",
        help="MLflow tracking store; MLFLOW_TRACKING_URI, or pwiser/mlflow.db here, if left out.",
    ),
]
