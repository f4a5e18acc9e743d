import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.category import categories_of
from datasets.schema import SplitFractions
from datasets.split import carve, hash_categories, hash_rows

BOTH = ("valid", "test")


@given(st.lists(st.integers(0, 20), min_size=1), st.integers(0, 3))
def test_rows_of_a_group_stay_together(groups: list[int], seed: int) -> None:
    fractions = SplitFractions(valid=0.3, test=0.3, seed=seed)
    hashes_N = hash_categories(categories_of(pa.array(groups)), seed=seed)
    split_N = carve(hashes_N, fractions, wanted=BOTH)
    sides: dict[int, set[int]] = {}
    for group, side in zip(groups, split_N.tolist(), strict=True):
        sides.setdefault(group, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30))
def test_hash_depends_neither_on_batches_nor_on_the_type_of_the_column(groups: list[int]) -> None:
    whole_N = hash_categories(categories_of(pa.array(groups)), seed=1)
    as_text = [hash_categories(categories_of(pa.array([str(g)])), seed=1)[0] for g in groups]
    assert whole_N.tolist() == as_text


def test_hash_is_the_same_on_every_machine_and_release() -> None:
    hashes_N = hash_categories(categories_of(pa.array(["a", "b", None])), seed=0)
    assert hashes_N.tolist() == PINNED_TEXTS
    rows_N = hash_rows(
        [categories_of(pa.array(["a", "b"]))],
        np.float32([[1.5], [2.0]]),
        np.uint8([[0, 0], [1, 0]]),
        seed=0,
    )
    assert rows_N.tolist() == PINNED_ROWS


PINNED_TEXTS = [18398703975611568807, 2932718823533156554, 11404554778932458331]
PINNED_ROWS = [14439075081390685311, 7043303405353870116]


def test_shares_are_near_the_fractions_and_a_seed_carves_other_groups() -> None:
    groups = categories_of(pa.array(np.arange(20_000)))
    carved = {}
    for seed in (0, 1):
        fractions = SplitFractions(valid=0.1, test=0.2, seed=seed)
        carved[seed] = carve(hash_categories(groups, seed=seed), fractions, wanted=BOTH)
        shares = np.bincount(carved[seed]) / 20_000
        assert shares.tolist() == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert (carved[0] != carved[1]).mean() > 0.3


def test_only_what_is_wanted_is_carved() -> None:
    hashes_N = hash_categories(categories_of(pa.array(np.arange(1000))), seed=0)
    fractions = SplitFractions(valid=0.3, test=0.3)
    assert set(carve(hashes_N, fractions, wanted=("test",)).tolist()) == {0, 2}
    assert set(carve(hashes_N, fractions, wanted=()).tolist()) == {0}


def test_equal_rows_hash_alike_and_any_difference_shows() -> None:
    texts = pa.array(["a", "a", "b", "a", "a"])
    raw_ND = np.float32([[1], [1], [1], [2], [1]])
    labels_NL = np.uint8([[0, 0], [0, 0], [0, 0], [0, 0], [1, 0]])
    hashes = hash_rows([categories_of(texts)], raw_ND, labels_NL, seed=0).tolist()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
