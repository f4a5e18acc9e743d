"""Where data lies: a local path or any URI that pyarrow has a filesystem for."""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from datasets.errors import DatasetError, OutputExistsError

__all__ = [
    "HashingSink",
    "Location",
    "join",
    "locate",
    "refuse_existing",
    "split_query",
    "staged_directory",
    "working_directory",
]


@dataclass(frozen=True)
class Location:
    """A path on a pyarrow filesystem."""

    filesystem: pafs.FileSystem
    path: str

    def __truediv__(self, child: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{child}")

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether the path is on this machine's own filesystem."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def is_file(self) -> bool:
        """Return whether a regular file lies here."""
        return bool(self._type() == pafs.FileType.File)

    def exists(self) -> bool:
        """Return whether anything lies here."""
        return bool(self._type() != pafs.FileType.NotFound)

    def _type(self) -> pafs.FileType:
        return self.filesystem.get_file_info(self.path).type

    def read_bytes(self) -> bytes:
        """Return the whole content of the file."""
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.readall())

    def write_bytes(self, content: bytes) -> None:
        """Write ``content`` as the whole file; its directory is made where it is missing."""
        self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
        with self.filesystem.open_output_stream(self.path, compression=None) as stream:
            stream.write(content)


def locate(uri: str | Path) -> Location:
    """Return the location that a local path or a URI names.

    Args:
        uri: A local path (made absolute against the working directory), or a URI with a scheme
            that pyarrow knows: ``file``, ``s3``, ``gs``, ``abfs``, ``hdfs``.

    Raises:
        DatasetError: pyarrow has no filesystem for the URI.
    """
    text = str(uri)
    if "://" not in text:
        return Location(pafs.LocalFileSystem(), str(Path(text).expanduser().absolute()))
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(
            f"{text}: no filesystem for this URI ({reason}); "
            "give a local path or a URI such as s3://bucket/dataset"
        ) from error
    return Location(filesystem, path)


def split_query(uri: str) -> tuple[str, str]:
    """Split a URI into what names a place and its query, with its question mark.

    A local path has no query.
    """
    if "://" not in uri:
        return uri, ""
    place, mark, query = uri.partition("?")
    return place, mark + query


def join(uri: str, *parts: str) -> str:
    """Name something below a directory; a URI's query stays at its end."""
    directory, query = split_query(uri)
    return "/".join([directory.rstrip("/"), *parts]) + query


class HashingSink:
    """A file to write that knows the size and the SHA-256 of what went through it."""

    def __init__(self, target: Location) -> None:
        folder = target.path.rsplit("/", 1)[0]
        target.filesystem.create_dir(folder, recursive=True)
        self._stream = target.filesystem.open_output_stream(target.path, compression=None)
        self._sha256 = hashlib.sha256()
        self._end_sha256: hashlib._Hash | None = None
        self.size_bytes = 0
        self.closed = False

    def write(self, content: bytes) -> int:
        """Append bytes."""
        self._sha256.update(content)
        if self._end_sha256 is not None:
            self._end_sha256.update(content)
        self._stream.write(content)
        self.size_bytes += len(content)
        return len(content)

    def tell(self) -> int:
        """Return how much has been written."""
        return self.size_bytes

    def flush(self) -> None:
        """Leave it to the filesystem when bytes go out."""

    def close(self) -> None:
        """Finish the file."""
        if not self.closed:
            self.closed = True
            self._stream.close()

    def hexdigest(self) -> str:
        """Return the SHA-256 of what has been written."""
        return self._sha256.hexdigest()

    def begin_end(self) -> None:
        """Say that what follows is the file's end, which has a SHA-256 of its own."""
        self._end_sha256 = hashlib.sha256()

    def end_hexdigest(self) -> str:
        """Return the SHA-256 of what has been written since `begin_end`."""
        assert self._end_sha256 is not None
        return self._end_sha256.hexdigest()


@contextlib.contextmanager
def staged_directory(target: Location, *, shown: str) -> Iterator[Location]:
    """Give a directory to write into that becomes ``target`` only if the block ends well.

    A local target is written as a sibling ``.<name>.partial-<host>-<pid>`` and renamed at the end;
    what processes that are dead have left of the same target is removed first. A remote one is
    written in place (its manifest comes last, so that an unfinished one does not open). On any
    exception, an interrupt included, all of it is removed, with the parents that were made.

    Args:
        target: The directory that must not exist yet.
        shown: The target as the user wrote it, for the message.

    Raises:
        OutputExistsError: Something already lies at ``target``.
    """
    refuse_existing(target, shown=shown)
    if not target.is_local:
        try:
            yield target
        except BaseException:
            if target.exists():
                target.filesystem.delete_dir(target.path)
            raise
        return
    final = Path(target.path)
    with _own_directory(final, "partial") as stage:
        yield Location(target.filesystem, str(stage))
        refuse_existing(target, shown=shown)
        stage.rename(final)


@contextlib.contextmanager
def working_directory(target: Location) -> Iterator[Path]:
    """Give a local directory for intermediate files, removed when the block ends in any way.

    It lies beside a local target, where there is room for the result, as
    ``.<name>.work-<host>-<pid>``; for a remote one it is a temporary directory.
    """
    if not target.is_local:
        with tempfile.TemporaryDirectory(prefix="pwiser-") as directory:
            yield Path(directory)
        return
    with _own_directory(Path(target.path), "work") as directory:
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _own_directory(final: Path, kind: str) -> Iterator[Path]:
    """Make a hidden sibling of ``final``; on an exception it goes, with the parents made for it."""
    stem = f".{final.name}.{kind}-{socket.gethostname()}-"
    own = final.parent / f"{stem}{os.getpid()}"
    made_parents = [parent for parent in final.parents if not parent.exists()]
    if final.parent.is_dir():
        for left in final.parent.iterdir():
            if left.name.startswith(stem) and not _is_alive(left.name.removeprefix(stem)):
                shutil.rmtree(left, ignore_errors=True)
    try:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        yield own
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _is_alive(process: str) -> bool:
    if not process.isdecimal():
        return True  # not a name of ours: let it be
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def refuse_existing(target: Location, *, shown: str) -> None:
    """Refuse an output that is already there.

    Raises:
        OutputExistsError: Something lies at ``target``.
    """
    if target.exists():
        raise OutputExistsError(
            f"--out {shown}: already exists; give another directory or remove it first"
        )
