import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.errors import StorageError
from tuner.storage import (
    absolute_uri,
    delete,
    download,
    exists,
    join,
    local_path,
    parent,
    upload,
)

Name = Callable[[Path], str]


@pytest.fixture(params=["path", "file URI"])
def name(request: pytest.FixtureRequest) -> Name:
    """Name a local place as a user may: by its path, or by a URI that pyarrow knows."""
    return str if request.param == "path" else Path.as_uri


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "weights").write_bytes(b"\x00\x01")
    (directory / "configuration.json").write_text("{}")
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_uploaded_can_be_downloaded(tmp_path: Path, source: Path, name: Name) -> None:
    uri = name(tmp_path / "job" / "us" / "trial-0001")
    assert not exists(uri)
    upload(source, uri)
    assert exists(uri)
    with download(uri) as directory:
        assert files(directory) == files(source)


def test_an_upload_replaces_files_whole_and_leaves_no_partial_ones(
    tmp_path: Path, source: Path, name: Name
) -> None:
    uri = name(tmp_path / "trial")
    upload(source, uri)
    held = (tmp_path / "trial" / "weights").open("rb")
    (source / "weights").write_bytes(b"\x02" * 1000)
    upload(source, uri)
    with held:
        assert held.read() == b"\x00\x01"  # a reader keeps the file that it opened
    assert files(tmp_path / "trial") == files(source)


def test_a_partial_file_of_a_killed_upload_is_overwritten(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "trial"
    target.mkdir()
    (target / ".weights.partial").write_bytes(b"half of an old one that was longer")
    upload(source, str(target))
    assert files(target) == files(source)


def test_what_cannot_be_written_is_told(tmp_path: Path, source: Path, name: Name) -> None:
    (tmp_path / "file").write_text("in the way")
    uri = name(tmp_path / "file" / "trial")
    with pytest.raises(StorageError) as caught:
        upload(source, uri)
    message = str(caught.value)
    assert message.startswith(f"storage: cannot write {uri} (")
    assert message.endswith("; check access and space")


def test_a_storage_that_is_away_for_longer_is_waited_for(tmp_path: Path, source: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("in the way")
    threading.Timer(4.5, obstacle.unlink).start()  # longer than the four tries
    upload(source, str(obstacle / "trial"), patience_s=60.0)
    assert files(obstacle / "trial") == files(source)


def test_a_uri_keeps_its_query(tmp_path: Path, source: Path) -> None:
    storage = absolute_uri("s3://bucket/jobs/?endpoint_override=http%3A%2F%2Flocalhost%3A9000")
    assert storage == "s3://bucket/jobs?endpoint_override=http%3A%2F%2Flocalhost%3A9000"
    query = "?endpoint_override=http%3A%2F%2Flocalhost%3A9000"
    checkpoint = join(storage, "us", "mmoe", "trial-0001")
    assert checkpoint == f"s3://bucket/jobs/us/mmoe/trial-0001{query}"
    assert parent(checkpoint, 2) == f"s3://bucket/jobs/us{query}"
    local = str(tmp_path / "what?" / "job")
    assert join(local, "us") == f"{local}/us"
    assert parent(join(local, "us"), 1) == local


def test_a_storage_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, source: Path, name: Name
) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("in the way")
    threading.Timer(0.2, obstacle.unlink).start()
    upload(source, name(obstacle / "trial"))
    assert files(obstacle / "trial") == files(source)


def test_a_disk_that_is_full_leaves_what_was_there_and_nothing_half(
    tmp_path: Path, source: Path
) -> None:
    target = tmp_path / "trial"
    upload(source, str(target))
    before = files(target)
    (source / "weights").write_bytes(b"new" * 1000)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            StorageError, match=r"cannot write .*File too large.*; check access and"
        ):
            upload(source, str(target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert files(target) == before


def test_what_is_not_there_is_told(tmp_path: Path, name: Name) -> None:
    uri = name(tmp_path / "gone")
    with pytest.raises(StorageError) as caught, download(uri):
        pass
    assert str(caught.value) == f"storage: {uri} is not there; was it moved or deleted?"


def test_deleting_takes_a_directory_and_is_harmless_where_there_is_none(
    tmp_path: Path, source: Path, name: Name
) -> None:
    uri = name(tmp_path / "trial")
    upload(source, uri)
    delete(uri)
    assert not (tmp_path / "trial").exists()
    delete(uri)


def test_a_path_is_made_absolute_and_a_uri_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute_uri("pwiser") == str(tmp_path / "pwiser")
    assert absolute_uri("/data/pwiser/") == "/data/pwiser"
    assert absolute_uri("~/pwiser") == "/home/someone/pwiser"
    assert absolute_uri("file:///data/pwiser/") == "file:///data/pwiser"


def test_a_uri_without_a_filesystem_is_refused() -> None:
    with pytest.raises(StorageError, match=r"^storage: ftp://host/x: no filesystem for this URI"):
        absolute_uri("ftp://host/x")


def test_local_places_have_a_path(tmp_path: Path, name: Name) -> None:
    assert local_path(name(tmp_path / "pwiser")) == tmp_path / "pwiser"


def test_names_are_joined_by_one_slash() -> None:
    assert join("/data/", "us", "mmoe") == "/data/us/mmoe"
    assert join("s3://bucket/pwiser", "us/mmoe/trial-0000") == (
        "s3://bucket/pwiser/us/mmoe/trial-0000"
    )
