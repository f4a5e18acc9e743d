import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets import Dataset, DatasetError, Impressions, open_dataset, prepare_table, synthesize
from datasets.node_cache import CACHE_VARIABLE, cache_directory


@pytest.fixture
def dataset(
    tmp_path: Path,
    schema_file: Path,
    frame: pd.DataFrame,
    write_csv: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Dataset:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    prepare_table(input=write_csv(frame), schema=schema_file, out=tmp_path / "rows")
    return open_dataset(str(tmp_path / "rows"))


def arrays_of(impressions: Impressions) -> list[np.ndarray]:
    return [getattr(impressions, name) for name in Impressions.__annotations__]


def assert_same(left: Impressions, right: Impressions) -> None:
    for one, other in zip(arrays_of(left), arrays_of(right), strict=True):
        assert one.dtype == other.dtype
        assert one.flags.c_contiguous
        assert one.flags.writeable  # torch.from_numpy wants it
        np.testing.assert_array_equal(one, other)


def test_shared_arrays_are_those_of_load(dataset: Dataset) -> None:
    for split in ("train", "valid", "test"):
        for _ in range(2):  # written, then found
            assert_same(dataset.load_shared(split), dataset.load(split))
    entries = [path for path in cache_directory().iterdir() if path.is_dir()]
    assert len(entries) == 3


def test_several_row_groups_keep_their_order(tmp_path: Path) -> None:
    synthesize(out=tmp_path / "big", impressions=100_000, seed=1)
    dataset = open_dataset(str(tmp_path / "big"))
    loaded = dataset.load("train")
    parts = [
        pd.read_parquet(Path(dataset.uri) / part) for part in dataset.manifest.splits["train"].parts
    ]
    rows = pd.concat(parts)
    assert loaded.num_impressions == len(rows) > 65_536
    np.testing.assert_array_equal(loaded.ids_NF[:, 2], rows["categorical_3"])
    raw_ND = rows[list(dataset.manifest.table.numerical)].to_numpy(np.float32)
    np.testing.assert_array_equal(loaded.numericals_ND, dataset.encoder().normalize(raw_ND))


def test_writing_into_shared_arrays_is_seen_by_nobody_else(dataset: Dataset) -> None:
    mine = dataset.load_shared("train")
    mine.ids_NF[:] = 0
    assert_same(dataset.load_shared("train"), dataset.load("train"))


def _load(uri: str, queue: "multiprocessing.Queue[float]") -> None:
    queue.put(float(open_dataset(uri).load_shared("train").numericals_ND.sum()))


def test_processes_that_ask_at_once_get_the_same(dataset: Dataset) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[float] = context.Queue()
    processes = [context.Process(target=_load, args=(dataset.uri, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {float(dataset.load("train").numericals_ND.sum())}


def test_an_unfinished_entry_is_written_again(dataset: Dataset) -> None:
    dataset.load_shared("train")
    (entry,) = cache_directory().iterdir()
    (entry / "ready").unlink()
    (entry / "ids_NF.npy").write_bytes(b"cut off")
    (entry / "left.npy").write_bytes(b"in the way")
    assert_same(dataset.load_shared("train"), dataset.load("train"))
    assert not (entry / "left.npy").exists()


def test_what_nobody_asked_for_is_removed(dataset: Dataset) -> None:
    shared = dataset.load_shared("train")
    (old,) = cache_directory().iterdir()
    then = time.time() - 8 * 86_400
    os.utime(old / "ready", (then, then))
    dataset.load_shared("valid")
    assert [path.name for path in old.iterdir()] == ["lock"]
    assert_same(shared, dataset.load("train"))  # who has it mapped keeps it


def test_a_cache_that_nobody_else_can_write_is_made(dataset: Dataset) -> None:
    dataset.load_shared("train")
    assert stat.S_IMODE(cache_directory().stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_is_refused(dataset: Dataset, mode: int) -> None:
    cache_directory().mkdir(parents=True)
    cache_directory().chmod(mode)
    with pytest.raises(
        DatasetError, match=r"you alone can write .*; remove it, or set PWISER_CACHE"
    ):
        dataset.load_shared("train")
    assert list(cache_directory().iterdir()) == []


def test_a_cache_of_another_user_is_refused(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_directory().mkdir(parents=True, mode=0o700)
    other = os.getuid() + 1
    cache_directory().rename(cache_directory().with_name(f"pwiser-cache-{other}"))
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(
        DatasetError, match=rf"you alone can write \(owner {other - 1}, mode drwx---"
    ):
        dataset.load_shared("train")


def test_a_link_in_place_of_the_cache_or_its_lock_is_not_followed(
    dataset: Dataset, tmp_path: Path
) -> None:
    dataset.load_shared("train")
    (entry,) = cache_directory().iterdir()
    (tmp_path / "precious").write_text("kept")
    (entry / "lock").unlink()
    (entry / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DatasetError, match="cannot keep the shared arrays here"):
        dataset.load_shared("train")
    assert (tmp_path / "precious").read_text() == "kept"
    cache_directory().rename(tmp_path / "moved")
    cache_directory().symlink_to(tmp_path / "moved")
    with pytest.raises(DatasetError, match="mode lrwx"):
        dataset.load_shared("train")


def test_directory_that_cannot_be_written_is_refused(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(
        DatasetError, match=r"cannot keep the shared arrays here .*PWISER_CACHE_DIR"
    ):
        dataset.load_shared("train")
