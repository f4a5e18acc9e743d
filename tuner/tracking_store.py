"""Where the tracking store is, for the commands that write it and for those that read it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from datasets.errors import one_line
from tuner.errors import TrackingError
from tuner.storage import absolute_uri, local_path

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

__all__ = [
    "DEFAULT_STORAGE",
    "RETRIES_VARIABLE",
    "default_uri",
    "existing_uri",
    "hide_password",
    "http_status",
    "open_existing",
    "single_attempts",
    "tracking_fault",
]

DEFAULT_STORAGE = "pwiser"
DATABASE_FILE = "mlflow.db"
RETRIES_VARIABLE = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
LOGIN_PATTERN = re.compile(r"(?<=://)[^/@:\s]*:[^@\s]*@")
QUERY_PATTERN = re.compile(r"(?<=://)([^\s?]*)\?(\S*)")
SECRET_PATTERN = re.compile(
    r"(passw(or)?d|pwd|secret|token|account_?key|\bsig)[^=]*=", re.IGNORECASE
)
"""A parameter that is a password; one of ODBC's has others inside of it."""


def hide_password(text: str) -> str:
    """Leave passwords out of the URIs in a text: `MLFLOW_TRACKING_URI` may have them.

    A login before the host goes with its user, a parameter of the query alone.
    """
    return LOGIN_PATTERN.sub("", QUERY_PATTERN.sub(_without_secrets, text))


def _without_secrets(uri: re.Match[str]) -> str:
    place, query = uri.groups()
    kept = [part for part in query.split("&") if not SECRET_PATTERN.search(unquote_plus(part))]
    return f"{place}?{'&'.join(kept)}" if kept else str(place)


def http_status(error: "MlflowException") -> int:
    """What an answer of MLflow, from a server or a file, is in HTTP."""
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def tracking_fault(error: Exception) -> TrackingError | None:
    """Say in one line what MLflow raised, as a refusal or a server that went away; None for others.

    MLflow itself is not imported for it.
    """
    if not type(error).__module__.startswith("mlflow."):
        return None
    reason = hide_password(one_line(error, None))
    return TrackingError(
        f"tracking: the store does not do it ({reason}); check that it is up, and your permissions"
    )


@contextmanager
def single_attempts() -> Iterator[None]:
    """Keep MLflow from repeating a call by itself while the context lasts, whatever the user says.

    It repeats one whose answer was lost as it is, so that a run would be created twice.
    """
    before = os.environ.get(RETRIES_VARIABLE)
    os.environ[RETRIES_VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(RETRIES_VARIABLE, None)
        else:
            os.environ[RETRIES_VARIABLE] = before


def default_uri(storage: str) -> str:
    """`MLFLOW_TRACKING_URI`, or else a SQLite file in the storage.

    Raises:
        TrackingError: if neither will do, because the storage is not on this machine.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    path = local_path(storage)
    if path is None:
        raise TrackingError(
            f"tracking.uri: is needed where storage is {storage}; "
            "name an MLflow server there or in MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{path / DATABASE_FILE}"


def existing_uri(uri: str | None) -> str:
    """The store that a reading command uses: `uri`, or the default one of this directory.

    Raises:
        TrackingError: if it is a SQLite file that is not there.
    """
    found = uri or default_uri(absolute_uri(DEFAULT_STORAGE))
    path = found.removeprefix("sqlite:///")
    if path != found and not Path(path).is_file():
        raise TrackingError(
            f"{path}: no tracking store on this machine; pwiser tune makes one here, that of a job "
            "elsewhere is named by --tracking or MLFLOW_TRACKING_URI"
        )
    return found


def open_existing(uri: str | None) -> "MlflowClient":
    """Open the store that `existing_uri` names.

    Raises:
        TrackingError: if it is a SQLite file that is not there, or cannot be reached or used.
    """
    from tuner.tracking import connect

    return connect(existing_uri(uri))
