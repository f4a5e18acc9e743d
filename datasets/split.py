"""Carving splits out of train by a hash, so that no session is on two sides.

The hash is of the group key's canonical text, or of all features and labels of the row where there
is no group: the same rows fall the same way on every machine, whatever the file's order, format or
chunks, and equal rows stay together.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from datasets.category import Categories
from datasets.schema import SplitFractions

__all__ = ["SPLITS", "carve", "hash_categories", "hash_rows"]

SPLITS = ("train", "valid", "test")


def hash_categories(categories: Categories, *, seed: int) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of every row's text; a missing cell hashes as the empty text."""
    texts = np.asarray([text or "" for text in categories.texts], dtype=object)
    key = hashlib.sha256(f"pwiser split {seed}".encode()).hexdigest()[:16]
    hashes = pd.util.hash_array(texts, hash_key=key, categorize=False)
    missing = pd.util.hash_array(np.asarray([""], dtype=object), hash_key=key, categorize=False)
    hashed: npt.NDArray[np.uint64] = categories.lookup(
        hashes.astype(np.uint64), missing=missing[0], padding=missing[0]
    )
    return hashed


def hash_rows(
    categories: Sequence[Categories],
    raw_ND: npt.NDArray[np.float32],
    labels_NL: npt.NDArray[np.uint8],
    *,
    seed: int,
) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of every row's features (in field order) and labels."""
    state_N = _mix(np.full(len(raw_ND), seed, np.uint64))
    for column in categories:
        state_N = _mix(state_N ^ hash_categories(column, seed=seed))
    for index in range(raw_ND.shape[1]):
        bits_N = np.ascontiguousarray(raw_ND[:, index]).view(np.uint32).astype(np.uint64)
        state_N = _mix(state_N ^ bits_N)
    for index in range(labels_NL.shape[1]):
        state_N = _mix(state_N ^ labels_NL[:, index].astype(np.uint64))
    return state_N


def _mix(state_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter 64-bit states (the step and finaliser of SplitMix64, Steele et al., 2014)."""
    mixed = state_N + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def carve(
    hashes_N: npt.NDArray[np.uint64], fractions: SplitFractions, *, wanted: Sequence[str]
) -> npt.NDArray[np.int8]:
    """Return each row's split as an index into ``SPLITS``.

    Args:
        hashes_N: The hash of each row's group, or of the row.
        fractions: The share of hashes for each split.
        wanted: Which of valid and test to carve; rows for the others stay in train.
    """
    shares: Mapping[str, float] = {"valid": fractions.valid, "test": fractions.test}
    position_N = hashes_N.astype(np.float64) / 2.0**64
    split_N = np.zeros(len(hashes_N), np.int8)
    lower = 0.0
    for index, name in enumerate(SPLITS):
        if name in wanted:
            upper = lower + shares[name]
            split_N[(position_N >= lower) & (position_N < upper)] = index
            lower = upper
    return split_N
