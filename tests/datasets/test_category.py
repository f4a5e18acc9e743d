import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.category import MISSING_TEXTS, canonical_text, categories_of, column_of


def texts_of(column: pa.Array) -> list[str | None]:
    categories = categories_of(column)
    return [None if code < 0 else categories.texts[code] for code in categories.codes_N]


@pytest.mark.parametrize("cell", ["3", "3.0", "003", "+3", " 3", "3e0", 3, 3.0, np.int8(3)])
def test_every_spelling_of_a_number_is_one_category(cell: object) -> None:
    assert canonical_text(cell) == "3"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (-0.0, "0"),
        ("-0", "0"),
        ("-012", "-12"),
        ("0.10", "0.1"),
        (np.float32(0.1), "0.1"),
        (1234567890123459.0, "1234567890123459"),
        (2.0**53, "9.00719925474099e+15"),
        (1e20, "1e+20"),
        ("12345678901234567890", "12345678901234567890"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        ("1e999", "1e999"),
        (float("inf"), "inf"),
        ("-Infinity", "-inf"),
        (True, "true"),
        (np.False_, "false"),
        ("TRUE", "true"),
        ("tRUE", "tRUE"),
        ("1.2.3", "1.2.3"),
        ("٣", "٣"),
        (" red ", " red "),
    ],
)
def test_canonical_text_of_a_cell(cell: object, text: str) -> None:
    assert canonical_text(cell) == text


@pytest.mark.parametrize("cell", [None, float("nan"), pd.NA, pd.NaT, *sorted(MISSING_TEXTS)])
def test_missing_cells_have_no_category(cell: object) -> None:
    assert canonical_text(cell) is None


def test_missing_texts_are_those_of_pandas() -> None:
    column = pd.read_csv(io.StringIO("x,y\n" + "".join(f'"{t}",1\n' for t in MISSING_TEXTS)))["x"]
    assert column.isna().all()


def test_cells_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="list"):
        canonical_text([1])
    with pytest.raises(TypeError, match="timestamp"):
        categories_of(pa.array([0], pa.timestamp("s")))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["1", "", "0", "1"]),
        pa.array([1, None, 0, 1], pa.int8()),
        pa.array([1.0, float("nan"), 0.0, 1.0]),
        pa.array([1.0, None, 0.0, 1.0], pa.float32()),
        pa.array([1.0, None, 0.0, 1.0], pa.float32()).cast(pa.float16()),
        pa.array(["1", None, "0", "1"]).dictionary_encode(),
        pa.array(["1", None, "0", "1"], pa.large_string()),
        pa.array(["1", None, "0", "1"], pa.string_view()),
        pa.chunked_array([["1", None], ["0", "1"]]),
        pa.array([1, None, 0, 1]).cast(pa.decimal128(21, 1)),
    ],
)
def test_every_type_of_column_gives_the_same_categories(column: pa.Array) -> None:
    assert texts_of(column) == ["1", None, "0", "1"]


def test_column_of_nulls_is_all_missing() -> None:
    assert texts_of(pa.nulls(3)) == [None, None, None]


def test_object_column_that_mixes_types_is_read_cell_by_cell() -> None:
    frame = pd.DataFrame({"x": pd.Series([1, "a", 2.0, None, True], dtype=object)})
    assert texts_of(column_of(frame, "x")) == ["1", "a", "2", None, "true"]


def test_floats_of_every_width_are_their_shortest_text() -> None:
    doubles = pa.array([0.1, 2.5, None])
    for kind in (pa.float64(), pa.float32(), pa.float16()):
        assert texts_of(doubles.cast(kind)) == ["0.1", "2.5", None]


def test_integers_beyond_64_bits_are_exact() -> None:
    frame = pd.DataFrame({"x": [2**70, None, -5]})
    assert texts_of(column_of(frame, "x")) == ["1180591620717411303424", None, "-5"]


cells = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.integers(0, 99).map(lambda number: f"{number:04d}"),
    st.decimals(-1000, 1000, places=3).map(str),
    st.sampled_from(["", "NA", "True", "false", "TRUE", "1e3", "+5", "a,b", 'say "x"', "ü"]),
    st.text("ab01.-+e ", max_size=4),
)


@given(st.lists(cells, min_size=1, max_size=12))
def test_pandas_reading_of_a_csv_gives_the_categories_of_its_text(column: list[str]) -> None:
    text = io.StringIO()
    pd.DataFrame({"x": column, "y": 1}).to_csv(text, index=False)
    guessed = pd.read_csv(io.StringIO(text.getvalue()))
    assert texts_of(column_of(guessed, "x")) == texts_of(pa.array(column, pa.string()))
