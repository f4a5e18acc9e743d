"""What a prepared dataset says about itself: ``manifest.json``, written last."""

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from datasets.errors import DatasetError, one_line
from datasets.filesystem import Location
from datasets.numerical import NumericalStatistics
from datasets.schema import Schema

__all__ = ["FORMAT_VERSION", "MANIFEST_FILE", "FileSum", "Manifest", "SplitSummary"]

FORMAT_VERSION = 1
CHECKSUM = "checksum"
"""Key of the SHA-256 over everything else; a manifest that was written without is read, too."""
MANIFEST_FILE = "manifest.json"


class SplitSummary(BaseModel):
    """The counts of one split and the files that hold it, relative to the dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    impressions: int
    clicks: int
    conversions: int
    parts: tuple[str, ...]


class FileSum(BaseModel):
    """What a file held when it was written.

    Attributes:
        size_bytes: Of the whole file.
        sha256: Of the whole file.
        footer_sha256: Of a Parquet part's footer, which says where everything else is. It is
            checked whenever the part is opened; the pages have checksums of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    sha256: str
    footer_sha256: str | None = None


class Manifest(BaseModel):
    """Everything but the rows and the vocabularies.

    Attributes:
        format_version: The version of this layout.
        source: What the rows were made from, in words.
        table: The schema of the input (``schema`` in the file).
        vocabulary_sizes: The number of ids per categorical field, id 0 included.
        statistics: Train's statistics per numerical field.
        splits: The counts and parts per split.
        dropped_rows: Rows left out: conversions without a click, where that was chosen.
        added_clicks: Clicks added to conversions without one, where that was chosen.
        filled_cells: Empty, NaN or infinite cells that got the schema's fill, per field.
        counted: Oddities of raw files that were let pass, in words, and how many there were.
        files: Size and SHA-256 per file, relative to the dataset.
        digest: SHA-256 of the content (see the digest module).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    format_version: int = FORMAT_VERSION
    source: str
    table: Schema = Field(alias="schema")
    vocabulary_sizes: dict[str, int]
    statistics: dict[str, NumericalStatistics]
    splits: dict[str, SplitSummary]
    dropped_rows: int = 0
    added_clicks: int = 0
    filled_cells: dict[str, int] = Field(default_factory=dict)
    counted: dict[str, int] = Field(default_factory=dict)
    files: dict[str, FileSum] = Field(default_factory=dict)
    digest: str

    @property
    def bag_lengths(self) -> tuple[int, ...]:
        """The ids that a row has of each categorical field, 1 unless it is a bag."""
        return tuple(field.num_ids for field in self.table.categorical.values())

    def write(self, directory: Location) -> None:
        """Write the manifest into a dataset's directory, with a checksum of its own."""
        content = json.loads(self.model_dump_json(by_alias=True))
        text = json.dumps(content | {CHECKSUM: _checksum(content)}, indent=2)
        (directory / MANIFEST_FILE).write_bytes(text.encode() + b"\n")

    @classmethod
    def read(cls, directory: Location, *, shown: str) -> Self:
        """Read the manifest of the dataset in a directory.

        Raises:
            DatasetError: There is none, or it is damaged or of another version.
        """
        file = directory / MANIFEST_FILE
        try:
            exists, is_dataset = directory.exists(), file.is_file()
            content = file.read_bytes() if is_dataset else b""
        except OSError as error:
            reason = one_line(error)
            raise DatasetError(
                f"{shown}: cannot be read ({reason}); check the address and the credentials"
            ) from error
        make = "make one with 'pwiser data prepare' or 'pwiser data synth'"
        if not exists:
            raise DatasetError(f"{shown}: no such dataset; {make}")
        if not is_dataset:
            raise DatasetError(f"{shown}: not a prepared dataset (no {MANIFEST_FILE}); {make}")
        try:
            manifest = cls.model_validate(_checked(content))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise _damaged(shown, f"{key or 'content'}: {first['msg']}") from error
        except ValueError as error:
            raise _damaged(shown, str(error)) from error
        if manifest.format_version != FORMAT_VERSION:
            raise DatasetError(
                f"{shown}: {MANIFEST_FILE} has format_version {manifest.format_version}, this "
                f"release reads {FORMAT_VERSION}; prepare the dataset again"
            )
        return manifest


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(text: bytes) -> dict[str, Any]:
    """Read the JSON of a manifest, and take its checksum off.

    Raises:
        ValueError: It is no JSON object, or another than was written.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"content: invalid JSON: {one_line(error, None)}") from error
    if not isinstance(content, dict):
        raise ValueError("content: is no JSON object")
    checksum = content.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(content):
        raise ValueError("content: is not what was written, by its checksum")
    return content


def _damaged(shown: str, reason: str) -> DatasetError:
    return DatasetError(
        f"{shown}: {MANIFEST_FILE} is damaged ({reason}); prepare the dataset again"
    )
