"""A measurement in a process of its own, and in no Ray cluster that the caller may be in."""

import json
import os
import subprocess
import sys
from typing import Any


def measured_apart(script: str, *arguments: str, shown: str) -> dict[str, Any]:
    """Run a script and return the JSON of its last line.

    Args:
        script: the benchmark's own file.
        arguments: after it on the command line.
        shown: what the message calls the measurement if it fails, which ends this process.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(
        [sys.executable, script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    if result.returncode != 0:
        sys.exit(f"{shown}: failed\n{result.stdout}{result.stderr}")
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures
