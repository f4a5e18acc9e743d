"""Calls that may hang, as to a server behind a firewall: made, and left behind after a while."""

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["LOOK_TIMEOUT_S", "look"]

LOOK_TIMEOUT_S = 20.0

Answer = TypeVar("Answer")


def look(call: Callable[[], Answer], timeout_s: float | None = None) -> Answer | None:
    """Make a call in a thread of its own, and raise what it raises.

    Returns:
        Its answer; None if it hangs for `timeout_s`, which is `LOOK_TIMEOUT_S` if not given.
    """
    answers: list[Answer] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
            faults.append(error)

    thread = threading.Thread(target=run, name="look", daemon=True)
    thread.start()
    thread.join(LOOK_TIMEOUT_S if timeout_s is None else timeout_s)
    if faults:
        raise faults[0]
    return answers[0] if answers else None
