"""Where data lies: a local path or any URI that pyarrow has a filesystem for."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from datasets.errors import DatasetError, OutputExistsError

__all__ = ["Location", "locate", "refuse_existing", "staged_directory"]


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


@contextlib.contextmanager
def staged_directory(target: Location, *, shown: str) -> Iterator[Location]:
    """Give a directory to write into that becomes ``target`` only if the block ends well.

    A local target is written as a sibling ``.<name>.partial-<pid>`` and renamed at the end. A
    remote one is written in place (its manifest comes last, so that an unfinished one does not
    open). On any exception, an interrupt included, all of it is removed, with the parents that were
    made.

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
    stage = final.parent / f".{final.name}.partial-{os.getpid()}"
    made_parents = [parent for parent in final.parents if not parent.exists()]
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield Location(target.filesystem, str(stage))
        refuse_existing(target, shown=shown)
        stage.rename(final)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def refuse_existing(target: Location, *, shown: str) -> None:
    """Refuse an output that is already there.

    Raises:
        OutputExistsError: Something lies at ``target``.
    """
    if target.exists():
        raise OutputExistsError(
            f"--out {shown}: already exists; give another directory or remove it first"
        )
