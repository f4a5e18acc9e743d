"""From rows to a prepared dataset in two passes; memory holds vocabularies and a few batches.

The first pass checks every row of every input and gathers train's vocabularies and statistics; the
second encodes and writes. A source needs no more than to give its rows twice. Batches are worked on
by all cores and joined in their order, so that the result does not depend on the machine.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.category import Categories
from datasets.cleaning import CleanBatch, Cleaner, Findings, take
from datasets.digest import RowSum, dataset_digest
from datasets.encoder import Encoder
from datasets.errors import TableError
from datasets.filesystem import Location, locate, refuse_existing, staged_directory
from datasets.labels import ConversionPolicy
from datasets.manifest import Manifest, SplitSummary
from datasets.numerical import NumericalStatistics, RunningStatistics, largest_magnitude
from datasets.pipeline import map_in_order
from datasets.progress import ProgressReport, ReportProgress, report_nothing
from datasets.schema import Schema, id_columns
from datasets.split import SPLITS
from datasets.table_reader import RawBatch, RowSource
from datasets.vocabulary import (
    VOCABULARIES_FILE,
    Vocabulary,
    count_categories,
    encode_categories,
    id_type,
    vocabularies_hash,
    write_vocabularies,
)
from datasets.writer import PartsWriter, encoded_table

__all__ = ["TRUTH_FOLDER", "prepare"]

TRUTH_FOLDER = "truth"


@dataclass
class _Survey:
    """What the first pass found."""

    statistics: RunningStatistics
    counts: dict[str, Counter[str]]
    rows: Counter[str] = field(default_factory=Counter)
    orphans: int = 0
    filled: Counter[str] = field(default_factory=Counter)

    @property
    def num_rows(self) -> int:
        return self.rows.total()

    def merge(self, batch: "_Survey") -> None:
        """Add what one batch showed, in the order of the batches."""
        self.statistics.merge(batch.statistics)
        for name, counts in batch.counts.items():
            known = self.counts[name]
            so_far = known.get
            for text, count in counts.items():  # Counter.update takes twice as long
                known[text] = so_far(text, 0) + count
        self.rows.update(batch.rows)


@dataclass(frozen=True)
class _EncodedBatch:
    """Rows of one split, ready to be written."""

    rows: RowSum
    table: pa.Table
    truth: pa.Table | None
    clicks: int
    conversions: int


@dataclass
class _SplitOutput:
    """One split while it is written."""

    parts: PartsWriter
    truth: PartsWriter
    rows: RowSum = field(default_factory=RowSum)
    clicks: int = 0
    conversions: int = 0

    def add(self, batch: _EncodedBatch) -> None:
        """Write rows and count them."""
        self.parts.write(batch.table)
        if batch.truth is not None:
            self.truth.write(batch.truth)
        self.rows.merge(batch.rows)
        self.clicks += batch.clicks
        self.conversions += batch.conversions

    def summary(self) -> SplitSummary:
        return SplitSummary(
            impressions=self.rows.rows,
            clicks=self.clicks,
            conversions=self.conversions,
            parts=tuple(self.parts.parts),
        )


class _Preparation:
    def __init__(
        self,
        schema: Schema,
        inputs: Mapping[str, RowSource | Sequence[RowSource]],
        *,
        policy: ConversionPolicy,
        truth: tuple[str, ...],
        report: ReportProgress,
    ) -> None:
        self.schema = schema
        self.report = report
        self.inputs = {
            name: tuple(given) if isinstance(given, Sequence) else (given,)
            for name, given in inputs.items()
        }
        self.sources = [(name, one) for name, given in self.inputs.items() for one in given]
        self.cleaner = Cleaner(schema, policy=policy, keep=truth)
        shares = {"valid": schema.split.valid, "test": schema.split.test}
        self.carved = tuple(
            name for name in SPLITS if name not in inputs and shares.get(name, 0.0) > 0
        )
        self.field_of = id_columns(schema.categorical)
        self.splits = tuple(name for name in SPLITS if name in inputs or name in self.carved)

    def rows_of(
        self, name: str, file: str, raw: RawBatch, findings: Findings
    ) -> dict[str, CleanBatch]:
        """Check a batch of one input; give its rows by the split that they belong to."""
        wanted = self.carved if name == "train" else ()
        batch = self.cleaner.clean(raw, file=file, wanted=wanted, findings=findings)
        if not wanted:
            return {name: batch}
        parts = {split: take(batch, batch.split_N == i) for i, split in enumerate(SPLITS)}
        return {split: part for split, part in parts.items() if len(part.click_N)}

    def survey(self, *, fill_fix: str) -> _Survey:
        survey = self.empty_survey()
        for _, source in self.sources:
            self.schema.check_columns(source.columns, file=source.name)
        for name, source in self.sources:
            findings = Findings()
            survey_batch = partial(self.survey_batch, name, source.name)
            for part, found in map_in_order(survey_batch, source.batches()):
                survey.merge(part)
                findings.merge(found)
                self.report(ProgressReport("checking rows", survey.num_rows, None))
            findings.refuse(source.name, fill_fix=fill_fix, refuse_orphans=self.cleaner.refuses)
            survey.orphans += findings.orphans.count
            survey.filled += findings.filled
        return survey

    def empty_survey(self) -> _Survey:
        return _Survey(
            statistics=RunningStatistics(self.schema.numerical),
            counts={name: Counter() for name in self.schema.categorical},
        )

    def survey_batch(self, name: str, file: str, raw: RawBatch) -> tuple[_Survey, Findings]:
        survey, findings = self.empty_survey(), Findings()
        for split, batch in self.rows_of(name, file, raw, findings).items():
            survey.rows[split] += len(batch.click_N)
            if split == "train":
                survey.statistics.update(batch.raw_ND)
                for field_name, counts in survey.counts.items():
                    count_categories(self.all_places(batch, field_name), counts)
        return survey, findings

    def all_places(self, batch: CleanBatch, name: str) -> Categories:
        """Return a field's categories; those of a bag one place after another."""
        places = [batch.categories[c] for c, field in self.field_of.items() if field == name]
        if len(places) == 1:
            return places[0]
        return Categories(np.concatenate([place.codes_N for place in places]), places[0].texts)

    def check_splits(self, rows: Mapping[str, int]) -> None:
        train = self.shown("train")
        for name in self.splits:
            if rows.get(name, 0):
                continue
            if name in self.inputs:
                raise TableError(
                    f"{self.shown(name)}: no row, so the {name} split would be empty; "
                    "give a file with rows"
                )
            share = self.schema.split.valid if name == "valid" else self.schema.split.test
            raise TableError(
                f"{train}: no row falls into the {name} split (split.{name}: {share:g} of "
                f"{sum(rows.values())} rows, seed {self.schema.split.seed}); give --{name} FILE, a "
                f"larger split.{name} or another split.seed"
            )
        if not rows.get("train", 0):
            raise TableError(f"{train}: no row stays in the train split; give more rows")

    def shown(self, name: str) -> str:
        """What messages call the input of a split as a whole."""
        first, *more = self.inputs[name]
        return f"{first.name} and {len(more)} more" if more else first.name

    def encoder(self, survey: _Survey) -> Encoder:
        vocabularies = {
            name: Vocabulary.from_counts(counts, min_count=self.schema.min_count_of(name))
            for name, counts in survey.counts.items()
        }
        return Encoder(
            categorical=self.schema.categorical,
            numerical=self.schema.numerical,
            vocabularies=vocabularies,
            statistics=self.checked(survey.statistics.result()),
            numerical_type=self.schema.numerical_type,
        )

    def checked(self, statistics: dict[str, NumericalStatistics]) -> dict[str, NumericalStatistics]:
        """Refuse a train split whose normalised values are too large for their type."""
        limit = float(np.finfo(self.schema.numerical_type).max)
        for name, field_ in self.schema.numerical.items():
            reached = largest_magnitude(field_, statistics[name])
            if reached > limit:
                raise TableError(
                    f"{self.shown('train')}: column {name!r} reaches {reached:.6g} with "
                    f"normalize: {field_.normalize}, {self.schema.numerical_type} ends at "
                    f"{limit:g}; choose another normalize, or numerical_type: float32"
                )
        return statistics

    def write(
        self, encoder: Encoder, directory: Location, *, num_rows: int
    ) -> dict[str, _SplitOutput]:
        outputs = {
            name: _SplitOutput(
                parts=PartsWriter(directory, name),
                truth=PartsWriter(directory, f"{TRUTH_FOLDER}/{name}"),
            )
            for name in self.splits
        }
        done = 0
        with contextlib.ExitStack() as stack:
            for output in outputs.values():
                stack.enter_context(output.parts)
                stack.enter_context(output.truth)
            for name, source in self.sources:
                encode = partial(self.encode_batch, name, source.name, encoder)
                for encoded in map_in_order(encode, source.batches()):
                    for split, part in encoded.items():
                        outputs[split].add(part)
                        done += part.rows.rows
                    self.report(ProgressReport("writing rows", done, num_rows))
        return outputs

    def encode_batch(
        self, name: str, file: str, encoder: Encoder, raw: RawBatch
    ) -> dict[str, _EncodedBatch]:
        rows = self.rows_of(name, file, raw, Findings())
        known: dict[str, npt.NDArray[np.int32]] = {}
        for batch in rows.values():  # the parts of a batch share its texts, as the places of a bag
            for column, field_name in encoder.id_columns.items():
                if field_name not in known:
                    texts = batch.categories[column].texts
                    known[field_name] = encoder.vocabularies[field_name].ids_of(texts)
        return {split: _encode_batch(batch, encoder, known) for split, batch in rows.items()}


