"""What is installed: what every node of a job has to agree on, and what its report names."""

import platform
from importlib.metadata import version

from tuner import __version__

__all__ = ["installed_versions"]

PACKAGES = ("ray", "torch", "mlflow", "optuna", "numpy", "pandas", "pyarrow", "pydantic")


def installed_versions() -> dict[str, str]:
    """Public versions: builds of torch for CPU and CUDA may stand side by side."""
    packages = {package: version(package).partition("+")[0] for package in PACKAGES}
    return {"python": platform.python_version(), "pwiser-tuner": __version__, **packages}
