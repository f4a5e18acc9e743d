"""A dataset's digest: the same rows give the same digest, in any order and any layout of parts.

Per row the SHA-256 of its canonical bytes (int32 ids, float32 raw numericals, click, conversion,
little-endian), summed modulo 2**256 per split; then the SHA-256 over these sums, the row counts,
the fields and the vocabularies; and the lengths of bags and the numerical type where they are not
1 and float32. Paths, part layout and normalisation statistics do not enter.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets.schema import Schema

__all__ = ["RowSum", "dataset_digest"]

_MODULUS = 1 << 256


class RowSum:
    """The order-independent sum of the hashes of a split's rows."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def update(
        self,
        ids_NF: npt.NDArray[np.signedinteger[Any]],
        raw_ND: npt.NDArray[np.float32],
        click_N: npt.NDArray[np.uint8],
        conversion_N: npt.NDArray[np.uint8],
    ) -> None:
        """Add rows; an empty block changes nothing."""
        num_rows = len(click_N)
        if not num_rows:
            return
        content = np.concatenate(
            [
                np.ascontiguousarray(ids_NF, "<i4").view(np.uint8).reshape(num_rows, -1),
                np.ascontiguousarray(raw_ND, "<f4").view(np.uint8).reshape(num_rows, -1),
                click_N.reshape(-1, 1),
                conversion_N.reshape(-1, 1),
            ],
            axis=1,
        )
        width, buffer, sha256 = content.shape[1], memoryview(content.tobytes()), hashlib.sha256
        starts = range(0, len(buffer), width)
        hashes = b"".join([sha256(buffer[start : start + width]).digest() for start in starts])
        # eight 32-bit words of each hash, summed in 64 bits: exact up to 2**32 rows a block
        words = np.frombuffer(hashes, "<u4").reshape(num_rows, 8).sum(axis=0, dtype=np.uint64)
        block_sum = sum(int(word) << (32 * index) for index, word in enumerate(words))
        self._sum = (self._sum + block_sum) % _MODULUS
        self.rows += num_rows

    def merge(self, other: "RowSum") -> None:
        """Add the rows of another sum."""
        self._sum = (self._sum + other._sum) % _MODULUS
        self.rows += other.rows

    def hexdigest(self) -> str:
        """Return the sum as 64 hexadecimal digits."""
        return f"{self._sum:064x}"


def dataset_digest(
    schema: Schema, *, vocabularies_hash: str, row_sums: Mapping[str, RowSum]
) -> str:
    """Return the SHA-256 of a dataset's content as 64 hexadecimal digits."""
    content: dict[str, object] = {
        "categorical": list(schema.categorical),
        "numerical": [[name, field.normalize] for name, field in schema.numerical.items()],
        "vocabularies": vocabularies_hash,
        "splits": {name: [rows.rows, rows.hexdigest()] for name, rows in row_sums.items()},
    }
    bags = {name: field.num_ids for name, field in schema.categorical.items() if field.num_ids > 1}
    if bags:
        content["bags"] = bags
    if schema.numerical_type != "float32":
        content["numerical_type"] = schema.numerical_type
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
