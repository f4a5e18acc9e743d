from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import Dataset, DatasetError, open_dataset, synthesize
from datasets.loading import Impressions
from datasets.streaming import StreamedSplit

ROWS = 200_000  # several row groups of 65,536


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out: Path = tmp_path_factory.mktemp("prepared") / "streamed"
    synthesize(out=out, impressions=ROWS, seed=0)
    return open_dataset(str(out))


@pytest.fixture(scope="module")
def split(dataset: Dataset) -> StreamedSplit:
    return dataset.stream("train")


@pytest.fixture(scope="module")
def loaded(dataset: Dataset) -> Impressions:
    return dataset.load("train")


def same(ours: list[Impressions], other: Impressions) -> None:
    for name in Impressions.__annotations__:
        parts = [getattr(part, name) for part in ours]
        whole = np.concatenate(parts) if parts else getattr(other, name)[:0]
        np.testing.assert_array_equal(whole, getattr(other, name))
        assert whole.dtype == getattr(other, name).dtype


def test_it_knows_its_rows_without_reading_them(split: StreamedSplit, loaded: Impressions) -> None:
    assert split.num_rows == loaded.num_impressions
    assert split.num_groups > 2


@pytest.mark.parametrize("max_rows", [1, 65_536, 100_000, 10**9])
def test_windows_in_stored_order_are_the_loaded_rows(
    split: StreamedSplit, loaded: Impressions, max_rows: int
) -> None:
    same(list(split.chunks(0, split.num_rows, max_rows)), loaded)


@settings(max_examples=10)
@given(bounds=st.lists(st.integers(0, 150_000), min_size=2, max_size=2, unique=True))
def test_any_stretch_is_the_same_stretch_of_the_loaded_rows(
    split: StreamedSplit, loaded: Impressions, bounds: list[int]
) -> None:
    start, stop = sorted(bounds)
    same(list(split.chunks(start, stop, 65_536)), loaded.slice(start, stop))


@given(
    seed=st.integers(0, 9),
    max_rows=st.integers(1, 200_000),
    bounds=st.lists(st.integers(0, 150_000), min_size=2, max_size=2),
)
def test_windows_cover_a_stretch_once_and_keep_to_their_size(
    split: StreamedSplit, seed: int, max_rows: int, bounds: list[int]
) -> None:
    start, stop = sorted(bounds)
    order = split.shuffled_order(seed)
    windows = split.windows(order, start, stop, max_rows)
    assert [row for window in windows for row in (window.start, window.stop)][1:-1] == [
        edge for window in windows[1:] for edge in (window.start, window.start)
    ]
    assert sum(map(len, windows)) == stop - start
    if windows:
        assert (windows[0].start, windows[-1].stop) == (start, stop)
        assert all(0 < len(window) <= max(max_rows, 65_536) for window in windows)


def test_a_shuffled_order_reads_every_row_once(split: StreamedSplit, loaded: Impressions) -> None:
    order = split.shuffled_order(3, 1)
    assert sorted(order) == list(range(split.num_groups))
    windows = split.windows(order, 0, split.num_rows, 70_000)
    rows = np.concatenate([split.read(order, window).numericals_ND[:, 0] for window in windows])
    np.testing.assert_array_equal(np.sort(rows), np.sort(loaded.numericals_ND[:, 0]))


def test_the_order_depends_on_the_seed_alone(split: StreamedSplit) -> None:
    orders = {tuple(split.shuffled_order(7, epoch)) for epoch in range(20)}
    assert len(orders) > 1
    np.testing.assert_array_equal(split.shuffled_order(7, 0), split.shuffled_order(7, 0))


def test_labels_are_read_alone(split: StreamedSplit, loaded: Impressions) -> None:
    clicks_N, conversions_N = split.labels()
    np.testing.assert_array_equal(clicks_N, loaded.clicks_N)
    np.testing.assert_array_equal(conversions_N, loaded.conversions_N)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    synthesize(out=out, impressions=2_000, seed=0)
    split = open_dataset(str(out)).stream("train")
    part = next((out / "train").glob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    part.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"^{out}: cannot read {part} \(.*\); prepare the"):
        list(split.chunks(0, split.num_rows, 1_000))
