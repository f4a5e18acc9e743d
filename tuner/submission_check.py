"""What can be told to be wrong with a job before it leaves for a cluster."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import DatasetError, PwiserError
from datasets.filesystem import locate
from tuner.errors import JobFileError, TrackingRefusedError
from tuner.job import Job, parse_job
from tuner.look import look
from tuner.tracking import connect
from tuner.tuning import check_datasets

__all__ = ["check_submission", "import_path"]

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
    with import_path(working_dir):
        job = parse_job(text, shown)
    for field, uris in (("datasets", job.datasets), ("storage", (job.storage,))):
        for uri in uris:
            if "://" not in uri and not Path(uri).is_absolute():
                raise JobFileError(
                    f"{shown}: {field}: {uri} is relative to a directory of this machine; give a "
                    "URI such as s3://bucket/..., or an absolute path that every node has"
                )
    _is_reachable(job.storage)  # which refuses what no filesystem is known for; the nodes try it
    reachable = tuple(uri for uri in job.datasets if _is_reachable(uri))
    if reachable:
        try:
            check_datasets(job.model_copy(update={"datasets": reachable}))
        except JobFileError as error:
            raise JobFileError(f"{shown}: {error}") from error
    _check_tracking(tracking or os.environ.get("MLFLOW_TRACKING_URI") or job.tracking.uri)
    return job


def _is_reachable(uri: str) -> bool:
    return look(lambda: _exists(uri)) is True


def _exists(uri: str) -> bool:
    try:
        return locate(uri).exists()
    except OSError:
        return False
    except DatasetError as error:
        if isinstance(error.__cause__, OSError):  # the scheme is known, its host does not answer
            return False
        raise


def _check_tracking(uri: str | None) -> None:
    """Complain of a store that answers and refuses us; one that does not answer is no fault yet."""
    if uri is not None and uri.startswith(("http://", "https://")):
        look(lambda: _complain_of_refusal(uri))


def _complain_of_refusal(uri: str) -> None:
    try:
        connect(uri)
    except TrackingRefusedError:
        raise
    except PwiserError:
        return


@contextmanager
def import_path(directory: Path | None) -> Iterator[None]:
    """Have modules of a directory found while the context lasts; of none where it is None.

    Raises:
        JobFileError: if it is not there.
    """
    if directory is None:
        yield
        return
    if not directory.is_dir():
        raise JobFileError(f"--working-dir {directory}: no such directory; name one")
    entry = str(directory.absolute())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
