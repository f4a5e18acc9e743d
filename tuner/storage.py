"""A job's storage: directories of small files on any pyarrow filesystem."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    wait_exponential,
)

from datasets import DatasetError
from datasets.filesystem import Location, join, locate, split_query
from tuner.errors import StorageError

__all__ = [
    "absolute_uri",
    "child_names",
    "delete",
    "discard",
    "download",
    "exists",
    "join",
    "local_path",
    "parent",
    "upload",
]
logger = logging.getLogger(__name__)


def _retrying(patience_s: float = 0.0) -> Retrying:
    """Call a function again where the storage fails: three times, and for as long as that."""
    return Retrying(
        retry=retry_if_exception_type(OSError),
        stop=stop_all(stop_after_attempt(4), stop_after_delay(patience_s)),
        wait=wait_exponential(multiplier=0.5, max=30),
        reraise=True,
    )


def absolute_uri(uri: str) -> str:
    """Make a local path absolute; leave a URI as it is, without a slash at its end.

    Raises:
        StorageError: if no filesystem is known for the URI.
    """
    if "://" in uri:
        _locate(uri)
        return join(uri)
    return str(Path(uri).expanduser().absolute())


def local_path(uri: str) -> Path | None:
    """The local path that a URI names; None for a remote one."""
    location = _locate(uri)
    return Path(location.path) if location.is_local else None


def parent(uri: str, levels: int) -> str:
    """Name the directory that many levels up."""
    directory, query = split_query(uri)
    return directory.rsplit("/", levels)[0] + query


def exists(uri: str, patience_s: float = 0.0) -> bool:
    """Whether anything lies at a URI.

    Args:
        uri: a path or URI.
        patience_s: for how long it is tried at least where the storage fails, in seconds.

    Raises:
        StorageError: if that cannot be told, in several tries.
    """
    try:
        found: bool = _retrying(patience_s)(_locate(uri).exists)
    except OSError as error:
        raise _unreadable(uri, error) from error
    return found


def child_names(uri: str) -> list[str]:
    """List what lies in a directory; nothing where there is none.

    Raises:
        StorageError: if it cannot be read, in several tries.
    """
    location = _locate(uri)
    selector = fs.FileSelector(location.path, allow_not_found=True)
    try:
        return [info.base_name for info in _retrying()(location.filesystem.get_file_info, selector)]
    except OSError as error:
        raise _unreadable(uri, error) from error


def upload(directory: Path, uri: str, patience_s: float = 0.0) -> None:
    """Copy a local directory's files to a URI; on a local path each appears whole or not at all.

    Args:
        directory: whose files are copied.
        uri: a path or URI, made where it is missing.
        patience_s: for how long it is tried at least where the storage fails, in seconds.

    Raises:
        StorageError: if the destination cannot be written, in several tries.
    """
    location = _locate(uri)
    try:
        if location.is_local:
            _retrying(patience_s)(_copy_whole, directory, Path(location.path))
        else:
            filesystem = location.filesystem
            _retrying(patience_s)(
                fs.copy_files, str(directory), location.path, destination_filesystem=filesystem
            )
    except OSError as error:
        raise StorageError(
            f"storage: cannot write {uri} ({error}); check access and space"
        ) from error


def _copy_whole(directory: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for source in sorted(directory.iterdir()):
        partial = target / f".{source.name}.partial"
        try:
            partial.write_bytes(source.read_bytes())
            partial.replace(target / source.name)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def download(uri: str, patience_s: float = 0.0) -> Iterator[Path]:
    """Give a directory's files as a local directory, for as long as the context lasts.

    Args:
        uri: a path or URI.
        patience_s: for how long it is tried at least where the storage fails, in seconds.

    Raises:
        StorageError: if there is nothing at the URI, or it cannot be read, in several tries.
    """
    if not exists(uri, patience_s):
        raise StorageError(f"storage: {uri} is not there; was it moved or deleted?")
    location = _locate(uri)
    if location.is_local:
        yield Path(location.path)
        return
    with tempfile.TemporaryDirectory() as directory:
        filesystem = location.filesystem
        try:
            _retrying(patience_s)(
                fs.copy_files, location.path, directory, source_filesystem=filesystem
            )
        except OSError as error:
            raise _unreadable(uri, error) from error
        yield Path(directory)


def delete(uri: str) -> None:
    """Delete a directory; harmless where there is none.

    Raises:
        StorageError: if it cannot be deleted, in several tries.
    """
    location = _locate(uri)
    try:
        if _retrying()(location.exists):
            _retrying()(location.filesystem.delete_dir, location.path)
    except OSError as error:
        raise StorageError(f"storage: cannot delete {uri} ({error}); check access") from error


def discard(uri: str) -> None:
    """Delete what nobody needs; what a storage keeps for now is worth no more than a warning."""
    try:
        delete(uri)
    except StorageError as error:
        logger.warning(error)


def _unreadable(uri: str, error: OSError) -> StorageError:
    return StorageError(f"storage: cannot read {uri} ({error}); check access and credentials")


def _locate(uri: str) -> Location:
    try:
        return locate(uri)
    except DatasetError as error:
        raise StorageError(f"storage: {error}") from error
