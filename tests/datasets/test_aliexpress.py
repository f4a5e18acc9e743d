import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from datasets import TableError, open_dataset, prepare_aliexpress
from tuner.cli.data import data_app

SAMPLES = {
    "fuxictr": ("fuxictr-tiny-mtl/train.csv", "fuxictr-tiny-mtl/test.csv", (100, 100)),
    "torch-rechub": (
        "aliexpress-sample/aliexpress_train_sample.csv",
        "aliexpress-sample/aliexpress_test_sample.csv",
        (100, 20),
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_real_sample_prepares_and_encodes_as_prepared(
    shared_data: Path, tmp_path: Path, sample: str
) -> None:
    train, test, (num_train, num_test) = SAMPLES[sample]
    (tmp_path / "raw").mkdir()
    shutil.copy(shared_data / train, tmp_path / "raw" / "train.csv")
    shutil.copy(shared_data / test, tmp_path / "raw" / "test.csv")
    manifest = prepare_aliexpress(input=tmp_path / "raw", out=tmp_path / "out")
    splits = manifest.splits
    assert splits["train"].impressions + splits["valid"].impressions == num_train
    assert splits["test"].impressions == num_test
    assert (len(manifest.vocabulary_sizes), len(manifest.statistics)) == (16, 63)
    dataset = open_dataset(str(tmp_path / "out"))
    ids_NF, numericals_ND = dataset.encoder().encode(pd.read_csv(tmp_path / "raw" / "test.csv"))
    loaded = dataset.load("test")
    np.testing.assert_array_equal(ids_NF, loaded.ids_NF)
    np.testing.assert_array_equal(numericals_ND, loaded.numericals_ND)


def test_no_search_is_in_train_and_valid(shared_data: Path, tmp_path: Path) -> None:
    raw = shared_data / "fuxictr-tiny-mtl"
    seeds = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        manifest = prepare_aliexpress(input=raw, out=out, valid_fraction=0.3, split_seed=seed)
        seeds[seed] = manifest.digest
        rows = pd.read_csv(raw / "train.csv")
        # rows are kept in order within a split, so their features tell the searches of each
        encoded, _ = open_dataset(str(out)).encoder().encode(rows)
        searches = {}
        for split in ("train", "valid"):
            members = {tuple(ids) for ids in open_dataset(str(out)).load(split).ids_NF.tolist()}
            inside = [tuple(ids) in members for ids in encoded.tolist()]
            searches[split] = set(rows["search_id"][inside])
            assert manifest.splits[split].impressions <= sum(inside)
        assert searches["train"] | searches["valid"] == set(rows["search_id"])
    assert seeds[0] != seeds[1]


def test_numericals_are_float16_where_that_is_chosen(shared_data: Path, tmp_path: Path) -> None:
    raw = shared_data / "fuxictr-tiny-mtl"
    command = ["prepare", "aliexpress", "--input", str(raw), "--out", str(tmp_path / "half")]
    shown = CliRunner().invoke(data_app, [*command, "--numerical-type", "float16"])
    assert shown.exit_code == 0, shown.output
    prepare_aliexpress(input=raw, out=tmp_path / "full")
    half, full = (open_dataset(str(tmp_path / name)) for name in ("half", "full"))
    rounded = full.load("test").numericals_ND.astype(np.float16)
    np.testing.assert_array_equal(half.load("test").numericals_ND, rounded)
    assert (full.row_bytes, half.row_bytes) == (16 + 63 * 4 + 2, 16 + 63 * 2 + 2)


def test_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"--input .*: no train\.csv in it; give the directory"):
        prepare_aliexpress(input=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_fraction_out_of_range_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(TableError, match=r"--valid-fraction .*: must be above 0 and below 1"):
        prepare_aliexpress(input=tmp_path, out=tmp_path / "out", valid_fraction=fraction)


def test_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="--split-seed -1: must not be negative"):
        prepare_aliexpress(input=tmp_path, out=tmp_path / "out", split_seed=-1)


def test_empty_cell_is_refused_and_sends_to_a_schema_of_ones_own(
    shared_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("train.csv", "test.csv"):
        rows = pd.read_csv(shared_data / "fuxictr-tiny-mtl" / name)
        rows.loc[4, "numerical_7"] = None
        rows.to_csv(tmp_path / "raw" / name, index=False)
    with pytest.raises(
        TableError,
        match=r"train\.csv: row 5: column 'numerical_7' is empty.*use 'pwiser data prepare table' "
        "with a schema that gives 'numerical_7' a fill",
    ):
        prepare_aliexpress(input=tmp_path / "raw", out=tmp_path / "out")
