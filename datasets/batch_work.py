"""What preparation does with a batch of rows, wherever that is: check, count, encode."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.category import Categories
from datasets.cleaning import CleanBatch, Cleaner, Findings, take
from datasets.digest import RowSum
from datasets.encoder import Encoder
from datasets.numerical import RunningStatistics
from datasets.schema import Schema, id_columns
from datasets.source_map import SplitSource
from datasets.split import SPLITS
from datasets.table_reader import RawBatch
from datasets.vocabulary import count_categories, encode_categories, id_type
from datasets.writer import encoded_table

__all__ = ["BatchWork", "EncodedBatch", "Survey"]


@dataclass
class Survey:
    """What the first pass found in a batch, and in all of them once merged."""

    statistics: RunningStatistics
    counts: dict[str, Counter[str]]
    rows: Counter[str] = field(default_factory=Counter)

    @classmethod
    def empty(cls, schema: Schema) -> "Survey":
        """Return what no row shows."""
        return cls(
            statistics=RunningStatistics(schema.numerical),
            counts={name: Counter() for name in schema.categorical},
        )

    @property
    def num_rows(self) -> int:
        """Rows of all splits."""
        return self.rows.total()

    def merge(self, batch: "Survey") -> None:
        """Add what one batch showed, in the order of the batches."""
        self.statistics.merge(batch.statistics)
        for name, counts in batch.counts.items():
            known = self.counts[name]
            so_far = known.get
            for text, count in counts.items():  # Counter.update takes twice as long
                known[text] = so_far(text, 0) + count
        self.rows.update(batch.rows)


@dataclass(frozen=True)
class EncodedBatch:
    """Rows of one split, ready to be written."""

    rows: RowSum
    table: pa.Table
    truth: pa.Table | None
    clicks: int
    conversions: int


@dataclass(frozen=True)
class BatchWork:
    """The two passes over a batch; it travels to wherever the batch is read.

    Attributes:
        schema: the roles of the columns.
        cleaner: checks the rows.
        carved: the splits to carve from train's rows.
    """

    schema: Schema
    cleaner: Cleaner
    carved: tuple[str, ...]

    def survey(self, source: SplitSource, raw: RawBatch) -> tuple[Survey, Findings]:
        """Check a batch; count the categories and the values of its train rows."""
        survey, findings = Survey.empty(self.schema), Findings()
        for split, batch in self._rows_of(source, raw, findings).items():
            survey.rows[split] += len(batch.click_N)
            if split == "train":
                survey.statistics.update(batch.raw_ND)
                for name, counts in survey.counts.items():
                    count_categories(self._all_places(batch, name), counts)
        return survey, findings

    def encode(
        self, encoder: Encoder, source: SplitSource, raw: RawBatch
    ) -> dict[str, EncodedBatch]:
        """Encode a batch that the first pass let pass."""
        rows = self._rows_of(source, raw, Findings())
        known: dict[str, npt.NDArray[np.int32]] = {}
        for batch in rows.values():  # the parts of a batch share its texts, as the places of a bag
            for column, name in encoder.id_columns.items():
                if name not in known:
                    texts = batch.categories[column].texts
                    known[name] = encoder.vocabularies[name].ids_of(texts)
        return {split: _encode(batch, encoder, known) for split, batch in rows.items()}

    def _rows_of(
        self, source: SplitSource, raw: RawBatch, findings: Findings
    ) -> dict[str, CleanBatch]:
        """Check a batch; give its rows by the split that they belong to."""
        wanted = self.carved if source.split == "train" else ()
        batch = self.cleaner.clean(raw, file=source.rows.name, wanted=wanted, findings=findings)
        if not wanted:
            return {source.split: batch}
        parts = {split: take(batch, batch.split_N == i) for i, split in enumerate(SPLITS)}
        return {split: part for split, part in parts.items() if len(part.click_N)}

    def _all_places(self, batch: CleanBatch, name: str) -> Categories:
        """Return a field's categories; those of a bag one place after another."""
        field_of = id_columns(self.schema.categorical)
        places = [batch.categories[c] for c, field in field_of.items() if field == name]
        if len(places) == 1:
            return places[0]
        return Categories(np.concatenate([place.codes_N for place in places]), places[0].texts)


def _encode(
    batch: CleanBatch, encoder: Encoder, known: Mapping[str, npt.NDArray[np.int32]]
) -> EncodedBatch:
    field_of = encoder.id_columns
    ids = {
        column: encode_categories(batch.categories[column], known[name])
        for column, name in field_of.items()
    }
    ids_NF = np.empty((len(batch.click_N), len(ids)), np.int32)
    for index, column_N in enumerate(ids.values()):
        ids_NF[:, index] = column_N
    rows = RowSum()
    rows.update(ids_NF, batch.raw_ND, batch.click_N, batch.conversion_N)
    sizes = encoder.vocabulary_sizes
    table = encoded_table(
        {
            column: column_N.astype(id_type(sizes[field_of[column]]))
            for column, column_N in ids.items()
        },
        {name: batch.raw_ND[:, index] for index, name in enumerate(encoder.numerical)},
        click_N=batch.click_N,
        conversion_N=batch.conversion_N,
    )
    return EncodedBatch(
        rows=rows,
        table=table,
        truth=pa.table(batch.kept) if batch.kept else None,
        clicks=int(batch.click_N.sum()),
        conversions=int(batch.conversion_N.sum()),
    )
