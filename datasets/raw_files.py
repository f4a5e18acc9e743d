"""Raw text files as their publishers give them: plain, or compressed as gz, zst or zip."""

import io
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from datasets.errors import TableError

__all__ = ["RawFile", "find_raw_file"]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class RawFile:
    """A raw file that can be read.

    Attributes:
        name: What messages call it, as the user would find it.
        path: The file to read; an archive's member has been unpacked to it.
        compression: How pyarrow and DuckDB call the compression, None for plain text.
    """

    name: str
    path: Path
    compression: str | None

    def lines(self) -> Iterator[bytes]:
        """Read the lines, each without its end; a damaged stream ends with an OSError."""
        with pa.input_stream(str(self.path), compression=self.compression) as stream:
            for line in io.BufferedReader(stream, 1 << 20):
                yield line.rstrip(b"\r\n")


def find_raw_file(directory: Path, stem: str, *, work: Path) -> RawFile:
    """Find ``<stem>.csv`` in a directory, plain or compressed, or inside a zip archive there.

    Looked for in this order: ``stem.csv``, ``stem.csv.gz``, ``stem.csv.zst``, then any zip archive
    that has a member of that name, in whatever folder. A member is unpacked into ``work``.

    Raises:
        TableError: It is nowhere, or an archive is damaged.
    """
    wanted = f"{stem}.csv"
    for suffix in ("", *_COMPRESSIONS):
        path = directory / f"{wanted}{suffix}"
        if path.is_file():
            return RawFile(str(path), path, _COMPRESSIONS.get(suffix))
    for archive in sorted(directory.glob("*.zip")):
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.namelist():
                    if Path(member).name == wanted:
                        with opened.open(member) as packed, (work / wanted).open("wb") as unpacked:
                            shutil.copyfileobj(packed, unpacked, 1 << 20)
                        return RawFile(f"{archive}:{member}", work / wanted, None)
        except _ZIP_FAULTS as error:
            raise TableError(f"{archive}: not readable as zip ({error}); fetch it again") from error
    raise TableError(
        f"--input {directory}: no {wanted} in it (nor {wanted}.gz, {wanted}.zst, nor in a zip "
        "archive); give the directory that holds the raw files"
    )
