"""The Ali-CCP logs as Tianchi publishes them: impressions joined with their common features.

``sample_skeleton_<split>.csv`` has a row per impression (sample_id, click, conversion, index of the
common features, number of features, features), ``common_features_<split>.csv`` a row per index
(index, number of features, features); neither has a header. Multi-valued fields become bags of
the first values of their list, or are reduced to the very first. The common-feature index is the
group: it is one user in one context, and stays on one side when valid is carved.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from datasets.errors import TableError, one_line
from datasets.filesystem import locate, refuse_existing, working_directory
from datasets.join_engine import ROW_GROUP_ROWS, JoinedRows, connect, execute, quoted
from datasets.labels import ConversionPolicy
from datasets.manifest import Manifest
from datasets.pipeline import map_in_order
from datasets.preparation import prepare
from datasets.progress import ProgressReport, ReportProgress, report_nothing
from datasets.raw_files import RawFile, find_raw_file
from datasets.schema import MAX_VALUES, CategoricalField, Labels, Schema, SplitFractions
from datasets.sources.aliccp_features import FIELDS, MULTI_VALUED, FeatureListError, field_ids
from datasets.sources.aliexpress import carved_from_train
from datasets.table_reader import RawBatch

__all__ = ["MIN_COUNT", "aliccp_schema", "prepare_aliccp"]

MIN_COUNT = 10
GROUP = "common_feature_index"
_IMPRESSION = ("sample_id", "click", "conversion", GROUP, "feature_num", "features")
_COMMON = (GROUP, "feature_num", "features")
_BLOCK_BYTES = 8 << 20


def aliccp_schema(
    split: SplitFractions,
    *,
    min_count: int = MIN_COUNT,
    bags: Mapping[str, int] = MappingProxyType({}),
) -> Schema:
    """Return the schema of the joined rows: 23 categorical fields.

    Raises:
        TableError: A bag is of a field that is not there, or of less than one value.
    """
    for field, num_ids in bags.items():
        if field not in FIELDS:
            raise TableError(f"--bag {field}={num_ids}: no such field; known: {', '.join(FIELDS)}")
        if not 1 <= num_ids <= MAX_VALUES:
            raise TableError(f"--bag {field}={num_ids}: must be 1 to {MAX_VALUES} values")
    max_values = dict.fromkeys(MULTI_VALUED, 1) | dict(bags)
    return Schema(
        labels=Labels(click="click", conversion="conversion"),
        categorical={field: CategoricalField(max_values=max_values.get(field)) for field in FIELDS},
        group=GROUP,
        min_count=min_count,
        split=split,
    )


def prepare_aliccp(
    *,
    input: str | Path,  # noqa: A002  (the option's name)
    out: str | Path,
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    min_count: int = MIN_COUNT,
    bags: Mapping[str, int] = MappingProxyType({}),
    conversion_without_click: ConversionPolicy = "drop",
    report: ReportProgress = report_nothing,
) -> Manifest:
    """Prepare a dataset from the four raw files, plain or compressed.

    Args:
        input: A local directory with the files, or with zip archives that hold them.
        out: The directory or URI to make; it must not exist.
        valid_fraction: The share of train's common-feature rows whose impressions become valid.
        split_seed: Another seed carves others.
        min_count: Ids rarer than this in train become id 0.
        bags: Fields of which a row keeps its first values, and how many at most; of the others it
            keeps the first.
        conversion_without_click: Drop and count such rows, refuse them, or take them as clicked.
        report: Told how far the preparation is.

    Raises:
        TableError: A file is missing or breaks the raw format, a split is empty, or a bag is of no
            field.
        OutputExistsError: Something lies at ``out``.
    """
    target = locate(out)
    refuse_existing(target, shown=str(out))
    fractions = carved_from_train(valid_fraction, split_seed)
    if min_count < 1:
        raise TableError(f"--min-count {min_count}: must be at least 1")
    schema = aliccp_schema(fractions, min_count=min_count, bags=bags)
    with working_directory(target) as work:
        counted: Counter[str] = Counter()
        inputs = {
            split: _join_split(
                Path(input), split, _bags(schema), work=work, counted=counted, report=report
            )
            for split in ("train", "test")
        }
        return prepare(
            schema,
            inputs,
            out=out,
            source=_source(schema),
            conversion_without_click=conversion_without_click,
            counted=counted,
            report=report,
        )


def _bags(schema: Schema) -> dict[str, int]:
    return {name: field.num_ids for name, field in schema.categorical.items() if field.num_ids > 1}


def _source(schema: Schema) -> str:
    bags = [f"{name} up to {num_ids}" for name, num_ids in _bags(schema).items()]
    kept = f"bags {', '.join(bags)}, first value of other" if bags else "first value of"
    return f"aliccp, raw form, {kept} multi-valued fields"


@dataclass(frozen=True)
class _Layout:
    """The columns of one of the two kinds of file."""

    columns: tuple[str, ...]
    kept: tuple[str, ...]
    without_features: str  # how lists without a feature are called when they are counted


_IMPRESSIONS = _Layout(
    _IMPRESSION, ("click", "conversion", GROUP), "impressions without a feature of their own"
)
_COMMONS = _Layout(_COMMON, (GROUP,), "common-feature rows without a feature")


def _join_split(
    directory: Path,
    split: str,
    bags: Mapping[str, int],
    *,
    work: Path,
    counted: Counter[str],
    report: ReportProgress,
) -> JoinedRows:
    common = find_raw_file(directory, f"common_features_{split}", work=work)
    _stage(common, _COMMONS, bags, work / "common.parquet", counted, report)
    impression = find_raw_file(directory, f"sample_skeleton_{split}", work=work)
    _stage(impression, _IMPRESSIONS, bags, work / "impression.parquet", counted, report)
    out = work / f"{split}.parquet"
    with connect(work) as connection:
        _check_common(connection, common, work)
        execute(connection, _join_sql(work, out), phase=f"joining {split}", report=report)
    _check_lone(common, impression, out)
    for left in (work / "common.parquet", work / "impression.parquet", work / "engine.duckdb"):
        left.unlink()
    for file in (common, impression):
        if file.path.parent == work:  # unpacked from an archive
            file.path.unlink()
    return JoinedRows(impression.name, out, checks=("lone",))


def _stage(
    file: RawFile,
    layout: _Layout,
    bags: Mapping[str, int],
    out: Path,
    counted: Counter[str],
    report: ReportProgress,
) -> None:
    """Parse a raw file into a Parquet file with a column per field."""
    ids = {field: pa.list_(pa.int64()) if field in bags else pa.int64() for field in FIELDS}
    fields = [(name, pa.string()) for name in layout.kept] + list(ids.items())
    done, parse = 0, partial(_parse, file, layout, bags)
    with pq.ParquetWriter(out, pa.schema(fields), compression="lz4") as writer:
        for table, without in map_in_order(parse, _read(file, layout)):
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            counted[layout.without_features] += without
            done += table.num_rows
            report(ProgressReport(f"reading {file.path.name}", done, None))


def _read(file: RawFile, layout: _Layout) -> Iterator[RawBatch]:
    first_row = 1
    options = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in layout.columns}, strings_can_be_null=False
    )
    try:
        with (
            pa.input_stream(str(file.path), compression=file.compression) as stream,
            pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(
                    column_names=layout.columns, block_size=_BLOCK_BYTES
                ),
                parse_options=pacsv.ParseOptions(quote_char=False),
                convert_options=options,
            ) as reader,
        ):
            for batch in reader:
                yield RawBatch(first_row, batch)
                first_row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if "Empty CSV file" in str(error):
            raise TableError(f"{file.name}: the file is empty; fetch it again") from error
        raise _explain(file, layout, error, first_row - 1) from error


def _explain(file: RawFile, layout: _Layout, error: Exception, rows_read: int) -> TableError:
    """Find the line with too few or too many cells, which pyarrow does not number."""
    try:
        for row, line in enumerate(file.lines(), start=1):
            cells = line.count(b",") + 1
            if line and cells != len(layout.columns):
                return TableError(
                    f"{file.name}: row {row} has {cells} cells instead of {len(layout.columns)}; "
                    "mend or remove the line (a last line that is cut off means an unfinished "
                    "download)"
                )
    except OSError:
        pass  # the message of the first error says it
    reason = one_line(error)
    return TableError(
        f"{file.name}: not readable after row {rows_read} ({reason}); fetch the file again"
    )


def _parse(
    file: RawFile, layout: _Layout, bags: Mapping[str, int], batch: RawBatch
) -> tuple[pa.Table, int]:
    """Return the kept columns and the ids of a batch, and how many lists are empty."""
    rows = batch.rows
    try:
        found = field_ids(rows.column("features"), bags)
    except FeatureListError as error:
        raise TableError(
            f"{file.name}: row {batch.first_row + error.index}: {error.problem}; mend or remove "
            "the row"
        ) from error
    declared = rows.column("feature_num")
    written = pa.array(found.num_features_N).cast(pa.string())
    wrong = pc.not_equal(declared, written)
    if pc.any(wrong).as_py():
        index = int(np.argmax(wrong.to_numpy(zero_copy_only=False)))
        raise TableError(
            f"{file.name}: row {batch.first_row + index}: {written[index]} features where "
            f"feature_num says {declared[index].as_py()!r}; mend or remove the row (a last line "
            "that is cut off means an unfinished download)"
        )
    kept = {name: rows.column(name) for name in layout.kept}
    return pa.table({**kept, **found.columns}), int((found.num_features_N == 0).sum())


def _check_common(connection: duckdb.DuckDBPyConnection, common: RawFile, work: Path) -> None:
    twice = connection.execute(
        f"SELECT count(*), min({GROUP}) FROM (SELECT {GROUP} FROM "
        f"read_parquet({quoted(work / 'common.parquet')}) GROUP BY {GROUP} HAVING count(*) > 1)"
    ).fetchone()
    if twice and twice[0]:
        noun = "index has" if twice[0] == 1 else "indices have"
        raise TableError(
            f"{common.name}: {twice[0]} {noun} more than one row (the first is {twice[1]!r}); "
            "leave one row per common-feature index"
        )


def _join_sql(work: Path, out: Path) -> str:
    fields = ", ".join(f'coalesce(i."{f}", c."{f}") AS "{f}"' for f in FIELDS)
    return (
        f"COPY (SELECT i.click, i.conversion, i.{GROUP}, {fields}, "
        f"(c.{GROUP} IS NULL)::UTINYINT AS lone "
        f"FROM read_parquet({quoted(work / 'impression.parquet')}) AS i "
        f"LEFT JOIN read_parquet({quoted(work / 'common.parquet')}) AS c "
        f"ON i.{GROUP} = c.{GROUP}) TO {quoted(out)} "
        f"(FORMAT parquet, COMPRESSION lz4_raw, ROW_GROUP_SIZE {ROW_GROUP_ROWS})"
    )


def _check_lone(common: RawFile, impression: RawFile, out: Path) -> None:
    lone_N = pq.read_table(out, columns=["lone"])["lone"].to_numpy()
    if lone_N.any():
        row = int(lone_N.argmax())
        index = pq.read_table(out, columns=[GROUP])[GROUP][row].as_py()
        noun = "impression has" if lone_N.sum() == 1 else "impressions have"
        raise TableError(
            f"{impression.name}: {lone_N.sum()} {noun} a common-feature index that {common.name} "
            f"does not hold (row {row + 1}, index {index!r}); give the two files of one download"
        )
