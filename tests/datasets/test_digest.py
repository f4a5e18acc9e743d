import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datasets.digest import RowSum, dataset_digest
from datasets.schema import CategoricalField, Labels, NumericalField, Schema

SCHEMA = Schema(
    labels=Labels(click="c", conversion="v"),
    categorical={"a": CategoricalField(), "b": CategoricalField()},
    numerical={"x": NumericalField()},
)


def columns(num_rows: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, 5, (num_rows, 2)).astype(np.int16),
        generator.normal(size=(num_rows, 1)).astype(np.float32),
        generator.integers(0, 2, num_rows).astype(np.uint8),
        generator.integers(0, 2, num_rows).astype(np.uint8),
    ]


def digest_of(*blocks: list[np.ndarray], schema: Schema = SCHEMA, vocabularies: str = "v") -> str:
    rows = RowSum()
    for block in blocks:
        rows.update(*block)
    return dataset_digest(schema, vocabularies_hash=vocabularies, row_sums={"train": rows})


def test_row_sum_is_the_documented_formula() -> None:
    ids_NF, raw_ND, click_N, conversion_N = columns(20, 0)
    total = 0
    for ids, raw, click, conversion in zip(ids_NF, raw_ND, click_N, conversion_N, strict=True):
        row = ids.astype("<i4").tobytes() + raw.astype("<f4").tobytes() + bytes([click, conversion])
        total += int.from_bytes(hashlib.sha256(row).digest(), "little")
    rows = RowSum()
    rows.update(ids_NF, raw_ND, click_N, conversion_N)
    assert rows.hexdigest() == f"{total % 2**256:064x}"


@given(st.integers(0, 30), st.integers(0, 30), st.randoms())
def test_order_and_blocks_do_not_matter(num_rows: int, cut: int, random: object) -> None:
    whole = columns(num_rows, 1)
    order = np.arange(num_rows)
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = [column[order] for column in whole]
    parts = [[column[:cut] for column in shuffled], [column[cut:] for column in shuffled]]
    assert digest_of(whole) == digest_of(*parts)


def test_every_cell_and_every_row_matters() -> None:
    original = digest_of(columns(10, 2))
    seen = {original}
    for index in range(4):
        changed = [column.copy() for column in columns(10, 2)]
        changed[index].flat[3] += 1
        seen.add(digest_of(changed))
    doubled = [np.concatenate([column, column[:1]]) for column in columns(10, 2)]
    seen |= {digest_of(doubled), digest_of(columns(10, 2), vocabularies="w")}
    seen.add(digest_of(columns(10, 2), schema=SCHEMA.model_copy(update={"numerical": {}})))
    assert len(seen) == 8


def test_what_made_the_rows_does_not_matter() -> None:
    renamed = SCHEMA.model_copy(
        update={"labels": Labels(click="y", conversion="z"), "drop": ("q",), "group": "g"}
    )
    assert digest_of(columns(10, 2)) == digest_of(columns(10, 2), schema=renamed)
