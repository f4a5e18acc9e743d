"""Cells that hold several values: lists, or text with a separator, as a column per place.

A bag keeps a cell's first values, in their order; missing ones (null, NaN, an empty text, ``NA``)
are left out before that, one that occurs twice counts twice. A cell without a value is one missing
value, so that a bag is never empty: it is encoded as "unknown", like a missing cell of any field.

Shape suffixes: N rows, L places, E values of all rows.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datasets.category import MISSING, PADDING, Categories, categories_of
from datasets.schema import CategoricalField

__all__ = ["categories_per_place", "places"]


def categories_per_place(column: pa.Array, field: CategoricalField) -> list[Categories]:
    """Return the categories at each place that a field's rows have.

    Args:
        column: One value per cell where the field has no ``max_values``. Else lists of values,
            text with the field's separator between them, or single values.
        field: How the column is encoded.

    Returns:
        One element per place; a place beyond a cell's values has the code ``PADDING``.

    Raises:
        TypeError: The column holds something else.
    """
    if field.max_values is None:
        return [categories_of(column)]
    if _is_text(column.type):
        column = pc.split_pattern(column, field.separator)
    if not _is_list(column.type):
        if field.num_ids == 1:
            return [categories_of(column)]
        return _spread(categories_of(column), np.arange(len(column)), len(column), field.num_ids)
    length_N = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    values = categories_of(pc.list_flatten(column))
    return _spread(values, np.repeat(np.arange(len(column)), length_N), len(column), field.num_ids)


def places(row_E: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.int64]:
    """Return each value's place among those of its row, from 0; rows ascend."""
    count_N = np.bincount(row_E, minlength=num_rows)
    place_E: npt.NDArray[np.int64] = np.arange(len(row_E)) - (np.cumsum(count_N) - count_N)[row_E]
    return place_E


def _spread(
    values: Categories, row_E: npt.NDArray[np.int64], num_rows: int, num_ids: int
) -> list[Categories]:
    """Give each row's first values that are not missing a place each; rows ascend."""
    present_E = values.codes_N >= 0
    row_E, code_E = row_E[present_E], values.codes_N[present_E]
    place_E = places(row_E, num_rows)
    kept_E = place_E < num_ids
    codes_LN = np.full((num_ids, num_rows), PADDING, np.int32)
    codes_LN[0] = MISSING
    codes_LN[place_E[kept_E], row_E[kept_E]] = code_E[kept_E]
    return [Categories(codes_N, values.texts) for codes_N in codes_LN]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
