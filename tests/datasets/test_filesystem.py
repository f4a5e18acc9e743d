import os
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from datasets.errors import DatasetError, OutputExistsError
from datasets.filesystem import Location, locate, staged_directory


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("data/x").path == str(tmp_path / "data" / "x")
    assert locate(f"file://{tmp_path}/data").path == f"{tmp_path}/data"
    assert locate("data/x/").name == "x"


def test_unknown_uri_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"nope://x: no filesystem for this URI .*give a local"):
        locate("nope://x")


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_directory(locate(target), shown="a/b") as stage:
        assert Path(stage.path) == tmp_path / "a" / f".b.partial-{os.getpid()}"
        (stage / "deep/file").write_bytes(b"x")
        assert not target.exists()
    assert (target / "deep" / "file").read_bytes() == b"x"
    assert names_in(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_failure_and_interrupt_leave_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    target = locate(tmp_path / "a" / "b")
    with pytest.raises(kind), staged_directory(target, shown="a/b") as stage:
        (stage / "file").write_bytes(b"x")
        raise kind
    assert names_in(tmp_path) == []


def test_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OutputExistsError, match="--out out: already exists; give another directory"),
        staged_directory(locate(tmp_path / "out"), shown="out"),
    ):
        pass
    assert names_in(tmp_path) == ["out"]


def test_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputExistsError, match="already exists"),
        staged_directory(locate(tmp_path / "out"), shown="out"),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["theirs"]


def test_remote_target_is_written_in_place_and_removed_on_failure(tmp_path: Path) -> None:
    remote = Location(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "out")
    with pytest.raises(ValueError, match="stop"), staged_directory(remote, shown="out") as stage:
        (stage / "file").write_bytes(b"x")
        assert (tmp_path / "out" / "file").exists()
        raise ValueError("stop")
    assert names_in(tmp_path) == []
