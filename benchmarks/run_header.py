"""What every benchmark states: machine, versions, load, seed, commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def git_commit() -> str:
    """The commit of the working tree, or that there is none."""
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or "none"


def run_header(seed: int, *packages: str, **more: object) -> dict[str, Any]:
    """Print what is measured, and on what; return it for the last line.

    Args:
        seed: of the data and the weights.
        packages: distributions whose versions matter.
        more: whatever else does.
    """
    header: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{package: version(package) for package in packages},
        "load": round(os.getloadavg()[0], 1),
        "seed": seed,
        "commit": git_commit(),
        **more,
    }
    print("; ".join(f"{name} {value}" for name, value in header.items()), flush=True)
    return header
