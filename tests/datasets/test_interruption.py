"""A preparation that is stopped leaves nothing that looks finished, and begins again cleanly."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets import open_dataset, validate

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 120


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files") / "raw"
    script = REPOSITORY / "benchmarks" / "raw_files.py"
    subprocess.run(
        [sys.executable, script, "aliexpress", "--impressions", "100000", "--out", directory],
        check=True,
        capture_output=True,
    )
    return directory


def start(raw: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tuner", "data", "prepare", "aliexpress", "--raw"]
    command += ["--country", "nl", "--input", str(raw), "--out", str(out)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def wait_for(process: "subprocess.Popen[str]", directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not any(directory.glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} never came"
        try:
            process.wait(timeout=0.005)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"ended before {pattern} came")


@pytest.mark.parametrize("moment", [".out.work-*/engine.duckdb", ".out.partial-*"])
def test_interrupt_leaves_nothing(raw: Path, tmp_path: Path, moment: str) -> None:
    process = start(raw, tmp_path / "out")
    wait_for(process, tmp_path, moment)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_killed_preparation_begins_again_cleanly(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(raw, out)
    wait_for(process, tmp_path, ".out.partial-*")
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {".out.partial", ".out.work"}
    again = start(raw, out)
    again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert validate(open_dataset(str(out))) == []
