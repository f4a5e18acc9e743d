"""Checks of a model's settings; each message names the setting, its value and the allowed range."""

from collections.abc import Sequence


def check_at_least(setting: str, value: int, minimum: int) -> None:
    """Raise ValueError unless ``value >= minimum``."""
    if value < minimum:
        raise ValueError(f"{setting} must be at least {minimum}, got {value}")


def check_units(setting: str, units: Sequence[int], *, may_be_empty: bool = False) -> None:
    """Raise ValueError unless ``units`` lists layer widths of at least 1."""
    if not units and not may_be_empty:
        raise ValueError(f"{setting} must list at least one layer width, got ()")
    for width in units:
        if width < 1:
            raise ValueError(f"{setting} must list widths of at least 1, got {tuple(units)}")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless ``0 <= dropout < 1``."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_option(setting: str, value: str, options: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(f"{setting} must be one of {', '.join(options)}, got {value!r}")
