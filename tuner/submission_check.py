"""What can be told to be wrong with a job before it leaves for a cluster."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import PwiserError
from datasets.filesystem import locate
from tuner.errors import JobFileError, TrackingRefusedError
from tuner.job import Job, parse_job
from tuner.storage import absolute_uri
from tuner.tracking import connect
from tuner.tuning import check_datasets

__all__ = ["check_submission"]

MAX_JOB_FILE_BYTES = 64 * 1024  # it travels in an environment variable of the driver


def check_submission(
    text: str, shown: str, *, working_dir: Path | None, tracking: str | None
) -> Job:
    """Check a job file, the datasets and the tracking store, these two where they can be reached.

    What cannot be reached from here is left to the cluster, whose nodes all look before the first
    trial.

    Args:
        text: of the job file.
        shown: what messages call it.
        working_dir: with modules of the user's own.
        tracking: URI of the tracking store as it is seen from here; the job's where None.

    Raises:
        PwiserError: naming what is wrong, and the fix.
    """
    size = len(text.encode())
    if size > MAX_JOB_FILE_BYTES:
        raise JobFileError(
            f"{shown}: has {size} bytes, a job file may have {MAX_JOB_FILE_BYTES}; shorten it"
        )
    if working_dir is not None and not working_dir.is_dir():
        raise JobFileError(f"--working-dir {working_dir}: no such directory; name one")
    with _import_path(working_dir):
        job = parse_job(text, shown)
    for field, uris in (("datasets", job.datasets), ("storage", (job.storage,))):
        for uri in uris:
            if "://" not in uri and not Path(uri).is_absolute():
                raise JobFileError(
                    f"{shown}: {field}: {uri} is relative to a directory of this machine; give a "
                    "URI such as s3://bucket/..., or an absolute path that every node has"
                )
    reachable = tuple(uri for uri in job.datasets if _is_reachable(uri))
    if reachable:
        try:
            check_datasets(job.model_copy(update={"datasets": reachable}))
        except JobFileError as error:
            raise JobFileError(f"{shown}: {error}") from error
    _check_tracking(tracking or os.environ.get("MLFLOW_TRACKING_URI") or job.tracking.uri)
    return job


def _is_reachable(uri: str) -> bool:
    try:
        return locate(absolute_uri(uri)).exists()
    except OSError:
        return False


def _check_tracking(uri: str | None) -> None:
    """Complain of a store that answers and refuses us; one that does not answer is no fault yet."""
    if uri is None or not uri.startswith(("http://", "https://")):
        return
    try:
        connect(uri)
    except TrackingRefusedError:
        raise
    except PwiserError:
        return


@contextmanager
def _import_path(directory: Path | None) -> Iterator[None]:
    if directory is None:
        yield
        return
    entry = str(directory.absolute())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
