"""The service of pwiser-tuner: job file, search, lanes, tracking, selection, export, command line.

Importing this package loads neither torch nor ray, so that the processes that only pass messages
stay small; import what you need from its modules. `tuner.Client` looks after the jobs of a cluster.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> object:
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tuner.client import Client

    return Client
