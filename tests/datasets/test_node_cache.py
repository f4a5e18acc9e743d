import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datasets import DatasetError
from datasets.node_cache import (
    CACHE_VARIABLE,
    READY,
    cache_directory,
    check_cache,
    locked,
    make_cache,
)

DAY_S = 86_400
MIB = 1024**2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return cache_directory()


def write_array(entry: Path, size_bytes: int = 1) -> None:
    entry.mkdir()
    with (entry / "ids_NF.npy").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)


def make_old(entry: Path) -> None:
    (entry / READY).touch()
    os.utime(entry / READY, times=(time.time() - 8 * DAY_S,) * 2)


def test_the_directory_is_made_and_nothing_is_left_in_it(cache: Path) -> None:
    check_cache({cache / "us": 1})
    assert list(cache.iterdir()) == []


def test_arrays_beyond_the_disk_are_told_unless_they_are_there(cache: Path) -> None:
    beyond = {cache / "us": 10**18, cache / "es": 1}
    with pytest.raises(DatasetError, match=r"1000000000000000001 bytes needed, \d+ are free\); m"):
        check_cache(beyond)
    (cache / "us").mkdir()
    (cache / "us" / READY).touch()
    check_cache(beyond)


def test_what_nobody_wants_any_more_is_removed_and_what_is_wanted_stays(cache: Path) -> None:
    make_cache()
    for name in ("wanted", "unwanted"):
        write_array(cache / name)
        make_old(cache / name)
    check_cache({cache / "wanted": 1})
    assert [path.parent.name for path in cache.glob("*/*.npy")] == ["wanted"]
    assert [path.parent.name for path in cache.glob(f"*/{READY}")] == ["wanted"]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(cache: Path) -> None:
    make_cache()
    for name in ("killed", "loading"):
        write_array(cache / name)
    with locked(cache / "loading"):
        check_cache({cache / "killed": 1})
        assert [path.parent.name for path in cache.glob("*/*.npy")] == ["loading"]


def test_what_an_entry_that_is_being_written_holds_needs_no_more_room(cache: Path) -> None:
    make_cache()
    write_array(cache / "us", 64 * MIB)
    with locked(cache / "us"):
        free_bytes = shutil.disk_usage(cache).free
        check_cache({cache / "us": free_bytes + 32 * MIB})
        with pytest.raises(DatasetError, match=r" bytes needed, \d+ are free\); m"):
            check_cache({cache / "us": free_bytes + 128 * MIB})


def test_many_processes_may_check_at_the_same_time(cache: Path) -> None:
    make_cache()
    for index in range(100):
        write_array(cache / str(index))
        make_old(cache / str(index))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_cache, [{cache / "us": 1}] * 8))
    assert list(cache.glob("*/*.npy")) == []
