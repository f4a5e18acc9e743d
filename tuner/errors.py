"""The faults of the service; see `datasets.errors` for their root."""

from datasets.errors import PwiserError

__all__ = [
    "ClusterError",
    "EvidenceError",
    "JobFailedError",
    "JobFileError",
    "JobInterruptedError",
    "JobNotFoundError",
    "StorageError",
    "TrackingError",
    "TrackingRefusedError",
]


class JobFileError(PwiserError):
    """A job file that cannot be run."""


class ClusterError(PwiserError):
    """A cluster that cannot be reached or is too small for the job."""


class EvidenceError(PwiserError):
    """A winner that has not been shown to be better than its baseline."""


class TrackingError(PwiserError):
    """An MLflow tracking store that cannot be used."""


class TrackingRefusedError(TrackingError):
    """An MLflow server that answers, and refuses the user or what the user may do."""


class StorageError(PwiserError):
    """A storage location that cannot be read or written."""


class JobNotFoundError(PwiserError):
    """A job, or a part of one, that the tracking store does not hold."""


class JobFailedError(Exception):
    """A job that ended without a winner, through no fault of its file; the exit code is 1.

    Attributes:
        interrupted: whether somebody stopped it; the exit code is 130 then.
    """

    interrupted = False


class JobInterruptedError(JobFailedError):
    """A job that somebody stopped."""

    interrupted = True