def _encode_batch(
    batch: CleanBatch, encoder: Encoder, known: Mapping[str, npt.NDArray[np.int32]]
) -> _EncodedBatch:
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
    return _EncodedBatch(
        rows=rows,
        table=table,
        truth=pa.table(batch.kept) if batch.kept else None,
        clicks=int(batch.click_N.sum()),
        conversions=int(batch.conversion_N.sum()),
    )


def prepare(
    schema: Schema,
    inputs: Mapping[str, RowSource | Sequence[RowSource]],
    *,
    out: str | Path,
    source: str,
    conversion_without_click: ConversionPolicy = "refuse",
    truth: tuple[str, ...] = (),
    fill_fix: str = "add fill: 0 (a number) to {name!r} under numerical in the schema",
    counted: Mapping[str, int] | None = None,
    report: ReportProgress = report_nothing,
) -> Manifest:
    """Prepare a dataset from the rows of each given split.

    Args:
        schema: The roles of the columns; splits that are not given are carved as it says.
        inputs: The rows per split, from one source or from several that are read one after
            another; ``train`` is needed.
        out: The directory or URI to make; it must not exist.
        source: What the manifest says the rows were made from.
        conversion_without_click: Refuse such rows, drop them, or take them as clicked.
        truth: Further columns of the rows to keep under ``truth/<split>``, row by row.
        fill_fix: The end of the message for an empty cell, with the field as ``name``.
        counted: Oddities of the raw files that the source let pass, for the manifest.
        report: Told how far the preparation is.

    Returns:
        The manifest of the finished dataset.

    Raises:
        OutputExistsError: Something lies at ``out``.
        TableError: The rows break the schema, or a split is empty. Nothing is written then.
    """
    target = locate(out)
    refuse_existing(target, shown=str(out))
    preparation = _Preparation(
        schema, inputs, policy=conversion_without_click, truth=truth, report=report
    )
    survey = preparation.survey(fill_fix=fill_fix)
    preparation.check_splits(survey.rows)
    encoder = preparation.encoder(survey)
    with staged_directory(target, shown=str(out)) as directory:
        outputs = preparation.write(encoder, directory, num_rows=survey.num_rows)
        files = {VOCABULARIES_FILE: write_vocabularies(encoder.vocabularies, directory)}
        for output in outputs.values():
            files |= output.parts.files | output.truth.files
        manifest = Manifest(
            source=source,
            table=schema,
            vocabulary_sizes=encoder.vocabulary_sizes,
            statistics=encoder.statistics,
            splits={name: output.summary() for name, output in outputs.items()},
            dropped_rows=survey.orphans if conversion_without_click == "drop" else 0,
            added_clicks=survey.orphans if conversion_without_click == "as-click" else 0,
            filled_cells=dict(sorted(survey.filled.items())),
            counted={what: count for what, count in (counted or {}).items() if count},
            files=files,
            digest=dataset_digest(
                schema,
                vocabularies_hash=vocabularies_hash(encoder.vocabularies),
                row_sums={name: output.rows for name, output in outputs.items()},
            ),
        )
        manifest.write(directory)
    return manifest
