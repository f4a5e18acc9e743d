import os
import time
from pathlib import Path

import pytest

from datasets import DatasetError
from datasets.node_cache import CACHE_VARIABLE, READY, cache_directory, check_cache, make_cache

DAY_S = 86_400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return cache_directory()


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
        (cache / name).mkdir()
        (cache / name / READY).touch()
        os.utime(cache / name / READY, times=(time.time() - 8 * DAY_S,) * 2)
    check_cache({cache / "wanted": 1})
    assert list(cache.iterdir()) == [cache / "wanted"]
