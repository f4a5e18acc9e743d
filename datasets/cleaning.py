"""Raw batches to checked ones: categories, numbers and labels by the schema, each fault by its row.

Shape suffixes: N rows, D numerical fields.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.bag import categories_per_place
from datasets.category import Categories, column_of
from datasets.errors import TableError
from datasets.labels import ConversionPolicy, OrphanConversions, read_label
from datasets.numerical import NotANumberError, numbers_of
from datasets.schema import CategoricalField, Schema, id_columns
from datasets.split import carve, hash_categories, hash_rows
from datasets.table_reader import RawBatch

__all__ = ["CleanBatch", "Cleaner", "Findings", "take"]


@dataclass(frozen=True)
class CleanBatch:
    """Rows that keep the schema: raw values are finite and no conversion is without a click.

    ``categories`` has a column per place of a row's ids (``schema.id_columns``). ``split_N`` is an
    index into ``SPLITS``, 0 for all rows where nothing is carved.
    """

    kept: dict[str, npt.NDArray[np.float64]]  # raw columns that are kept beside the dataset
    categories: dict[str, Categories]
    raw_ND: npt.NDArray[np.float32]
    click_N: npt.NDArray[np.uint8]
    conversion_N: npt.NDArray[np.uint8]
    split_N: npt.NDArray[np.int8]


@dataclass
class _Gaps:
    cells: int = 0
    first_row: int = 0


@dataclass
class Findings:
    """What one file showed in one pass, beyond the rows themselves."""

    orphans: OrphanConversions = field(default_factory=OrphanConversions)
    gaps: dict[str, _Gaps] = field(default_factory=dict)
    filled: Counter[str] = field(default_factory=Counter)

    def merge(self, later: "Findings") -> None:
        """Add what later rows of the same file showed."""
        self.orphans.merge(later.orphans)
        for name, gaps in later.gaps.items():
            self.gaps.setdefault(name, _Gaps(first_row=gaps.first_row)).cells += gaps.cells
        self.filled.update(later.filled)

    def refuse(self, file: str, *, fill_fix: str, refuse_orphans: bool) -> None:
        """Refuse the file for what its schema and the chosen policy do not allow.

        Raises:
            TableError: A conversion without a click, or a cell that is empty, NaN or infinite.
        """
        for name, gaps in self.gaps.items():
            cells = "cell is" if gaps.cells == 1 else "cells are"
            raise TableError(
                f"{file}: row {gaps.first_row}: column {name!r} is empty, NaN or infinite "
                f"({gaps.cells} {cells} in the file); mend the rows or {fill_fix.format(name=name)}"
            )
        if refuse_orphans:
            self.orphans.refuse(file)


class Cleaner:
    """Applies a schema to raw batches.

    Args:
        schema: The columns' roles.
        policy: What becomes of a conversion without a click.
        keep: Columns of numbers, beyond the schema's, to pass on as they are.
    """

    def __init__(
        self, schema: Schema, *, policy: ConversionPolicy, keep: tuple[str, ...] = ()
    ) -> None:
        self._schema = schema
        self._policy = policy
        self._keep = keep

    @property
    def refuses(self) -> bool:
        """Whether a conversion without a click is refused."""
        return self._policy == "refuse"

    def clean(
        self, batch: RawBatch, *, file: str, wanted: tuple[str, ...], findings: Findings
    ) -> CleanBatch:
        """Check and convert one batch.

        Args:
            batch: The raw rows.
            file: What messages call the input.
            wanted: The splits to carve from these rows.
            findings: Takes note of gaps, fills and orphan conversions.

        Raises:
            TableError: A label that is not 0 or 1, a numerical cell that is no number, a category
                of a wrong type, an empty group key.
        """
        rows, first_row = batch.rows, batch.first_row
        labels = self._schema.labels
        click_N = read_label(rows, labels.click, file=file, first_row=first_row)
        conversion_N = read_label(rows, labels.conversion, file=file, first_row=first_row)
        columns = [
            column
            for name, settings in self._schema.categorical.items()
            for column in self._categories(rows, name, settings, file=file)
        ]
        categories = dict(zip(id_columns(self._schema.categorical), columns, strict=True))
        raw_ND = self._numericals(batch, file=file, findings=findings)
        orphan_N = (conversion_N == 1) & (click_N == 0)
        if orphan_N.any():
            findings.orphans.note(first_row + np.flatnonzero(orphan_N))
            if self._policy == "as-click":
                click_N = click_N | conversion_N
        kept = {name: column_of(rows, name).to_numpy() for name in self._keep}
        split_N = np.zeros(len(click_N), np.int8)
        if wanted:
            labels_NL = np.stack([click_N, conversion_N], axis=1)
            hashes_N = self._hashes(batch, categories, raw_ND, labels_NL, file=file)
            split_N = carve(hashes_N, self._schema.split, wanted=wanted)
        cleaned = CleanBatch(kept, categories, raw_ND, click_N, conversion_N, split_N)
        if self._policy == "drop" and orphan_N.any():
            return take(cleaned, ~orphan_N)
        return cleaned

    def _categories(
        self, rows: pa.RecordBatch, name: str, settings: CategoricalField, *, file: str
    ) -> list[Categories]:
        try:
            return categories_per_place(column_of(rows, name), settings)
        except TypeError as error:
            raise TableError(
                f"{file}: column {name!r} holds {error}; a category is text, a number or a "
                "boolean: convert the column, or list it under drop (lists need max_values)"
            ) from error

    def _numericals(
        self, batch: RawBatch, *, file: str, findings: Findings
    ) -> npt.NDArray[np.float32]:
        raw_ND = np.empty((batch.rows.num_rows, len(self._schema.numerical)), np.float32)
        for index, (name, settings) in enumerate(self._schema.numerical.items()):
            try:
                values_N = numbers_of(column_of(batch.rows, name))
            except NotANumberError as error:
                raise TableError(
                    f"{file}: row {batch.first_row + error.index}: column {name!r} is "
                    f"{error.value!r}, no number; mend the row, or list the column under "
                    "categorical or drop"
                ) from error
            gap_N = ~np.isfinite(values_N)
            num_gaps = int(gap_N.sum())
            if num_gaps and settings.fill is None:
                first_row = batch.first_row + int(gap_N.argmax())
                findings.gaps.setdefault(name, _Gaps(first_row=first_row)).cells += num_gaps
            if num_gaps:
                findings.filled[name] += num_gaps
                values_N = np.where(gap_N, np.float32(settings.fill or 0), values_N)
            raw_ND[:, index] = values_N
        return raw_ND

    def _hashes(
        self,
        batch: RawBatch,
        categories: dict[str, Categories],
        raw_ND: npt.NDArray[np.float32],
        labels_NL: npt.NDArray[np.uint8],
        *,
        file: str,
    ) -> npt.NDArray[np.uint64]:
        group, seed = self._schema.group, self._schema.split.seed
        if group is None:
            return hash_rows(list(categories.values()), raw_ND, labels_NL, seed=seed)
        (keys,) = self._categories(batch.rows, group, CategoricalField(), file=file)
        if (keys.codes_N < 0).any():
            row = batch.first_row + int((keys.codes_N < 0).argmax())
            raise TableError(
                f"{file}: row {row}: group column {group!r} is empty; give every row its group, "
                "or leave group out of the schema and list the column under drop"
            )
        return hash_categories(keys, seed=seed)


def take(batch: CleanBatch, mask_N: npt.NDArray[np.bool_]) -> CleanBatch:
    """Return the rows of a batch that the mask keeps."""
    if mask_N.all():
        return batch
    index_N = np.flatnonzero(mask_N)
    return CleanBatch(
        kept={name: values_N[index_N] for name, values_N in batch.kept.items()},
        categories={
            name: Categories(column.codes_N[index_N], column.texts)
            for name, column in batch.categories.items()
        },
        raw_ND=batch.raw_ND[index_N],
        click_N=batch.click_N[index_N],
        conversion_N=batch.conversion_N[index_N],
        split_N=batch.split_N[index_N],
    )
