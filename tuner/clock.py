"""Durations in words that people read at a glance."""

__all__ = ["clock"]


def clock(seconds: float | None) -> str:
    """Show a duration as [H:]MM:SS; `--:--` where it is unknown.

    A negative one, as two machines' clocks make it, counts as 0.
    """
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
