import threading
from collections.abc import Iterator

import pytest

from datasets.pipeline import map_in_order, num_threads


def test_results_come_in_order() -> None:
    assert list(map_in_order(lambda item: item * item, range(100))) == [i * i for i in range(100)]
    assert list(map_in_order(str, [])) == []


def test_few_items_are_held() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield taken

    results = map_in_order(str, items())
    next(results)
    assert taken <= 2 * num_threads() + 1
    results.close()  # type: ignore[attr-defined]


def test_first_failure_in_order_is_raised() -> None:
    gate = threading.Event()

    def work(item: int) -> int:
        if item == 3:
            gate.wait(5)
            raise ValueError("three")
        if item == 4:
            gate.set()
            raise ValueError("four")
        return item

    results = map_in_order(work, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
