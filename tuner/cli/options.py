"""Options that several commands have."""

from typing import Annotated

import typer

__all__ = ["JobName", "Tracking"]

JobName = Annotated[str, typer.Argument(metavar="JOB_NAME", help="The name in the job file.")]
Tracking = Annotated[
    str | None,
    typer.Option(
        "--tracking",
        metavar="URI",
        help="MLflow tracking store; MLFLOW_TRACKING_URI, or pwiser/mlflow.db here, if left out.",
    ),
]
