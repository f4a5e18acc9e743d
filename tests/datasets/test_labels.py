import numpy as np
import pyarrow as pa
import pytest

from datasets.errors import TableError
from datasets.labels import OrphanConversions, read_label


def label(column: pa.Array) -> list[int]:
    table = pa.table({"y": column})
    return read_label(table, "y", file="f.csv", first_row=101).tolist()


@pytest.mark.parametrize(
    "column",
    [["0", "1", "1"], [0, 1, 1], [0.0, 1.0, 1.0], [False, True, True], ["False", "True", "1.0"]],
)
def test_text_numbers_and_booleans_are_labels(column: list[object]) -> None:
    assert label(pa.array(column)) == [0, 1, 1]


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (["0", "2"], "'2'"),
        (["1", ""], "''"),
        ([0, -1], "-1"),
        ([0.0, 0.5], "0.5"),
        ([1, None], "None"),
        (["0", "yes"], "'yes'"),
    ],
)
def test_anything_else_is_refused_by_row_and_value(column: list[object], shown: str) -> None:
    message = f"f.csv: row 102: label column 'y' is {shown}; a label is 0 or 1"
    with pytest.raises(TableError, match=message.replace(".", r"\.")):
        label(pa.array(column))


def test_label_column_of_dates_is_refused() -> None:
    with pytest.raises(TableError, match="label column 'y' holds date32"):
        label(pa.array([0], pa.date32()))


def test_orphans_are_counted_and_the_first_five_shown() -> None:
    orphans = OrphanConversions()
    orphans.refuse("f.csv")
    orphans.note(np.array([3, 5]))
    orphans.note(np.array([70, 71, 72, 73]))
    with pytest.raises(
        TableError,
        match=r"f\.csv: 6 conversions have no click \(first rows 3, 5, 70, 71, 72\); mend the "
        "labels, or choose --conversion-without-click drop or as-click",
    ):
        orphans.refuse("f.csv")
