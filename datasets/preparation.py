"""From rows to a prepared dataset in two passes; memory holds vocabularies and a few batches.

The first pass checks every row of every input and gathers train's vocabularies and statistics; the
second encodes and writes. A source needs no more than to give its rows twice. Batches are worked on
by all cores and joined in their order, so that the result does not depend on the machine.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from datasets.batch_work import BatchWork, EncodedBatch, Survey
from datasets.cleaning import Cleaner, Findings
from datasets.digest import RowSum, dataset_digest
from datasets.encoder import Encoder
from datasets.errors import TableError
from datasets.filesystem import Location, locate, refuse_existing, staged_directory
from datasets.labels import ConversionPolicy
from datasets.manifest import Manifest, SplitSummary
from datasets.numerical import NumericalStatistics, largest_magnitude
from datasets.progress import ProgressReport, ReportProgress, report_nothing
from datasets.schema import Schema
from datasets.source_map import MapSources, SplitSource, map_sources_here
from datasets.split import SPLITS
from datasets.table_reader import RowSource
from datasets.vocabulary import (
    VOCABULARIES_FILE,
    Vocabulary,
    vocabularies_hash,
    write_vocabularies,
)
from datasets.writer import PartsWriter

__all__ = ["TRUTH_FOLDER", "prepare"]

TRUTH_FOLDER = "truth"


@dataclass
class _SplitOutput:
    """One split while it is written."""

    parts: PartsWriter
    truth: PartsWriter
    rows: RowSum = field(default_factory=RowSum)
    clicks: int = 0
    conversions: int = 0

    def add(self, batch: EncodedBatch) -> None:
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
        map_sources: MapSources,
        report: ReportProgress,
    ) -> None:
        self.schema = schema
        self.map_sources = map_sources
        self.report = report
        self.inputs = {
            name: tuple(given) if isinstance(given, Sequence) else (given,)
            for name, given in inputs.items()
        }
        self.sources = [
            SplitSource(name, rows) for name, given in self.inputs.items() for rows in given
        ]
        shares = {"valid": schema.split.valid, "test": schema.split.test}
        self.carved = tuple(
            name for name in SPLITS if name not in inputs and shares.get(name, 0.0) > 0
        )
        cleaner = Cleaner(schema, policy=policy, keep=truth)
        self.work = BatchWork(schema, cleaner, self.carved)
        self.splits = tuple(name for name in SPLITS if name in inputs or name in self.carved)

    def survey(self, *, fill_fix: str) -> tuple[Survey, Findings]:
        survey, all_findings = Survey.empty(self.schema), Findings()
        for source in self.sources:
            self.schema.check_columns(source.rows.columns, file=source.rows.name)
        with closing(self.map_sources(self.work.survey, self.sources)) as passes:
            for source, results in zip(self.sources, passes, strict=True):
                findings = Findings()
                for part, found in results:
                    survey.merge(part)
                    findings.merge(found)
                    self.report(ProgressReport("checking rows", survey.num_rows, None))
                findings.refuse(
                    source.rows.name, fill_fix=fill_fix, refuse_orphans=self.work.cleaner.refuses
                )
                all_findings.merge(findings)
        return survey, all_findings

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

    def encoder(self, survey: Survey) -> Encoder:
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
        with ExitStack() as stack:
            for output in outputs.values():
                stack.enter_context(output.parts)
                stack.enter_context(output.truth)
            encode = partial(self.work.encode, encoder)
            passes = stack.enter_context(closing(self.map_sources(encode, self.sources)))
            for results in passes:
                for encoded in results:
                    for split, part in encoded.items():
                        outputs[split].add(part)
                        done += part.rows.rows
                    self.report(ProgressReport("writing rows", done, num_rows))
        return outputs


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
    map_sources: MapSources = map_sources_here,
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
        map_sources: Does the work on the batches: on this machine's cores, or elsewhere.
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
        schema,
        inputs,
        policy=conversion_without_click,
        truth=truth,
        map_sources=map_sources,
        report=report,
    )
    survey, findings = preparation.survey(fill_fix=fill_fix)
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
            dropped_rows=findings.orphans.count if conversion_without_click == "drop" else 0,
            added_clicks=findings.orphans.count if conversion_without_click == "as-click" else 0,
            filled_cells=dict(sorted(findings.filled.items())),
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
