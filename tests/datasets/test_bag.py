"""Fields of several values: bags, or their first value."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import (
    Dataset,
    Encoder,
    TableError,
    open_dataset,
    prepare_table,
    synthesize,
    validate,
)
from datasets.bag import categories_per_place
from datasets.category import MISSING, PADDING, canonical_text
from datasets.node_cache import CACHE_VARIABLE
from datasets.schema import CategoricalField
from datasets.vocabulary import Vocabulary

VALUES = st.one_of(st.sampled_from(["a", "b", "", "NA", "3", "3.0", "007", "True"]), st.none())
LISTS = st.lists(st.one_of(st.none(), st.lists(VALUES, max_size=6)), max_size=12)


def loop(cells: list[list[str | None] | None], num_ids: int) -> list[list[str]]:
    rows = []
    for cell in cells:
        values = [text for value in cell or [] if (text := canonical_text(value)) is not None]
        kept = values[:num_ids] or ["missing"]
        rows.append(kept + ["padding"] * (num_ids - len(kept)))
    return rows


def per_place(column: pa.Array, field: CategoricalField) -> list[list[str]]:
    places = categories_per_place(column, field)
    named = {MISSING: "missing", PADDING: "padding"}
    columns = [
        [named.get(code) or str(place.texts[code]) for code in place.codes_N.tolist()]
        for place in places
    ]
    return [list(row) for row in zip(*columns, strict=True)]


@given(LISTS, st.integers(1, 4), st.booleans())
def test_places_of_lists_are_those_of_a_loop(
    cells: list[list[str | None] | None], num_ids: int, large: bool
) -> None:
    kind = pa.large_list(pa.string()) if large else pa.list_(pa.string())
    field = CategoricalField(max_values=num_ids)
    column = pa.array([["cut"], *cells, ["off"]], kind).slice(1, len(cells))
    assert per_place(column, field) == loop(cells, num_ids)


@given(LISTS, st.integers(1, 4), st.sampled_from(["|", ";", ", "]))
def test_text_with_a_separator_is_read_like_lists(
    cells: list[list[str | None] | None], num_ids: int, separator: str
) -> None:
    texts = [None if cell is None else separator.join(v or "" for v in cell) for cell in cells]
    field = CategoricalField(max_values=num_ids, separator=separator)
    assert per_place(pa.array(texts, pa.string()), field) == loop(cells, num_ids)


def test_lists_of_fixed_size_and_of_numbers() -> None:
    column = pa.array([[3, 7], None, [None, 9]], pa.list_(pa.int64(), 2))
    expected = [["3", "7"], ["missing", "padding"], ["9", "padding"]]
    assert per_place(column, CategoricalField(max_values=2)) == expected


def test_single_values_are_bags_of_one() -> None:
    expected = [["3", "padding"], ["missing", "padding"], ["4.5", "padding"]]
    assert per_place(pa.array([3.0, math.nan, 4.5]), CategoricalField(max_values=2)) == expected


# Two columns of several values: topics as a bag of 3, brands reduced to the first.
SCHEMA = """\
labels: {click: clicked, conversion: bought}
categorical:
  color: {}
  topics: {max_values: 3}
  brands: {max_values: 1, separator: ";"}
