import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from datasets.numerical import Normalizer, NotANumberError, RunningStatistics, numbers_of
from datasets.schema import Normalization, NumericalField


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["1.5", "", "-2", " 3 ", "NA"]),
        pa.array(["1.5", None, "-2", "3e0", "nan"], pa.large_string()),
        pa.array([1.5, None, -2.0, 3.0, float("nan")]),
    ],
)
def test_missing_cells_are_nan(column: pa.Array) -> None:
    np.testing.assert_array_equal(numbers_of(column), np.float32([1.5, np.nan, -2, 3, np.nan]))


def test_booleans_nulls_and_large_integers_are_numbers() -> None:
    assert numbers_of(pa.array([True, False])).tolist() == [1.0, 0.0]
    assert np.isnan(numbers_of(pa.nulls(2))).all()
    assert numbers_of(pa.array([2**60])).tolist() == [float(np.float32(2**60))]


def test_values_beyond_float32_are_infinite() -> None:
    assert numbers_of(pa.array(["1e300", "-inf"])).tolist() == [np.inf, -np.inf]


def test_negative_zero_is_zero() -> None:
    assert not np.signbit(numbers_of(pa.array(["-0.0"])))[0]


def test_first_cell_that_is_no_number_is_named() -> None:
    with pytest.raises(NotANumberError) as fault:
        numbers_of(pa.array(["1", "", "two", "three"]))
    assert (fault.value.index, fault.value.value) == (2, "two")
    with pytest.raises(NotANumberError):
        numbers_of(pa.array([0], pa.date32()))


blocks = arrays(np.float32, (7, 2), elements=st.floats(-1e6, 1e6, width=32))


@given(blocks, st.integers(0, 7))
def test_statistics_do_not_depend_on_the_blocks(raw_ND: np.ndarray, cut: int) -> None:
    running = RunningStatistics({"x": NumericalField(), "y": NumericalField(normalize="log")})
    running.update(raw_ND[:cut])
    running.update(raw_ND[cut:])
    x, y = raw_ND.astype(np.float64).T
    for found, values in zip(
        running.result().values(), (x, np.sign(y) * np.log1p(np.abs(y))), strict=True
    ):
        assert found.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-6)
        assert found.standard_deviation == pytest.approx(values.std(), rel=1e-6, abs=1e-6)
        assert (found.minimum, found.maximum) == (values.min(), values.max())


def normalized(values: list[float], kind: Normalization) -> np.ndarray:
    fields = {"x": NumericalField(normalize=kind)}
    raw_ND = np.float32(values).reshape(-1, 1)
    running = RunningStatistics(fields)
    running.update(raw_ND)
    return Normalizer(fields, running.result()).normalize(raw_ND)[:, 0]


def test_each_normalisation_does_what_it_says() -> None:
    values = [0.0, 1.0, 2.0, 9.0]
    x = np.array(values)
    logged = np.log1p(x)
    expected = {
        "standard": (x - x.mean()) / x.std(),
        "log": (logged - logged.mean()) / logged.std(),
        "minmax": x / 9,
        "none": x,
    }
    for kind in ("standard", "log", "minmax", "none"):
        np.testing.assert_allclose(normalized(values, kind), expected[kind], rtol=1e-6)


@pytest.mark.parametrize("kind", ["standard", "log", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e8])
def test_constant_column_becomes_zero(kind: Normalization, value: float) -> None:
    np.testing.assert_allclose(normalized([value] * 5, kind), 0.0, atol=1e-5)
