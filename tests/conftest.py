"""How a test run ends."""

import atexit
import os
import sys

import pytest

EXIT_CODE = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_CODE] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave once all is said and cleaned up, past the destructors of the libraries in C++.

    Threads of Ray, Arrow and ONNX Runtime outlive their shutdown; beside them the interpreter's
    end once was a segmentation fault, after every test had passed.
    """
    if EXIT_CODE not in config.stash:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash[EXIT_CODE])
