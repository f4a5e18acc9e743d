"""Which faults are a lane's own, and not those of the trial that it has in hand."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from datasets.errors import PwiserError, one_line

__all__ = ["DISK_ERRORS", "LaneFaultError", "blaming_lane"]

DISK_ERRORS = (OSError, SafetensorError)
"""What a disk that cannot be written raises; safetensors tells of it by an error of its own."""


class LaneFaultError(Exception):
    """What keeps a lane from serving a trial, whichever: its node's disk, its device, a storage."""


@contextmanager
def blaming_lane(kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Blame the lane for what fails in the context.

    Args:
        kinds: of errors that are its fault.

    Raises:
        LaneFaultError: in the place of such an error, with its words.
    """
    try:
        yield
    except LaneFaultError:
        raise
    except kinds as error:
        name = "" if isinstance(error, PwiserError) else f"{type(error).__name__}: "
        raise LaneFaultError(name + one_line(error, None)) from error
