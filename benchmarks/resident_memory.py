"""Peak memory of a command with all its children, sampled from /proc (Linux)."""

import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.2


@dataclass(frozen=True)
class MeasuredRun:
    """What a command printed, and the most memory that its processes held together."""

    output: str
    peak_bytes: int


def resident_bytes(root: int) -> int:
    """Sum the proportional set sizes of a process and all below it (shared pages count once)."""
    total, waiting = 0, [root]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for task in (process / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended meanwhile
    return total


def run_measured(command: list[str], *, memory_limit_bytes: int | None = None) -> MeasuredRun:
    """Run a command and sample its memory.

    Args:
        command: The program and its arguments.
        memory_limit_bytes: Kill it once it holds more than this.

    Raises:
        subprocess.CalledProcessError: It failed, or was killed for its memory.
    """
    peak_bytes = 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak_bytes
        while not ended.wait(SAMPLE_S):
            peak_bytes = max(peak_bytes, resident_bytes(process.pid))
            if memory_limit_bytes is not None and peak_bytes > memory_limit_bytes:
                process.kill()

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = process.communicate()
    ended.set()
    sampler.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return MeasuredRun(output, peak_bytes)
