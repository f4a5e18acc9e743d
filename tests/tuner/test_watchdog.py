import subprocess
import sys

import pytest

SLEEPS = """
import threading, time
from tuner.watchdog import Watchdog

def hang():
    time.sleep(60)

watchdog = Watchdog(0.5)
{body}
print("lived")
"""


@pytest.mark.parametrize(
    ("body", "lives"),
    [
        ("with watchdog.watching(): hang()", False),
        ("with watchdog.watching(): threading.Thread(target=hang).start(); hang()", False),
        ("with watchdog.watching(): pass\ntime.sleep(1)", True),
        (
            "with watchdog.watching():\n    for _ in range(10): time.sleep(0.1); watchdog.pat()",
            True,
        ),
        ("with watchdog.watching():\n    with watchdog.away(): time.sleep(1)", True),
        ("with watchdog.watching():\n    with watchdog.away(): pass\n    hang()", False),
    ],
)
def test_a_process_that_hangs_says_where_and_ends(body: str, lives: bool) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SLEEPS.format(body=body)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == (0 if lives else 1)
    assert found.stdout == ("lived\n" if lives else "")
    assert found.stderr.count("Timeout (0:00:00.5") == (0 if lives else 1)
    assert ("in hang" in found.stderr) == (not lives)
