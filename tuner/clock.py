"""Durations in words that people read at a glance."""

__all__ = ["clock"]


def clock(seconds: float | None) -> str:
    """Show a duration as [H:]MM:SS; `--:--` where it is unknown."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
