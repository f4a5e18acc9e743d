import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from datasets.errors import DatasetError, OutputExistsError
from datasets.filesystem import Location, locate, staged_directory, working_directory


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
        own = f".b.partial-{socket.gethostname()}-{os.getpid()}"
        assert Path(stage.path) == tmp_path / "a" / own
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


def test_what_dead_processes_left_is_removed_and_others_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    dead = [f".out.{kind}-{host}-{ended.pid}" for kind in ("partial", "work")]
    kept = [f".out.partial-{host}-1", f".out.partial-elsewhere-{ended.pid}", "out-2"]
    for name in (*dead, *kept):
        (tmp_path / name).mkdir()
    with (
        working_directory(locate(tmp_path / "out")) as work,
        staged_directory(locate(tmp_path / "out"), shown="out"),
    ):
        assert work.parent == tmp_path
    assert names_in(tmp_path) == sorted([*kept, "out"])


def test_working_directory_goes_with_its_content(tmp_path: Path) -> None:
    with working_directory(locate(tmp_path / "out")) as work:
        (work / "file").write_bytes(b"x")
    assert names_in(tmp_path) == []