numerical: [price]
group: user
split: {valid: 0.2, test: 0.2, seed: 0}
"""


@pytest.fixture
def lists() -> pd.DataFrame:
    generator = np.random.default_rng(1)
    clicked = generator.integers(0, 2, 200)

    def cells(names: list[str]) -> list[list[str]]:
        return [list(generator.choice(names, generator.integers(0, 6))) for _ in range(200)]

    return pd.DataFrame(
        {
            "user": generator.integers(0, 60, 200),
            "color": generator.choice(["red", "blue"], 200),
            "topics": cells([f"t{i}" for i in range(20)]),
            "brands": cells(["1", "2", "3"]),
            "price": generator.normal(size=200).round(3),
            "clicked": clicked,
            "bought": clicked * generator.integers(0, 2, 200),
        }
    )


def as_text(lists: pd.DataFrame) -> pd.DataFrame:
    return lists.assign(topics=lists.topics.map("|".join), brands=lists.brands.map(";".join))


@pytest.fixture
def prepare(
    tmp_path: Path, write_csv: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Dataset]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def run(rows: pd.DataFrame, name: str = "bags", schema: str = SCHEMA) -> Dataset:
        path = tmp_path / f"{name}.parquet"
        if isinstance(rows.topics[0], str):
            path = write_csv(rows, f"{name}.csv")
        else:
            rows.to_parquet(path)
        (tmp_path / f"{name}.yaml").write_text(schema)
        prepare_table(input=path, schema=tmp_path / f"{name}.yaml", out=tmp_path / name)
        return open_dataset(str(tmp_path / name))

    return run


def test_text_and_lists_give_the_same_dataset(
    lists: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    dataset, text = prepare(lists), prepare(as_text(lists), "text")
    assert dataset.digest == text.digest
    assert dataset.manifest.bag_lengths == (1, 3, 1)
    assert list(dataset.manifest.vocabulary_sizes) == ["color", "topics", "brands"]
    assert dataset.manifest.vocabulary_sizes["topics"] == 21
    assert validate(dataset) == []


def test_loaded_rows_are_the_raw_rows_encoded(
    lists: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    dataset = prepare(lists)
    encoder = Encoder.load(_saved(dataset))
    found: set[tuple[int, ...]] = set()
    for split in ("train", "valid", "test"):
        loaded = dataset.load(split)
        assert loaded.ids_NF.shape[1] == 1 + 3 + 1
        assert loaded.ids_NF.dtype == np.int8
        assert dataset.size_bytes(split) == loaded.size_bytes
        np.testing.assert_array_equal(dataset.load_shared(split).ids_NF, loaded.ids_NF)
        found |= {tuple(row) for row in loaded.ids_NF.tolist()}
    topics, brands = encoder.vocabularies["topics"], encoder.vocabularies["brands"]
    for table in (lists, as_text(lists), pa.table(lists)):
        ids_NF, _ = encoder.encode(table)
        assert {tuple(row) for row in ids_NF.tolist()} == found
        for row, topic, brand in zip(ids_NF.tolist(), lists.topics, lists.brands, strict=True):
            expected = topics.ids_of(topic[:3]).tolist() or [0]
            assert row[1:4] == expected + [-1] * (3 - len(expected))
            assert row[4] == (brands.ids_of(brand[:1]).tolist() or [0])[0]


def test_streamed_rows_are_those_of_load(
    lists: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    dataset = prepare(lists, schema=SCHEMA + "numerical_type: float16\n")
    loaded = dataset.load("train")
    (chunk,) = dataset.stream("train").chunks(3, 50, 1000)
    for name in ("ids_NF", "numericals_ND"):
        streamed, expected = getattr(chunk, name), getattr(loaded, name)[3:50]
        assert streamed.dtype == expected.dtype
        np.testing.assert_array_equal(streamed, expected)


def _saved(dataset: Dataset) -> Path:
    directory = Path(dataset.uri).with_name("encoder")
    dataset.encoder().save(directory)
    return directory


def test_first_value_alone_is_what_a_column_of_it_gives(
    lists: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    first = lists.assign(
        topics=[cell[0] if cell else "" for cell in lists.topics],
        brands=[cell[0] if cell else "" for cell in lists.brands],
    )
    reduced = prepare(lists, "reduced", SCHEMA.replace("max_values: 3", "max_values: 1"))
    single = SCHEMA.replace("max_values: 3", "").replace('max_values: 1, separator: ";"', "")
    assert reduced.digest == prepare(first, "single", single).digest


def test_length_of_a_bag_is_content(lists: pd.DataFrame, prepare: Callable[..., Dataset]) -> None:
    longer = SCHEMA.replace("max_values: 3", "max_values: 5")
    assert prepare(lists).digest != prepare(lists, "longer", longer).digest


def test_min_count_counts_the_values_at_all_places(
    lists: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    whole = SCHEMA.replace("valid: 0.2, test: 0.2", "valid: 0, test: 0")
    dataset = prepare(lists, schema=whole + "min_count: 20\n")
    counts = lists.topics.map(lambda cell: cell[:3]).explode().value_counts()
    assert 1 < dataset.manifest.vocabulary_sizes["topics"] == (counts >= 20).sum() + 1 < 21


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("topics[0]", -1, "field 'topics[0]' has an id outside 0 to 20 (1 such rows)"),
        ("topics[1]", -2, "field 'topics[1]' has an id outside -1 to 20 (1 such rows)"),
        ("topics[2]", 21, "field 'topics[2]' has an id outside -1 to 20 (1 such rows)"),
        ("topics[2]", 5, "field 'topics[2]' has an id behind a place that is not filled (1 such"),
    ],
)
def test_damaged_bags_are_named(
    lists: pd.DataFrame,
    prepare: Callable[..., Dataset],
    column: str,
    value: int,
    message: str,
) -> None:
    dataset = prepare(lists)
    part = Path(dataset.uri) / "train" / "part-00000.parquet"
    table = pq.read_table(part)
    cells = table[column].to_numpy().copy()
    row = int((table["topics[1]"].to_numpy() < 0).argmax())  # a bag of one value at most
    cells[row] = value
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array(cells)), part)
    assert any(message in fault for fault in validate(dataset))


def test_lists_where_one_value_is_declared_are_refused(
    lists: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    with pytest.raises(TableError, match=r"column 'topics' holds list.*lists need max_values"):
        prepare(lists, schema=SCHEMA.replace("max_values: 3", ""))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(
        categorical={"topics": CategoricalField(max_values=2)},
        numerical={},
        vocabularies={"topics": Vocabulary(["a"])},
        statistics={},
    )


def test_unseen_values_count_and_an_empty_bag_is_one_unknown_value(encoder: Encoder) -> None:
    ids_NF, _ = encoder.encode(pd.DataFrame({"topics": [["a", "new", "a"], [], None, ["a"]]}))
    assert ids_NF.tolist() == [[1, 0], [0, -1], [0, -1], [1, -1]]


def test_lists_of_something_else_are_refused(encoder: Encoder) -> None:
    with pytest.raises(TableError, match=r"'topics' holds list.* or a list of these"):
        encoder.encode(pa.table({"topics": [[["a"]]]}))
    with pytest.raises(TableError, match=r"'topics' holds list.* or a list of these"):
        encoder.encode(pd.DataFrame({"topics": [["a"], "b"]}))


def _hash(dataset: Dataset) -> str:
    sha256 = hashlib.sha256()
    for split in ("train", "valid", "test"):
        loaded = dataset.load(split)
        for array in (
            loaded.ids_NF,
            loaded.numericals_ND,
            loaded.clicks_N,
            loaded.conversions_N,
        ):
            sha256.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return sha256.hexdigest()[:16]


def test_datasets_without_bags_are_what_they_were_before_there_were_bags(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> None:
    prepare_table(input=write_csv(frame), schema=schema_file, out=tmp_path / "rows")
    synthesize(out=tmp_path / "synthetic", impressions=3000, seed=1)
    for name, digest, content in (
        ("rows", "3013e454d291b017", "80663ffd9af449c0"),
        ("synthetic", "7578169b9b74a5dd", "c9bbb9729e2a8941"),
    ):
        dataset = open_dataset(str(tmp_path / name))
        assert (dataset.digest[:16], _hash(dataset)) == (digest, content)
