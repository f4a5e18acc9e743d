"""Fixtures of the trainables tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

Results = dict[str, Tensor]


@pytest.fixture
def run_ranks() -> Callable[[str, Path], tuple[Results, Results]]:
    """Run a scenario of rank.py on one rank and on two (gloo); return what each world got."""

    def run(scenario: str, directory: Path) -> tuple[Results, Results]:
        script = Path(__file__).with_name("rank.py")
        root = str(script.parents[2])
        paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(script),
                    scenario,
                    str(rank),
                    str(world_size),
                    str(directory / "rendezvous"),
                    str(directory / f"world_{world_size}.pt"),
                ],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for world_size in (1, 2)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                _, errors = process.communicate(timeout=120)
                assert process.returncode == 0, errors
        finally:
            for process in processes:
                process.kill()
        one, two = (torch.load(directory / f"world_{size}.pt") for size in (1, 2))
        return one, two

    return run
