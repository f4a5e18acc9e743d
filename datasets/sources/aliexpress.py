"""The AliExpress search logs in their processed form.

``search_id, categorical_1..16, numerical_1..63, click, conversion`` in ``train.csv`` and
``test.csv``. Seen in the public samples: every cell is there, categoricals are integers, numericals
are decimals mostly scaled to 0..1, some of them constant. So the built-in schema fills nothing: an
empty cell means a damaged file, and is refused.
"""

from pathlib import Path

from datasets.errors import TableError
from datasets.filesystem import locate, refuse_existing
from datasets.labels import ConversionPolicy
from datasets.manifest import Manifest
from datasets.preparation import prepare
from datasets.schema import CategoricalField, Labels, NumericalField, Schema, SplitFractions
from datasets.table_reader import open_table

__all__ = ["NUM_CATEGORICALS", "NUM_NUMERICALS", "aliexpress_schema", "prepare_aliexpress"]

NUM_CATEGORICALS = 16
NUM_NUMERICALS = 63


def aliexpress_schema(split: SplitFractions) -> Schema:
    """Return the schema of the processed form; search sessions are the groups."""
    return Schema(
        labels=Labels(click="click", conversion="conversion"),
        categorical={
            f"categorical_{i}": CategoricalField() for i in range(1, NUM_CATEGORICALS + 1)
        },
        numerical={f"numerical_{i}": NumericalField() for i in range(1, NUM_NUMERICALS + 1)},
        group="search_id",
        split=split,
    )


def prepare_aliexpress(
    *,
    input: str | Path,  # noqa: A002  (the option's name)
    out: str | Path,
    valid_fraction: float = 0.1,
    split_seed: int = 0,
    conversion_without_click: ConversionPolicy = "refuse",
) -> Manifest:
    """Prepare a dataset from a directory with ``train.csv`` and ``test.csv``.

    The official test split stays the test split; valid is carved from train by search session.

    Args:
        input: The directory.
        out: The directory or URI to make; it must not exist.
        valid_fraction: The share of train's sessions that become valid; above 0 and below 1.
        split_seed: Another seed carves other sessions.
        conversion_without_click: Refuse such rows, drop them, or take them as clicked.

    Raises:
        TableError: A file is missing or not in the processed form, or a split is empty.
        OutputExistsError: Something lies at ``out``.
    """
    refuse_existing(locate(out), shown=str(out))
    if not 0 < valid_fraction < 1:
        raise TableError(f"--valid-fraction {valid_fraction:g}: must be above 0 and below 1")
    if split_seed < 0:
        raise TableError(f"--split-seed {split_seed}: must not be negative")
    directory = str(input).rstrip("/")
    for name in ("train.csv", "test.csv"):
        if not locate(f"{directory}/{name}").is_file():
            raise TableError(
                f"--input {directory}: no {name} in it; give the directory that holds train.csv "
                "and test.csv in the processed form"
            )
    return prepare(
        aliexpress_schema(SplitFractions(valid=valid_fraction, test=0.0, seed=split_seed)),
        {name: open_table(f"{directory}/{name}.csv") for name in ("train", "test")},
        out=out,
        source="aliexpress, processed form",
        conversion_without_click=conversion_without_click,
        fill_fix="use 'pwiser data prepare table' with a schema that gives {name!r} a fill",
    )
