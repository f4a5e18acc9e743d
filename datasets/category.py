"""What text a categorical cell is, so that every way of reading a table gives the same category.

A category is compared as text. CSV cells arrive as text, Parquet and pandas cells as text, numbers
or booleans, and pandas guesses: a column of ``3`` becomes integers, with one empty cell floats
(``3.0``), a column of ``True`` booleans. All of them must be the same category, at preparation and
at serving time, so the text is canonical:

- what reads as a number is that number: ``3``, ``3.0``, ``003``, ``+3``, `` 3`` and ``3e0`` are all
  ``3``; other numbers are written with 15 significant digits (``0.10`` is ``0.1``). Integers are
  exact at any length; from 2 to the power of 53 on (16 digits) a column that pandas turned into
  floats has lost digits already, so such identifiers are read as text (``dtype=str``) where cells
  may be empty;
- ``True``, ``TRUE`` and ``true``, and booleans, are ``true``; likewise ``false``;
- the texts that ``pandas.read_csv`` reads as missing (empty, ``NA``, ``NaN``, ``null``, ``None``,
  ...) are missing, whatever read them, and so are nulls and NaN;
- any other text is itself, letter for letter.

The price is that codes which differ in leading zeros alone (``007`` and ``7``) are one category:
pandas cannot tell them apart either, and training on one reading and serving on the other would go
unseen.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

__all__ = [
    "MISSING",
    "MISSING_TEXTS",
    "PADDING",
    "Categories",
    "canonical_text",
    "categories_of",
    "column_of",
]

MISSING = -1
"""The code of a missing cell."""

PADDING = -2
"""The code of a place that a bag has and a cell with fewer values does not fill."""

MISSING_TEXTS = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""The texts that ``pandas.read_csv`` takes for a missing value by default."""

_INTEGER = re.compile(r"\s*([+-]?)0*([0-9]+)\s*", re.ASCII)
_DECIMAL = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", re.ASCII)
_INFINITE = re.compile(r"\s*([+-]?)inf(inity)?\s*", re.ASCII | re.IGNORECASE)
_STARTS_OF_NUMBERS = frozenset(" \t\n\r\f\v+-.0123456789iI")  # what the three begin with
_BOOLEANS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
_EXACT_BELOW = 2.0**53


@dataclass(frozen=True)
class Categories:
    """A column of categories: row i holds ``texts[codes_N[i]]``, or is ``MISSING`` or ``PADDING``.

    Two codes may name the same text (``3`` and ``3.0`` are one category).
    """

    codes_N: npt.NDArray[np.int32]
    texts: tuple[str | None, ...]

    def lookup(
        self, values: npt.NDArray[Any], *, missing: int | np.uint64, padding: int | np.uint64
    ) -> npt.NDArray[Any]:
        """Return ``values[code]`` of every row, ``missing`` or ``padding`` where it is that."""
        # codes below 0 count from the end
        return np.append(values, np.asarray([padding, missing], dtype=values.dtype))[self.codes_N]


def canonical_text(value: object) -> str | None:
    """Return the category that one cell is, None where it is missing (rules: see the module).

    Raises:
        TypeError: The value is neither text, nor a number, nor a boolean, nor missing.
    """
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, str):
        return _of_string(value)
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, np.float32 | np.float16):
        return _of_float(float(str(value)))  # the shortest text: 0.1, not 0.10000000149
    if isinstance(value, float | np.floating):
        return _of_float(float(value))
    raise TypeError(f"{type(value).__name__} {value!r}")


def _of_string(text: str) -> str | None:
    if text in MISSING_TEXTS:
        return None
    if text[0] not in _STARTS_OF_NUMBERS:
        return _BOOLEANS.get(text, text)
    if match := _INTEGER.fullmatch(text):
        sign, digits = match.groups()
        return f"-{digits}" if sign == "-" and digits != "0" else digits
    if _DECIMAL.fullmatch(text) and math.isfinite(number := float(text)):
        return _of_float(number)
    if match := _INFINITE.fullmatch(text):
        return "-inf" if match.group(1) == "-" else "inf"
    return _BOOLEANS.get(text, text)


def _of_float(number: float) -> str | None:
    if math.isnan(number):
        return None
    if number.is_integer() and abs(number) < _EXACT_BELOW:
        return str(int(number))
    return f"{number:.15g}"


def categories_of(column: "pa.Array | pa.ChunkedArray") -> Categories:
    """Return the categories of a pyarrow array.

    Args:
        column: A ``pa.Array`` of text, integers, floats, decimals, booleans or nulls, or a
            dictionary of these.

    Raises:
        TypeError: The column holds something else (dates, lists, bytes).
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_null(kind):
        return Categories(np.full(len(column), -1, np.int32), ())
    if not _is_scalar(kind):
        raise TypeError(str(kind))
    halves = pa.types.is_float16(kind)  # which pyarrow has no dictionaries of
    encoded = (column.cast(pa.float32()) if halves else column).dictionary_encode()
    codes_N = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(kind):  # written as canonical_text writes them, by the million
        texts = tuple(encoded.dictionary.cast(pa.string()).to_pylist())
        return Categories(np.ascontiguousarray(codes_N, dtype=np.int32), texts)
    distinct = encoded.dictionary.cast(kind)
    texts = tuple(canonical_text(value) for value in _distinct_values(distinct))
    missing = [code for code, text in enumerate(texts) if text is None]
    if missing:
        codes_N = np.where(np.isin(codes_N, missing), -1, codes_N)
    return Categories(np.ascontiguousarray(codes_N, dtype=np.int32), texts)


def _distinct_values(distinct: pa.Array) -> list[object]:
    if pa.types.is_float32(distinct.type) or pa.types.is_float16(distinct.type):
        return list(distinct.to_numpy(zero_copy_only=False))
    if pa.types.is_decimal(distinct.type):
        return [str(value) for value in distinct.to_pylist()]
    return list(distinct.to_pylist())


def _is_scalar(kind: pa.DataType) -> bool:
    types = pa.types
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(is_text or is_number or types.is_boolean(kind))


def _plain(column: "pa.Array | pa.ChunkedArray") -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # too large for one array of 32-bit offsets
        column = column.cast(pa.large_string()).combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column


def column_of(table: "pa.Table | pa.RecordBatch | pd.DataFrame", name: str) -> pa.Array:
    """Return one column of a pyarrow table, a record batch or a pandas frame as a plain array.

    An object column of pandas that mixes types, or holds integers beyond 64 bits, becomes the
    canonical text of each cell.
    """
    if not isinstance(table, pd.DataFrame):
        return _plain(table.column(name))
    series = table[name]
    try:
        return _plain(pa.array(series, from_pandas=True))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([canonical_text(value) for value in series], type=pa.string())
