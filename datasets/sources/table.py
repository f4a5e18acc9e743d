"""Any CSV or Parquet table with a user's schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.errors import TableError
from datasets.filesystem import locate, refuse_existing
from datasets.labels import ConversionPolicy
from datasets.manifest import Manifest
from datasets.preparation import prepare
from datasets.progress import ReportProgress, report_nothing
from datasets.schema import Schema
from datasets.schema_file import read_schema
from datasets.source_map import MapSources, map_sources_here
from datasets.table_reader import TableFile, open_tables

__all__ = ["prepare_table"]


def prepare_table(
    *,
    input: str | Path,  # noqa: A002  (the option's name)
    schema: Schema | str | Path,
    out: str | Path,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    conversion_without_click: ConversionPolicy = "refuse",
    map_sources: MapSources = map_sources_here,
    report: ReportProgress = report_nothing,
) -> Manifest:
    """Prepare a dataset from the rows of train, or of each split.

    What a split is made from may be one file, a directory of files, or a path whose last part is a
    pattern; which files the rows lie in changes nothing.

    Args:
        input: The rows of train, from which missing splits are carved.
        schema: The roles of the columns, or the YAML file that gives them.
        out: The directory or URI to make; it must not exist.
        valid: The rows of valid, if they lie in a file of their own.
        test: The rows of test, likewise.
        conversion_without_click: Refuse such rows, drop them, or take them as clicked.
        map_sources: Does the work on the batches of the files: on this machine's cores, or
            elsewhere (``tuner.preparation_tasks``); the dataset is the same.
        report: Told how far the preparation is.

    Raises:
        SchemaError: The schema file cannot be used.
        TableError: A table is missing or breaks the schema, or a split is empty.
        OutputExistsError: Something lies at ``out``.
    """
    refuse_existing(locate(out), shown=str(out))
    where = "the schema" if isinstance(schema, Schema) else str(schema)
    roles = schema if isinstance(schema, Schema) else read_schema(schema)
    files = {"train": input, "valid": valid, "test": test}
    given = {name: path for name, path in files.items() if path is not None}
    read = frozenset(roles.columns) - frozenset(roles.drop)
    tables = {name: open_tables(path, read) for name, path in given.items()}
    _refuse_shared(tables)
    return prepare(
        roles,
        tables,
        out=out,
        source="table " + ", ".join(Path(path).name for path in given.values()),
        conversion_without_click=conversion_without_click,
        fill_fix="add fill: 0 (a number) to {name!r} under numerical in " + where,
        map_sources=map_sources,
        report=report,
    )


def _refuse_shared(tables: Mapping[str, Sequence[TableFile]]) -> None:
    """Refuse a file that is in two splits: what is trained on measures nothing."""
    options: dict[object, str] = {}
    for split, files in tables.items():
        option = "--input" if split == "train" else f"--{split}"
        for file in files:
            path = file.location.path
            place = Path(path).resolve() if file.location.is_local else path
            other = options.setdefault(place, option)
            if other != option:
                raise TableError(
                    f"{option} {file.name}: is among the files of {other} too; name files for "
                    f"{other} that hold no other split, by a pattern or a directory of their own"
                )
