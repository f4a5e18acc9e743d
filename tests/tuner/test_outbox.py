import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.errors import StorageError
from tuner.outbox import Outbox, outbox_path

KILLED = """
import os, signal, sys
from pathlib import Path
from tuner.outbox import Outbox

outbox = Outbox(Path(sys.argv[1]))
numbers = [outbox.put(f"record {index}") for index in range(1000)]
for number in numbers[::2]:
    outbox.remove(number)
os.kill(os.getpid(), signal.SIGKILL)
"""


def texts(outbox: Outbox) -> list[str]:
    return [text for _, text in outbox.waiting()]


def test_texts_wait_in_their_order_until_they_are_removed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "new" / "outbox.db")
    first, second, third = (outbox.put(text) for text in ("a", "b\n☃", "c"))
    assert outbox.waiting() == [(first, "a"), (second, "b\n☃"), (third, "c")]
    outbox.remove(second)
    assert texts(outbox) == ["a", "c"]
    outbox.close()
    again = Outbox(tmp_path / "new" / "outbox.db")
    again.put("d")
    assert texts(again) == ["a", "c", "d"]
    again.close()


def test_what_was_put_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    found = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert found.returncode == -signal.SIGKILL
    outbox = Outbox(path)
    assert texts(outbox) == [f"record {index}" for index in range(1, 1000, 2)]
    outbox.close()


def test_a_file_that_is_no_outbox_is_told(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    path.write_text("not a database, but long enough to look like one" * 20)
    told = re.escape(f"storage: {path} cannot be used (file is not a database); name a directory")
    with pytest.raises(StorageError, match=f"^{told}"):
        Outbox(path)


def test_a_place_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"^storage: .*outbox.db cannot be used \("):
        Outbox(tmp_path / "file" / "outbox.db")


def test_the_outbox_is_in_the_jobs_storage_or_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outbox_path(str(tmp_path / "job" / "1")) == tmp_path / "job" / "1" / "outbox.db"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    first, second = (outbox_path(f"s3://bucket/job/{number}?region=eu-1") for number in (1, 2))
    assert first.parent == second.parent == tmp_path / "pwiser"
    assert first.name != second.name
