r"""Ali-CCP's feature lists, ``field \x02 id \x03 value`` separated by \x01, a whole batch at once.

The separators are looked up in the batch's bytes, so that the work per feature is a few vector
operations and no Python. Shape suffixes: N rows, E features of all rows, K features looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.bag import places

__all__ = ["FIELDS", "MULTI_VALUED", "FeatureListError", "FieldIds", "field_ids"]

MULTI_VALUED = ("210", "109_14", "110_14", "127_14", "150_14")

FIELDS = (
    *("101", "121", "122", "124", "125", "126", "127", "128", "129"),
    *("205", "206", "207", "210", "216", "508", "509", "702", "853", "301"),
    *("109_14", "110_14", "127_14", "150_14"),
)
"""The sparse fields in the order that public models use."""

_MAX_ID_DIGITS = 18
_WORD_BYTES = 8

Integers = npt.NDArray[np.int64]


class FeatureListError(Exception):
    """A list that breaks the format: ``index`` in its batch, and what is wrong, in words."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index = index
        self.problem = problem


@dataclass(frozen=True)
class FieldIds:
    """The ids of each field in each row.

    Attributes:
        columns: Per field the first ids, or lists of ids; null in rows that lack the field.
        num_features_N: How many features each row's list has.
    """

    columns: dict[str, pa.Array]
    num_features_N: Integers


@dataclass(frozen=True)
class _Features:
    """Where each feature lies in the bytes: its row, its start and its two separators."""

    row_E: Integers
    start_E: Integers
    field_end_E: Integers
    id_end_E: Integers


def field_ids(lists: pa.Array, bags: Mapping[str, int]) -> FieldIds:
    """Reduce feature lists to the first id of every field, or to its first ids.

    Args:
        lists: A string array without nulls; an empty text is a list without features.
        bags: The fields of which more than the first id is kept, and how many at most.

    Raises:
        FeatureListError: A feature has not its three parts, an unknown field, or an id that is no
            number of at most 18 digits.
    """
    data, offset_N = _bytes_of(lists)
    features = _split(lists, data, offset_N)
    field_E = _fields(data, features)
    num_rows = len(lists)
    # of several assignments to one place the last stays, so the first feature goes in last
    chosen = np.full(num_rows * len(FIELDS), -1, np.int64)
    order = np.arange(len(field_E))[::-1]
    chosen[(features.row_E * len(FIELDS) + field_E)[::-1]] = order
    chosen.reshape(num_rows, len(FIELDS))[:, [FIELDS.index(field) for field in bags]] = -1
    present = chosen >= 0
    ids = np.zeros(len(chosen), np.int64)
    ids[present] = _parse_ids(data, features, chosen[present])
    ids_NF, present_NF = (a.reshape(num_rows, len(FIELDS)) for a in (ids, present))
    columns = {
        field: pa.array(np.ascontiguousarray(ids_NF[:, i]), mask=~present_NF[:, i])
        for i, field in enumerate(FIELDS)
    }
    for field, num_ids in bags.items():
        wanted_K = np.flatnonzero(field_E == FIELDS.index(field))
        columns[field] = _first_ids_of_one(data, features, wanted_K, num_ids, num_rows)
    return FieldIds(columns, np.bincount(features.row_E, minlength=num_rows))


def _first_ids_of_one(
    data: npt.NDArray[np.uint8],
    features: _Features,
    wanted_K: Integers,
    num_ids: int,
    num_rows: int,
) -> pa.Array:
    row_K = features.row_E[wanted_K]
    count_N = np.bincount(row_K, minlength=num_rows)
    kept_K = wanted_K[places(row_K, num_rows) < num_ids]
    limit_N = np.append(0, np.minimum(count_N, num_ids).cumsum())
    return pa.ListArray.from_arrays(
        pa.array(limit_N, pa.int32()),
        pa.array(_parse_ids(data, features, kept_K), pa.int64()),
        mask=pa.array(count_N == 0),
    )


