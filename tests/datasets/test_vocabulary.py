from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datasets.category import categories_of
from datasets.errors import DatasetError
from datasets.filesystem import locate
from datasets.vocabulary import (
    Vocabulary,
    count_categories,
    id_type,
    read_vocabularies,
    vocabularies_hash,
    write_vocabularies,
)


def test_ids_follow_count_then_value() -> None:
    vocabulary = Vocabulary.from_counts({"b": 2, "c": 5, "a": 2}, min_count=1)
    assert vocabulary.values == ("c", "a", "b")
    assert vocabulary.size == 4


def test_rare_missing_and_unseen_values_are_id_zero() -> None:
    vocabulary = Vocabulary.from_counts({"a": 3, "rare": 2}, min_count=3)
    ids_N = vocabulary.encode(categories_of(pa.array(["a", "rare", None, "new", "", "a"])))
    assert ids_N.tolist() == [1, 0, 0, 0, 0, 1]


def test_counts_join_spellings_and_leave_missing_out() -> None:
    counts: Counter[str] = Counter()
    count_categories(categories_of(pa.array(["3", "3.0", None, "x"])), counts)
    count_categories(categories_of(pa.array([3, 4])), counts)
    assert counts == {"3": 3, "x": 1, "4": 1}


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, np.int8), (128, np.int8), (129, np.int16), (32_768, np.int16), (32_769, np.int32)],
)
def test_id_type_is_the_smallest_that_holds_the_largest_id(size: int, expected: type) -> None:
    assert id_type(size) is expected


def test_vocabularies_survive_their_file(tmp_path: Path) -> None:
    vocabularies = {"x": Vocabulary(["b", "a"]), "empty": Vocabulary([]), "y": Vocabulary(["ü"])}
    write_vocabularies(vocabularies, locate(tmp_path))
    assert read_vocabularies(locate(tmp_path), ["x", "empty", "y"]) == vocabularies


def test_missing_vocabularies_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"vocabularies\.parquet: cannot read the vocabularies"):
        read_vocabularies(locate(tmp_path), ["x"])


def test_hash_sees_field_order_of_values_and_boundaries() -> None:
    variants = [
        {"x": Vocabulary(["a", "b"])},
        {"x": Vocabulary(["b", "a"])},
        {"x": Vocabulary(["ab"])},
        {"y": Vocabulary(["a", "b"])},
        {"x": Vocabulary(["a"]), "b": Vocabulary([])},
    ]
    assert len({vocabularies_hash(variant) for variant in variants}) == len(variants)
