import os
import queue
import signal
import threading

import pytest

from tuner.stopping import StopRequests

SOON_S = 5.0


def test_a_signal_stops_the_search_and_a_second_one_ends_all() -> None:
    reasons: queue.Queue[str] = queue.Queue()
    with StopRequests(reasons.put) as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert reasons.get(timeout=SOON_S) == "interrupted"
        assert requests.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert reasons.empty()


def test_the_handlers_of_before_are_back_after_it() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequests(lambda _: None):
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_spent_budget_stops_the_search_without_interrupting_it() -> None:
    reasons: queue.Queue[str] = queue.Queue()
    with StopRequests(reasons.put, hours=1e-6) as requests:
        assert reasons.get(timeout=SOON_S) == "the budget is spent"
    assert not requests.interrupted
    assert requests.failure is None


def test_a_failure_from_another_thread_stops_the_search_with_its_reason() -> None:
    reasons: queue.Queue[str] = queue.Queue()
    with StopRequests(reasons.put, hours=1) as requests:
        thread = threading.Thread(target=requests.fail, args=("no lane is left",))
        thread.start()
        assert reasons.get(timeout=SOON_S) == "no lane is left"
        thread.join()
    assert requests.failure == "no lane is left"
    assert not requests.interrupted


def test_an_end_in_order_stops_nothing() -> None:
    reasons: queue.Queue[str] = queue.Queue()
    with StopRequests(reasons.put, hours=1):
        pass
    assert reasons.empty()
