"""A prepared dataset: opened by its manifest, loaded split by split."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from datasets.encoder import Encoder
from datasets.errors import DatasetError
from datasets.filesystem import locate
from datasets.loading import Impressions, SplitReader, shared_impressions
from datasets.manifest import Manifest
from datasets.schema import id_columns
from datasets.streaming import StreamedSplit
from datasets.vocabulary import (
    PADDING_ID,
    VOCABULARIES_FILE,
    Vocabulary,
    id_type,
    read_vocabularies,
)

__all__ = ["Dataset", "Impressions", "SplitStatistics", "open_dataset", "statistics", "total"]

NUM_LABELS = 2  # a byte each


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, of which only the manifest has been read."""

    uri: str
    manifest: Manifest

    @property
    def name(self) -> str:
        """The last component of the path."""
        return locate(self.uri).name

    @property
    def digest(self) -> str:
        """The SHA-256 of the content."""
        return self.manifest.digest

    @property
    def row_bytes(self) -> int:
        """The size of one loaded impression: its features and two labels."""
        manifest = self.manifest
        id_bytes = np.dtype(id_type(max(manifest.vocabulary_sizes.values(), default=1))).itemsize
        feature_bytes = len(id_columns(manifest.table.categorical)) * id_bytes
        value_bytes = np.dtype(manifest.table.numerical_type).itemsize
        feature_bytes += len(manifest.table.numerical) * value_bytes
        return feature_bytes + NUM_LABELS

    def size_bytes(self, split: str) -> int:
        """Return the size of a split's arrays when they are loaded, without loading them."""
        return self.manifest.splits[split].impressions * self.row_bytes

    def encoder(self) -> Encoder:
        """Return what encodes raw features as this dataset's rows were encoded.

        Raises:
            DatasetError: The vocabularies are missing or damaged.
        """
        schema = self.manifest.table
        return Encoder(
            categorical=schema.categorical,
            numerical=schema.numerical,
            vocabularies=self._vocabularies(list(schema.categorical)),
            statistics=self.manifest.statistics,
            numerical_type=schema.numerical_type,
        )

    def load(self, split: str) -> Impressions:
        """Read a whole split into memory, rows in the order in which they are stored.

        Raises:
            DatasetError: There is no such split; a part is missing, damaged, or has other rows
                than the manifest says.
        """
        return self._reader(split).read()

    def load_shared(self, split: str) -> Impressions:
        """Like ``load``, but all processes of this node that ask share one copy of the arrays.

        They are mapped from files in a directory of this node (``PWISER_CACHE_DIR``); treat them
        as read-only.

        Raises:
            DatasetError: As ``load``, or the directory cannot be written.
        """
        return shared_impressions(self._reader(split), self.manifest, split)

    def stream(self, split: str) -> StreamedSplit:
        """Open a split to be read window by window; nothing but its row groups' sizes is read.

        Raises:
            DatasetError: As ``load``.
        """
        return StreamedSplit(self._reader(split))

    def raw_rows(self, split: str, num_rows: int) -> pa.Table:
        """Return the raw features of a split's first rows, for an example of what `Encoder` takes.

        A category that the vocabulary does not know is missing; those of a bag are lists.

        Raises:
            DatasetError: As ``load``.
        """
        rows = self._reader(split).first_rows(num_rows)
        fields = self.manifest.table.categorical
        vocabularies = self._vocabularies(list(fields))
        columns = {}
        for name, field in fields.items():
            known = (None, *vocabularies[name].values)
            own = [column for column, of in id_columns(fields).items() if of == name]
            cells = [
                [known[value] for value in ids if value != PADDING_ID]
                for ids in zip(*(rows.column(column).to_pylist() for column in own), strict=True)
            ]
            if field.num_ids == 1:
                columns[name] = pa.array([texts[0] for texts in cells], pa.string())
            else:
                columns[name] = pa.array(cells, pa.list_(pa.string()))
        for name in self.manifest.table.numerical:
            columns[name] = rows.column(name)
        return pa.table(columns)

    def _vocabularies(self, fields: list[str]) -> dict[str, Vocabulary]:
        recorded = self.manifest.files.get(VOCABULARIES_FILE)
        return read_vocabularies(locate(self.uri), fields, recorded)

    def _reader(self, split: str) -> SplitReader:
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise DatasetError(
                f"{self.uri}: no split {split!r} (it has {known}); prepare the dataset with one"
            )
        return SplitReader(self.uri, locate(self.uri), self.manifest, split, self.encoder())


def open_dataset(uri: str) -> Dataset:
    """Open a prepared dataset by reading its manifest alone.

    Args:
        uri: A local path or any URI that pyarrow has a filesystem for.

    Raises:
        DatasetError: Nothing is there, it is no prepared dataset, or its manifest is damaged.
    """
    return Dataset(uri=str(uri), manifest=Manifest.read(locate(uri), shown=str(uri)))


@dataclass(frozen=True)
class SplitStatistics:
    """The counts of one split, and their ratios; a ratio whose base is 0 is None."""

    impressions: int
    clicks: int
    conversions: int
    ctr: float | None
    cvr: float | None
    ctcvr: float | None


def statistics(dataset: Dataset) -> dict[str, SplitStatistics]:
    """Return the counts and ratios per split, as the manifest has them.

    CTR is clicks per impression, CVR conversions per click, CTCVR conversions per impression.
    """
    return {
        name: _statistics(split.impressions, split.clicks, split.conversions)
        for name, split in dataset.manifest.splits.items()
    }


def total(dataset: Dataset) -> SplitStatistics:
    """Return the counts and ratios of all splits together: a row of the paper's dataset table."""
    splits = dataset.manifest.splits.values()
    return _statistics(
        sum(split.impressions for split in splits),
        sum(split.clicks for split in splits),
        sum(split.conversions for split in splits),
    )


def _statistics(impressions: int, clicks: int, conversions: int) -> SplitStatistics:
    return SplitStatistics(
        impressions=impressions,
        clicks=clicks,
        conversions=conversions,
        ctr=_ratio(clicks, impressions),
        cvr=_ratio(conversions, clicks),
        ctcvr=_ratio(conversions, impressions),
    )


def _ratio(numerator: int, base: int) -> float | None:
    return numerator / base if base else None
