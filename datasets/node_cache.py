"""Where a node keeps the arrays of splits that its processes share."""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from datasets.errors import DatasetError
from datasets.manifest import Manifest

__all__ = [
    "CACHE_VARIABLE",
    "READY",
    "cache_directory",
    "cache_entry",
    "cache_fault",
    "check_cache",
    "empty_entry",
    "locked",
    "make_cache",
    "remove_unused",
]

CACHE_VARIABLE = "PWISER_CACHE_DIR"
READY = "ready"
"""Name of the file that says that an entry is whole; its time is when somebody asked for it."""
_UNUSED_DAYS = 7
_ARRAYS = "*.npy"


def cache_directory() -> Path:
    """Return where this user's shared arrays lie, below ``PWISER_CACHE_DIR`` or temporary files."""
    parent = Path(os.environ.get(CACHE_VARIABLE) or tempfile.gettempdir())
    return parent / f"pwiser-cache-{os.getuid()}"


def make_cache() -> None:
    """Make the directory of the shared arrays, for this user alone.

    Raises:
        DatasetError: It is there, and others may have put things into it: its name is known to all.
        OSError: It cannot be made.
    """
    directory = cache_directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(exist_ok=True, mode=0o700)
    found = directory.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DatasetError(
            f"{directory}: is no directory that you alone can write (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}), so others may change the shared arrays; remove it, "
            f"or set {CACHE_VARIABLE} to another directory of this node"
        )


def cache_entry(manifest: Manifest, split: str) -> Path:
    """Return the directory of this node in which a split's shared arrays lie, or would."""
    key = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:12]
    return cache_directory() / f"{manifest.digest[:16]}-{key}-{split}"


@contextmanager
def locked(entry: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an entry's lock, which stays when all else is removed: others may wait for it.

    Raises:
        BlockingIOError: Another process has it, and this one does not wait.
        OSError: There is no such entry, or its lock cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(entry / "lock", flags, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def check_cache(sizes: Mapping[Path, int]) -> None:
    """Check that this node can keep shared arrays, beside those that it has already.

    The wanted ones that are there count as asked for; what `remove_unused` finds is removed.

    Args:
        sizes: Of the wanted entries, in bytes.

    Raises:
        DatasetError: The cache cannot be written, or has less room, or others can write it.
    """
    directory = cache_directory()
    try:
        make_cache()
        for entry in sizes:
            with suppress(FileNotFoundError):
                os.utime(entry / READY)
        remove_unused(directory)
        with tempfile.TemporaryFile(dir=directory):
            free_bytes = shutil.disk_usage(directory).free
        missing = sum(
            max(size - _held_bytes(entry), 0)  # another process may be writing it now
            for entry, size in sizes.items()
            if not (entry / READY).exists()
        )
        if free_bytes < missing:
            raise OSError(f"{missing} bytes needed, {free_bytes} are free")
    except OSError as error:
        raise cache_fault(directory, error) from error


def cache_fault(directory: Path, error: OSError) -> DatasetError:
    """Say that shared arrays cannot be kept in a directory, and what to do."""
    return DatasetError(
        f"{directory}: cannot keep the shared arrays here ({error}); make room or set "
        f"{CACHE_VARIABLE} to another directory of this node"
    )


def remove_unused(directory: Path) -> None:
    """Remove arrays that nobody has asked for in seven days, or that a killed process left.

    Who still has them mapped keeps them. An entry that is being written is left alone.
    """
    oldest = time.time() - _UNUSED_DAYS * 86_400
    for entry in directory.iterdir():
        with (
            suppress(BlockingIOError, FileNotFoundError, NotADirectoryError),
            locked(entry, wait=False),
        ):
            ready = entry / READY
            if not ready.exists() or ready.stat().st_mtime < oldest:
                empty_entry(entry)


def empty_entry(entry: Path) -> None:
    """Remove an entry's arrays; its lock has to be held."""
    (entry / READY).unlink(missing_ok=True)
    for array in entry.glob(_ARRAYS):
        array.unlink()


def _held_bytes(entry: Path) -> int:
    """Return what an entry's arrays take of the disk, whether or not they are written yet."""
    return sum(array.stat().st_blocks * 512 for array in entry.glob(_ARRAYS))
