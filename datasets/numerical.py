"""Numerical columns: cells to numbers, train's statistics, and the normalisation they give."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from datasets.category import MISSING_TEXTS
from datasets.schema import NumericalField

__all__ = [
    "Normalizer",
    "NotANumberError",
    "NumericalStatistics",
    "RunningStatistics",
    "largest_magnitude",
    "numbers_of",
]


class NotANumberError(Exception):
    """A cell that is no number: ``index`` in its column, and ``value`` as it is written there."""

    def __init__(self, index: int, value: object) -> None:
        super().__init__(index, value)
        self.index = index
        self.value = value


def numbers_of(column: pa.Array) -> npt.NDArray[np.float32]:
    """Return a column's cells as 32-bit floats; missing cells are NaN, too large ones infinite.

    Args:
        column: A ``pa.Array`` of numbers, booleans, nulls or text that holds numbers.

    Raises:
        NotANumberError: A cell is no number.
    """
    kind = column.type
    if pa.types.is_float32(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False)) + np.float32(0)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = _parse(column)
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not _is_number(kind):
        present = column.drop_null()
        raise NotANumberError(0, present[0].as_py() if len(present) else str(kind))
    doubles = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):
        # adding zero turns -0.0 into 0.0: equal numbers have equal bytes in the digest
        return np.asarray(doubles, np.float64).astype(np.float32) + np.float32(0)


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(is_number or types.is_null(kind))


def _parse(column: pa.Array) -> pa.Array:
    missing = pc.is_in(column, value_set=pa.array(sorted(MISSING_TEXTS), column.type))
    present = pc.if_else(missing, pa.scalar(None, column.type), pc.utf8_trim_whitespace(column))
    try:
        return present.cast(pa.float64())
    except pa.ArrowInvalid:
        for index, cell in enumerate(present):
            try:
                cell.cast(pa.float64())
            except pa.ArrowInvalid:
                raise NotANumberError(index, column[index].as_py()) from None
        raise


class NumericalStatistics(BaseModel):
    """What train says about one numerical field, after the log where the field takes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    standard_deviation: float
    minimum: float
    maximum: float


class RunningStatistics:
    """Mean, deviation and range of many columns, gathered block by block (Chan et al., 1979).

    Args:
        fields: The numerical fields in column order.
    """

    def __init__(self, fields: Mapping[str, NumericalField]) -> None:
        self._fields = fields
        self._log_D = _takes_log(list(fields.values()))
        self._count = 0
        self._mean_D = np.zeros(len(fields))
        self._squares_D = np.zeros(len(fields))
        self._minimum_D = np.full(len(fields), np.inf)
        self._maximum_D = np.full(len(fields), -np.inf)

    def update(self, raw_ND: npt.NDArray[np.float32]) -> None:
        """Take in a block of raw, finite values; an empty block changes nothing."""
        if not len(raw_ND):
            return
        block = RunningStatistics(self._fields)
        values_ND = _transform(raw_ND, self._log_D)
        block._count = len(values_ND)
        block._mean_D = values_ND.mean(axis=0)
        values_ND -= block._mean_D
        block._squares_D = np.einsum("nd,nd->d", values_ND, values_ND)
        # the log keeps the order, so that the extremes may be found among the raw values
        extremes = np.stack([raw_ND.min(axis=0), raw_ND.max(axis=0)])
        block._minimum_D, block._maximum_D = _transform(extremes, self._log_D)
        self.merge(block)

    def merge(self, other: "RunningStatistics") -> None:
        """Take in what another one has gathered."""
        if not other._count:
            return
        count = self._count + other._count
        delta_D = other._mean_D - self._mean_D
        self._squares_D = self._squares_D + other._squares_D
        self._squares_D += delta_D**2 * (self._count * other._count / count)
        self._mean_D = self._mean_D + delta_D * (other._count / count)
        self._minimum_D = np.minimum(self._minimum_D, other._minimum_D)
        self._maximum_D = np.maximum(self._maximum_D, other._maximum_D)
        self._count = count

    def result(self) -> dict[str, NumericalStatistics]:
        """Return the statistics of every field (population deviation); needs one row at least."""
        assert self._count > 0
        deviation_D = np.sqrt(self._squares_D / self._count)
        return {
            name: NumericalStatistics(
                mean=float(self._mean_D[index]),
                standard_deviation=float(deviation_D[index]),
                minimum=float(self._minimum_D[index]),
                maximum=float(self._maximum_D[index]),
            )
            for index, name in enumerate(self._fields)
        }


class Normalizer:
    """Turns raw numbers into model inputs with train's statistics.

    A column that is constant on train has no deviation and no range; it is centred and not scaled.

    Args:
        fields: The numerical fields in column order.
        statistics: Train's statistics of each.
    """

    def __init__(
        self,
        fields: Mapping[str, NumericalField],
        statistics: Mapping[str, NumericalStatistics],
    ) -> None:
        self._log_D = _takes_log(list(fields.values()))
        pairs = [_shift_and_scale(field, statistics[name]) for name, field in fields.items()]
        self._shift_D = np.array([shift for shift, _ in pairs], np.float64)
        self._scale_D = np.array([scale for _, scale in pairs], np.float64)
        self._index_of = {name: index for index, name in enumerate(fields)}

    def normalize(self, raw_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the normalised values of finite raw values, the same bits for the same row."""
        normalized_ND = (_transform(raw_ND, self._log_D) - self._shift_D) / self._scale_D
        return normalized_ND.astype(np.float32)

    def normalize_column(
        self, name: str, raw_N: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the normalised values of one field, bit for bit as ``normalize`` has them."""
        index = self._index_of[name]
        values_N = _transform(raw_N[:, None], self._log_D[index : index + 1])[:, 0]
        values_N -= self._shift_D[index]
        values_N /= self._scale_D[index]
        return values_N.astype(np.float32)


def _shift_and_scale(field: NumericalField, statistics: NumericalStatistics) -> tuple[float, float]:
    if field.normalize == "none":
        return 0.0, 1.0
    if field.normalize == "minmax":
        shift, scale = statistics.minimum, statistics.maximum - statistics.minimum
    else:
        shift, scale = statistics.mean, statistics.standard_deviation
    # rounding leaves a constant column a deviation of some 1e-16 of its value
    negligible = 1e-9 * max(abs(statistics.minimum), abs(statistics.maximum))
    return shift, scale if scale > negligible else 1.0


def largest_magnitude(field: NumericalField, statistics: NumericalStatistics) -> float:
    """Return how far from zero train's normalised values reach."""
    shift, scale = _shift_and_scale(field, statistics)
    extremes = (statistics.minimum, statistics.maximum)
    return max(abs(extreme - shift) / scale for extreme in extremes)


def _takes_log(fields: Sequence[NumericalField]) -> npt.NDArray[np.bool_]:
    return np.array([field.normalize == "log" for field in fields], np.bool_)


def _transform(
    raw_ND: npt.NDArray[np.float32], log_D: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    values_ND = raw_ND.astype(np.float64)
    if log_D.any():
        logged = values_ND[:, log_D]
        values_ND[:, log_D] = np.sign(logged) * np.log1p(np.abs(logged))
    return values_ND
