"""Which id each category gets: id 0 is "unknown", the others follow how often train holds them.

A bag's places beyond the values of a cell hold ``PADDING_ID``, which is no id of any vocabulary and
counts for nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.category import Categories
from datasets.errors import DatasetError, one_line
from datasets.filesystem import HashingSink, Location
from datasets.manifest import FileSum

__all__ = [
    "PADDING_ID",
    "VOCABULARIES_FILE",
    "Vocabulary",
    "count_categories",
    "encode_categories",
    "id_type",
    "read_vocabularies",
    "vocabularies_hash",
    "write_vocabularies",
]

VOCABULARIES_FILE = "vocabularies.parquet"
PADDING_ID = -1


class Vocabulary:
    """The known values of one categorical field; value i has id i + 1, everything else id 0.

    Args:
        values: Canonical texts in the order of their ids.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self.values = tuple(values)
        self._id_of: dict[str | None, int] = {
            value: index for index, value in enumerate(self.values, start=1)
        }

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], *, min_count: int) -> "Vocabulary":
        """Build from train's counts: by descending count, then by value; rarer ones left out."""
        kept = [(-count, value) for value, count in counts.items() if count >= min_count]
        return cls([value for _, value in sorted(kept)])

    @property
    def size(self) -> int:
        """The number of ids, id 0 included."""
        return len(self.values) + 1

    def encode(self, categories: Categories) -> npt.NDArray[np.int32]:
        """Return the id of every row; missing and unseen categories get 0."""
        return encode_categories(categories, self.ids_of(categories.texts))

    def ids_of(self, texts: Sequence[str | None]) -> npt.NDArray[np.int32]:
        """Return the id of every text; None and unseen texts get 0."""
        known = self._id_of.get  # of None, a missing cell, it knows nothing either
        return np.asarray([known(text, 0) for text in texts], np.int32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)


def encode_categories(categories: Categories, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the id of every row, given those of the texts: 0 if missing, or the padding's."""
    encoded: npt.NDArray[np.int32] = categories.lookup(ids, missing=0, padding=PADDING_ID)
    return encoded


def count_categories(categories: Categories, counts: Counter[str]) -> None:
    """Add how often each category occurs to ``counts``, but for missing cells and padding."""
    present = categories.codes_N[categories.codes_N >= 0]
    occurrences = np.bincount(present, minlength=len(categories.texts)).tolist()
    found = {
        text: occurrence
        for text, occurrence in zip(categories.texts, occurrences, strict=True)
        if occurrence and text is not None
    }
    if not counts and len(found) == np.count_nonzero(occurrences):
        counts.update(found)  # of an empty counter that is a plain copy
        return
    for text, occurrence in zip(categories.texts, occurrences, strict=True):
        if text is not None and occurrence:
            counts[text] += occurrence


def id_type(size: int) -> type[np.int8] | type[np.int16] | type[np.int32]:
    """Return the smallest integer type that holds the ids of a vocabulary of ``size`` ids."""
    if size <= np.iinfo(np.int8).max + 1:
        return np.int8
    return np.int16 if size <= np.iinfo(np.int16).max + 1 else np.int32


def vocabularies_hash(vocabularies: Mapping[str, Vocabulary]) -> str:
    """Return the SHA-256 over every field's name and values in id order."""
    digest = hashlib.sha256()
    for field, vocabulary in vocabularies.items():
        for text in (field, str(len(vocabulary.values)), *vocabulary.values):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def write_vocabularies(vocabularies: Mapping[str, Vocabulary], directory: Location) -> FileSum:
    """Write all vocabularies as one Parquet file of (field, value) rows in id order."""
    fields = [name for name, vocabulary in vocabularies.items() for _ in vocabulary.values]
    values = [value for vocabulary in vocabularies.values() for value in vocabulary.values]
    columns = {"field": pa.array(fields, pa.string()), "value": pa.array(values, pa.string())}
    sink = HashingSink(directory / VOCABULARIES_FILE)
    pq.write_table(pa.table(columns), sink, compression="zstd")
    sink.close()
    return FileSum(size_bytes=sink.size_bytes, sha256=sink.hexdigest())


def read_vocabularies(
    directory: Location, fields: Sequence[str], recorded: FileSum | None = None
) -> dict[str, Vocabulary]:
    """Read the vocabularies of ``fields``; a field without rows knows no value.

    Args:
        directory: Where their file lies.
        fields: Names of categorical fields.
        recorded: What the file held when it was written, where that is known.

    Raises:
        DatasetError: The file is missing, damaged, or not what was written.
    """
    source = directory / VOCABULARIES_FILE
    try:
        content = source.read_bytes()
        if recorded is not None and hashlib.sha256(content).hexdigest() != recorded.sha256:
            raise ValueError("it is not what was written, by its checksum")
        table = pq.read_table(pa.BufferReader(content))
        names, values = table["field"].to_pylist(), table["value"].to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = one_line(error)
        raise DatasetError(
            f"{source.path}: cannot read the vocabularies ({reason}); prepare the dataset again"
        ) from error
    by_field: dict[str, list[str]] = {field: [] for field in fields}
    for name, value in zip(names, values, strict=True):
        if name in by_field:
            by_field[name].append(value)
    return {field: Vocabulary(known) for field, known in by_field.items()}
