"""The AliExpress search logs, in their processed form or raw.

The processed form is ``search_id, categorical_1..16, numerical_1..63, click, conversion`` in
``train.csv`` and ``test.csv``; the raw form is joined into it. Seen in the public samples: every
cell is there, categoricals are integers, numericals are decimals mostly scaled to 0..1, some of
them constant. So the built-in schema fills nothing: an empty cell of a numerical column means a
damaged file, and is refused.
"""

from pathlib import Path

from datasets.errors import TableError
from datasets.filesystem import join, locate, refuse_existing, working_directory
from datasets.labels import ConversionPolicy
from datasets.manifest import Manifest
from datasets.preparation import prepare
from datasets.progress import ReportProgress, report_nothing
from datasets.schema import (
    CategoricalField,
    Labels,
    NumericalField,
    NumericalType,
    Schema,
    SplitFractions,
)
from datasets.sources.aliexpress_raw import COUNTRIES, join_aliexpress
from datasets.table_reader import open_table

__all__ = [
    "NUM_CATEGORICALS",
    "NUM_NUMERICALS",
    "aliexpress_schema",
    "carved_from_train",
    "prepare_aliexpress",
    "prepare_aliexpress_raw",
]

_FILL_FIX = "use 'pwiser data prepare table' with a schema that gives {name!r} a fill"

NUM_CATEGORICALS = 16
NUM_NUMERICALS = 63


def aliexpress_schema(
    split: SplitFractions, *, numerical_type: NumericalType = "float32"
) -> Schema:
    """Return the schema of the processed form; search sessions are the groups."""
    return Schema(
        labels=Labels(click="click", conversion="conversion"),
        categorical={
            f"categorical_{i}": CategoricalField() for i in range(1, NUM_CATEGORICALS + 1)
        },
        numerical={f"numerical_{i}": NumericalField() for i in range(1, NUM_NUMERICALS + 1)},
        numerical_type=numerical_type,
        group="search_id",
        split=split,
    )


def prepare_aliexpress(
    *,
    input: str | Path,  # noqa: A002  (the option's name)
    out: str | Path,
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    numerical_type: NumericalType = "float32",
    conversion_without_click: ConversionPolicy = "refuse",
    report: ReportProgress = report_nothing,
) -> Manifest:
    """Prepare a dataset from a directory with ``train.csv`` and ``test.csv``.

    The official test split stays the test split; valid is carved from train by search session.

    Args:
        input: The directory.
        out: The directory or URI to make; it must not exist.
        valid_fraction: The share of train's sessions that become valid; above 0 and below 1.
        split_seed: Another seed carves other sessions.
        numerical_type: Of the loaded numericals; float16 halves their memory.
        conversion_without_click: Refuse such rows, drop them, or take them as clicked.
        report: Told how far the preparation is.

    Raises:
        TableError: A file is missing or not in the processed form, or a split is empty.
        OutputExistsError: Something lies at ``out``.
    """
    refuse_existing(locate(out), shown=str(out))
    fractions = carved_from_train(valid_fraction, split_seed)
    files = {name: join(str(input), f"{name}.csv") for name in ("train", "test")}
    for name, file in files.items():
        if not locate(file).is_file():
            raise TableError(
                f"--input {input}: no {name}.csv in it; give the directory that holds train.csv "
                "and test.csv in the processed form"
            )
    return prepare(
        aliexpress_schema(fractions, numerical_type=numerical_type),
        {name: open_table(file) for name, file in files.items()},
        out=out,
        source="aliexpress, processed form",
        conversion_without_click=conversion_without_click,
        fill_fix=_FILL_FIX,
        report=report,
    )


def prepare_aliexpress_raw(
    *,
    input: str | Path,  # noqa: A002  (the option's name)
    country: str,
    out: str | Path,
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    numerical_type: NumericalType = "float32",
    report: ReportProgress = report_nothing,
) -> Manifest:
    """Prepare a dataset from the four raw files of a country, plain or compressed.

    The same rows give the same digest as their processed form.

    Args:
        input: A local directory with the files, or with zip archives that hold them.
        country: nl, fr, us, es or ru.
        out: The directory or URI to make; it must not exist.
        valid_fraction: The share of train's sessions that become valid; above 0 and below 1.
        split_seed: Another seed carves other sessions.
        numerical_type: Of the loaded numericals; float16 halves their memory.
        report: Told how far the preparation is.

    Raises:
        TableError: A file is missing or breaks the raw format, or a split is empty.
        OutputExistsError: Something lies at ``out``.
    """
    target = locate(out)
    refuse_existing(target, shown=str(out))
    fractions = carved_from_train(valid_fraction, split_seed)
    if country not in COUNTRIES:
        raise TableError(f"--country {country}: unknown; known: {', '.join(COUNTRIES)}")
    with working_directory(target) as work:
        return prepare(
            aliexpress_schema(fractions, numerical_type=numerical_type),
            join_aliexpress(Path(input), country, work=work, report=report),
            out=out,
            source=f"aliexpress, raw form, {country}",
            fill_fix="use the processed form and a schema that gives {name!r} a fill",
            report=report,
        )


def carved_from_train(valid_fraction: float, split_seed: int) -> SplitFractions:
    """Return the fractions of a source that has a test split and no valid split.

    Raises:
        TableError: The fraction or the seed is out of range.
    """
    if not 0 < valid_fraction < 1:
        raise TableError(f"--valid-fraction {valid_fraction:g}: must be above 0 and below 1")
    if split_seed < 0:
        raise TableError(f"--split-seed {split_seed}: must not be negative")
    return SplitFractions(valid=valid_fraction, test=0.0, seed=split_seed)
