"""The service of pwiser-tuner: job file, search, lanes, tracking, selection, export, command line.

Importing this package loads neither torch nor ray, so that the processes that only pass messages
stay small; import what you need from its modules.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
