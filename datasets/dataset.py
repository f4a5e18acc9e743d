"""A prepared dataset: opened by its manifest, loaded split by split.

Shape suffixes: N impressions, F categorical fields, D numerical fields.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.encoder import Encoder
from datasets.errors import DatasetError
from datasets.filesystem import Location, locate
from datasets.manifest import Manifest
from datasets.schema import CLICK, CONVERSION
from datasets.vocabulary import read_vocabularies

__all__ = ["Dataset", "Impressions", "SplitStatistics", "open_dataset", "statistics", "total"]


@dataclass(frozen=True)
class Impressions:
    """The rows of one split, ready for a model; all arrays are contiguous.

    Attributes:
        ids_NF: Category ids in the smallest integer type that holds the largest vocabulary.
        numericals_ND: Normalised numerical values, float32.
        clicks_N: 0 or 1, uint8.
        conversions_N: 0 or 1, uint8; 1 only where the click is 1.
    """

    ids_NF: npt.NDArray[np.signedinteger[Any]]
    numericals_ND: npt.NDArray[np.float32]
    clicks_N: npt.NDArray[np.uint8]
    conversions_N: npt.NDArray[np.uint8]

    @property
    def num_impressions(self) -> int:
        """The number of rows."""
        return len(self.clicks_N)


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

    def encoder(self) -> Encoder:
        """Return what encodes raw features as this dataset's rows were encoded.

        Raises:
            DatasetError: The vocabularies are missing or damaged.
        """
        schema = self.manifest.table
        return Encoder(
            categorical=schema.categorical,
            numerical=schema.numerical,
            vocabularies=read_vocabularies(locate(self.uri), list(schema.categorical)),
            statistics=self.manifest.statistics,
        )

    def load(self, split: str) -> Impressions:
        """Read a whole split into memory, rows in the order in which they are stored.

        Raises:
            DatasetError: There is no such split; a part is missing, damaged, or has other rows
                than the manifest says.
        """
        summary = self.manifest.splits.get(split)
        if summary is None:
            known = ", ".join(self.manifest.splits)
            raise DatasetError(
                f"{self.uri}: no split {split!r} (it has {known}); prepare the dataset with one"
            )
        encoder = self.encoder()
        num_rows = summary.impressions
        impressions = Impressions(
            ids_NF=np.empty((num_rows, len(encoder.categorical)), encoder.id_type),
            numericals_ND=np.empty((num_rows, len(encoder.numerical)), np.float32),
            clicks_N=np.empty(num_rows, np.uint8),
            conversions_N=np.empty(num_rows, np.uint8),
        )
        start = 0
        for part in summary.parts:
            start = self._load_part(locate(self.uri) / part, encoder, impressions, start)
        if start != num_rows:
            raise self._wrong_rows(split, num_rows, start)
        return impressions

    def _load_part(
        self, part: Location, encoder: Encoder, impressions: Impressions, start: int
    ) -> int:
        """Fill in the rows of one part from ``start``; return where the next part starts."""
        try:
            with part.filesystem.open_input_file(part.path) as stream:
                file = pq.ParquetFile(stream)
                if start + file.metadata.num_rows > impressions.num_impressions:
                    raise self._wrong_rows(
                        part.path, impressions.num_impressions, start + file.metadata.num_rows
                    )
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group)
                    _fill(impressions, rows, encoder, start)
                    start += rows.num_rows
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DatasetError(
                f"{self.uri}: cannot read {part.path} ({reason}); prepare the dataset again"
            ) from error
        return start

    def _wrong_rows(self, where: str, expected: int, found: int) -> DatasetError:
        return DatasetError(
            f"{self.uri}: {where} holds {found} rows, the manifest says {expected}; "
            "prepare the dataset again"
        )


def _fill(impressions: Impressions, rows: pa.Table, encoder: Encoder, start: int) -> None:
    stop = start + rows.num_rows
    for index, field in enumerate(encoder.categorical):
        impressions.ids_NF[start:stop, index] = rows.column(field).to_numpy()
    raw_ND = np.empty((rows.num_rows, len(encoder.numerical)), np.float32)
    for index, field in enumerate(encoder.numerical):
        raw_ND[:, index] = rows.column(field).to_numpy()
    impressions.numericals_ND[start:stop] = encoder.normalize(raw_ND)
    impressions.clicks_N[start:stop] = rows.column(CLICK).to_numpy()
    impressions.conversions_N[start:stop] = rows.column(CONVERSION).to_numpy()


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
