import pytest

from tuner.clock import clock


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "--:--"),
        (0, "00:00"),
        (59.99, "00:59"),
        (60, "01:00"),
        (3599.9, "59:59"),
        (3600, "1:00:00"),
        (100 * 3600 + 61, "100:01:01"),
        (-3.0, "00:00"),
    ],
)
def test_a_duration_is_shown_in_minutes_and_from_an_hour_on_in_hours(
    seconds: float | None, shown: str
) -> None:
    assert clock(seconds) == shown
