"""The two labels of an impression, and what to do with a conversion that has no click."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.category import categories_of, column_of
from datasets.errors import TableError

__all__ = ["CONVERSION_POLICIES", "ConversionPolicy", "OrphanConversions", "read_label"]

ConversionPolicy = Literal["refuse", "drop", "as-click"]
CONVERSION_POLICIES: tuple[ConversionPolicy, ...] = ("refuse", "drop", "as-click")

_VALUE_OF = {"0": 0, "1": 1, "false": 0, "true": 1}
_INVALID = 2


def read_label(
    rows: pa.RecordBatch, column: str, *, file: str, first_row: int
) -> npt.NDArray[np.uint8]:
    """Return a label column as 0 and 1; text, whole floats and booleans are read alike.

    Raises:
        TableError: A cell is something else, an empty one included.
    """
    try:
        cells = column_of(rows, column)
        categories = categories_of(cells)
    except TypeError as error:
        raise TableError(
            f"{file}: label column {column!r} holds {error}; a label is 0 or 1"
        ) from error
    known = [_VALUE_OF.get(text or "", _INVALID) for text in categories.texts]
    labels_N = categories.lookup(np.asarray(known, np.uint8), missing=_INVALID, padding=_INVALID)
    invalid_N = labels_N == _INVALID
    if invalid_N.any():
        index = int(invalid_N.argmax())
        raise TableError(
            f"{file}: row {first_row + index}: label column {column!r} is "
            f"{cells[index].as_py()!r}; a label is 0 or 1, mend the rows or name another column"
        )
    return labels_N.astype(np.uint8)


@dataclass
class OrphanConversions:
    """Conversions without a click, met in one file: how many, and where the first ones are."""

    count: int = 0
    first_rows: list[int] = field(default_factory=list)

    def note(self, row_numbers: npt.NDArray[np.int64]) -> None:
        """Count these rows and remember the first five."""
        self.count += len(row_numbers)
        self.first_rows += row_numbers[: 5 - len(self.first_rows)].tolist()

    def merge(self, later: "OrphanConversions") -> None:
        """Add those of later rows."""
        self.count += later.count
        self.first_rows += later.first_rows[: 5 - len(self.first_rows)]

    def refuse(self, file: str) -> None:
        """Refuse the file if it holds any.

        Raises:
            TableError: It does; the message gives count and first rows.
        """
        if not self.count:
            return
        rows = ", ".join(str(row) for row in self.first_rows)
        noun = "conversion has" if self.count == 1 else "conversions have"
        label = "row" if self.count == 1 else "first rows" if self.count > 5 else "rows"
        raise TableError(
            f"{file}: {self.count} {noun} no click ({label} {rows}); mend the labels, or choose "
            "--conversion-without-click drop or as-click"
        )