def _bytes_of(lists: pa.Array) -> tuple[npt.NDArray[np.uint8], Integers]:
    """Return the text of all rows, padded so that a word may be read anywhere, and their limits."""
    lists = lists.cast(pa.large_string())
    _, offsets, text = lists.buffers()
    limits_N = np.frombuffer(offsets, np.int64)[lists.offset : lists.offset + len(lists) + 1]
    content = np.frombuffer(text, np.uint8) if text is not None else np.empty(0, np.uint8)
    content = content[limits_N[0] : limits_N[-1]]
    return np.append(content, np.zeros(_WORD_BYTES, np.uint8)), limits_N - limits_N[0]


def _split(lists: pa.Array, data: npt.NDArray[np.uint8], limit_N: Integers) -> _Features:
    separators = np.flatnonzero(data[: limit_N[-1]] <= 3)
    kinds = data[separators]
    filled_N = np.flatnonzero(limit_N[1:] > limit_N[:-1])
    between = separators[kinds == 1]
    start_E = np.sort(np.concatenate([limit_N[filled_N], between + 1]))
    end_E = np.sort(np.concatenate([limit_N[filled_N + 1], between]))
    field_end_E, id_end_E = separators[kinds == 2], separators[kinds == 3]
    if not (
        len(field_end_E) == len(id_end_E) == len(start_E)
        and (start_E < field_end_E).all()
        and (field_end_E + 1 < id_end_E).all()
        and (id_end_E + 1 < end_E).all()
    ):
        raise _malformed(lists)
    row_E = np.searchsorted(limit_N, start_E, side="right") - 1
    return _Features(row_E, start_E, field_end_E, id_end_E)


def _malformed(lists: pa.Array) -> FeatureListError:
    for index, text in enumerate(lists.to_pylist()):
        for feature in text.split("\x01") if text else ():
            field, _, rest = feature.partition("\x02")
            number, _, value = rest.partition("\x03")
            parts = (field, number, value)
            if not all(parts) or any(mark in part for part in parts for mark in "\0\x02\x03"):
                return FeatureListError(
                    index, f"feature {feature!r} is not field \\x02 id \\x03 value"
                )
    raise AssertionError("every feature has its parts")


def _fields(data: npt.NDArray[np.uint8], features: _Features) -> Integers:
    """Return the index of each feature's field, compared as words of eight bytes."""
    keys = np.array([int.from_bytes(name.encode(), "little") for name in FIELDS], np.uint64)
    order = np.argsort(keys)
    words = np.ndarray(len(data) - _WORD_BYTES + 1, "<u8", data.tobytes(), strides=(1,))
    length_E = features.field_end_E - features.start_E
    masks = np.array([(1 << (8 * size)) - 1 for size in range(_WORD_BYTES + 1)], np.uint64)
    key_E = words[features.start_E] & masks[np.minimum(length_E, _WORD_BYTES)]
    place_E = np.minimum(np.searchsorted(keys[order], key_E), len(keys) - 1)
    unknown_E = (keys[order][place_E] != key_E) | (length_E > _WORD_BYTES)
    if unknown_E.any():
        first = int(unknown_E.argmax())
        field = bytes(data[features.start_E[first] : features.field_end_E[first]])
        raise FeatureListError(
            int(features.row_E[first]),
            f"unknown field {field.decode('utf-8', 'replace')!r}; known: {', '.join(FIELDS)}",
        )
    fields_E: Integers = order[place_E]
    return fields_E


def _parse_ids(data: npt.NDArray[np.uint8], features: _Features, wanted_K: Integers) -> Integers:
    start_K = features.field_end_E[wanted_K] + 1
    length_K = features.id_end_E[wanted_K] - start_K
    id_K = np.zeros(len(wanted_K), np.int64)
    bad_K = length_K > _MAX_ID_DIGITS
    for place in range(min(int(length_K.max(initial=0)), _MAX_ID_DIGITS)):
        inside_K = place < length_K
        digit_K = data[np.where(inside_K, start_K + place, 0)].astype(np.int64) - ord("0")
        bad_K |= inside_K & ((digit_K < 0) | (digit_K > 9))
        id_K = np.where(inside_K, id_K * 10 + digit_K, id_K)
    if bad_K.any():
        feature = wanted_K[int(bad_K.argmax())]
        text = bytes(data[features.field_end_E[feature] + 1 : features.id_end_E[feature]])
        raise FeatureListError(
            int(features.row_E[feature]),
            f"id {text.decode('utf-8', 'replace')!r} is no number of at most 18 digits",
        )
    return id_K
