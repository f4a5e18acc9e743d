from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets import (
    Dataset,
    DatasetError,
    open_dataset,
    prepare_table,
    statistics,
)


@pytest.fixture
def dataset(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> Dataset:
    prepare_table(input=write_csv(frame), schema=schema_file, out=tmp_path / "rows")
    return open_dataset(str(tmp_path / "rows"))


def test_split_loads_as_contiguous_arrays_of_small_types(dataset: Dataset) -> None:
    assert dataset.name == "rows"
    for split, summary in dataset.manifest.splits.items():
        impressions = dataset.load(split)
        arrays = (
            impressions.ids_NF,
            impressions.numericals_ND,
            impressions.clicks_N,
            impressions.conversions_N,
        )
        assert [str(array.dtype) for array in arrays] == ["int8", "float32", "uint8", "uint8"]
        assert all(array.flags.c_contiguous for array in arrays)
        assert impressions.num_impressions == summary.impressions
        assert impressions.clicks_N.sum() == summary.clicks
        assert impressions.conversions_N.sum() == summary.conversions
        assert impressions.ids_NF.shape[1] == len(dataset.manifest.vocabulary_sizes)


def test_train_is_normalised(dataset: Dataset) -> None:
    numericals_ND = dataset.load("train").numericals_ND
    np.testing.assert_allclose(numericals_ND.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(numericals_ND.std(axis=0), 1, atol=1e-5)


def test_uri_opens_like_a_path(dataset: Dataset) -> None:
    again = open_dataset(f"file://{dataset.uri}")
    assert again.digest == dataset.digest
    np.testing.assert_array_equal(again.load("test").ids_NF, dataset.load("test").ids_NF)


def test_large_vocabulary_widens_the_ids(tmp_path: Path, write_csv: Callable[..., Path]) -> None:
    schema = tmp_path / "s.yaml"
    schema.write_text(
        "labels: {click: c, conversion: v}\ncategorical: [few, many]\nsplit: {test: 0}\n"
    )
    rows = pd.DataFrame({"few": 1, "many": range(400), "c": 1, "v": 0})
    prepare_table(input=write_csv(rows), schema=schema, out=tmp_path / "wide")
    dataset = open_dataset(str(tmp_path / "wide"))
    train = dataset.load("train")
    assert train.ids_NF.dtype == np.int16
    assert train.ids_NF[:, 1].max() == dataset.manifest.vocabulary_sizes["many"] - 1 > 127
    assert dataset.size_bytes("train") == train.size_bytes
    assert train.numericals_ND.shape == (train.num_impressions, 0)
    assert (dataset.load("valid").ids_NF[:, 1] == 0).all()


def test_size_is_known_without_loading(dataset: Dataset) -> None:
    for split in dataset.manifest.splits:
        assert dataset.size_bytes(split) == dataset.load(split).size_bytes > 0


def test_unknown_split_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match=r"no split 'dev' \(it has train, valid, test\)"):
        dataset.load("dev")


def test_missing_and_damaged_parts_are_refused(dataset: Dataset) -> None:
    part = Path(dataset.uri) / "test" / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"cannot read .*part-00000\.parquet .*prepare the data"):
        dataset.load("test")
    part.unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*part-00000\.parquet .*prepare the data"):
        dataset.load("test")


def test_part_with_other_rows_is_refused(dataset: Dataset) -> None:
    directory = Path(dataset.uri)
    train, test = (directory / split / "part-00000.parquet" for split in ("train", "test"))
    small, large = test.read_bytes(), train.read_bytes()
    test.write_bytes(large)
    train.write_bytes(small)
    for split in ("train", "test"):
        with pytest.raises(DatasetError, match=r"it has \d+ bytes, the manifest says \d+\); prep"):
            dataset.load(split)
    unsummed = replace(dataset, manifest=dataset.manifest.model_copy(update={"files": {}}))
    for split in ("train", "test"):
        with pytest.raises(DatasetError, match=r"holds \d+ rows, the manifest says \d+; prepare"):
            unsummed.load(split)


def test_statistics_give_counts_and_ratios(dataset: Dataset) -> None:
    found = statistics(dataset)["train"]
    summary = dataset.manifest.splits["train"]
    assert (found.impressions, found.clicks) == (summary.impressions, summary.clicks)
    assert found.ctr == summary.clicks / summary.impressions
    assert found.cvr == summary.conversions / summary.clicks
    assert found.ctcvr == summary.conversions / summary.impressions


def test_ratio_without_a_base_is_missing(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> None:
    path = write_csv(frame.assign(clicked=0, bought=0))
    prepare_table(input=path, schema=schema_file, out=tmp_path / "none")
    found = statistics(open_dataset(str(tmp_path / "none")))["train"]
    assert (found.ctr, found.cvr, found.ctcvr) == (0.0, None, 0.0)
