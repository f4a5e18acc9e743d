"""The entry of `pwiser`: checks that `datasets` is ours before anything imports it."""

import importlib.util
import sys
from pathlib import Path

__all__ = ["main"]

OURS = "pwiser-tuner"


def main() -> None:
    """Run the command line; faults of the user's end with one line and exit code 2."""
    if fault := _foreign_datasets():
        sys.stderr.write(f"pwiser: {fault}\n")
        sys.exit(2)
    from tuner.cli import run

    sys.exit(run())


def _foreign_datasets() -> str | None:
    """Say whose the `datasets` on the path is, if it is another library's."""
    spec = importlib.util.find_spec("datasets")
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is not None and OURS in origin.read_text(encoding="utf-8")[:200]:
        return None
    found = origin.parent if origin is not None else "missing"
    return (
        f"the package 'datasets' on the path is not pwiser-tuner's ({found}); the Hugging Face "
        "library of that name cannot share an environment with it: install ours into its own"
    )


if __name__ == "__main__":
    main()
