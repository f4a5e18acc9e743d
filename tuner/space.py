"""The search space: dimensions by the dotted path of a field, and what values they take."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field, model_validator

from trainables.configuration import ConfigurationError, Settings, TrialConfiguration

__all__ = ["PAPER_POINT", "Dimension", "SearchSpace", "has_field"]

PAPER_POINT: dict[str, Any] = {
    "loss.alpha": 0.3,
    "loss.m1": 0.3,
    "loss.m2": 0.1,
    "training.learning_rate": 1e-3,
    "training.batch_size": 2048,
    "training.weight_decay": 1e-6,
    "model.num_experts": 8,
}
"""The paper's best configuration for Alibaba-US (docs/method.md)."""


MAX_GRID_POINTS = 100_000


class Dimension(Settings):
    """One dimension: a range from `low` to `high`, or a list of `values`."""

    low: float | None = Field(None, description="smallest value, included")
    high: float | None = Field(None, description="largest value, included")
    log: bool = Field(False, description="search the logarithm of the value; low must be above 0")
    points: int | None = Field(
        None,
        ge=2,
        le=MAX_GRID_POINTS,
        description="values of a range under the grid sampler",
    )
    values: tuple[Any, ...] | None = Field(None, min_length=1, description="the values to try")

    @model_validator(mode="before")
    @classmethod
    def _check_mapping(cls, content: object) -> object:
        if not isinstance(content, dict | Dimension):
            raise ValueError(
                f"must be {{low: ..., high: ...}} or {{values: [...]}}, got {content!r}"
            )
        return content

    @model_validator(mode="after")
    def _check_form(self) -> "Dimension":
        given = sorted(self.model_fields_set)
        if self.values is not None:
            if len(given) > 1:
                raise ValueError(f"give values alone, or low and high, got {', '.join(given)}")
            return self
        if self.low is None or self.high is None:
            raise ValueError(f"give low and high, or values, got {', '.join(given) or 'nothing'}")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 where log is true")
        return self


class SearchSpace:
    """The dimensions of one study, checked against the fields of its model.

    Args:
        dimensions: by dotted path; those that the study's model does not have are left out.
        base: the configuration whose fields the dimensions replace.

    Raises:
        ConfigurationError: if an end or a value of a dimension is out of its field's range.
    """

    def __init__(self, dimensions: Mapping[str, Dimension], base: TrialConfiguration) -> None:
        self.base = base
        self.dimensions = {
            path: dimension for path, dimension in dimensions.items() if has_field(base, path)
        }
        self.distributions: dict[str, BaseDistribution] = {}
        self._values: dict[str, dict[Any, Any]] = {}
        for path, dimension in self.dimensions.items():
            self.distributions[path] = self._distribution(path, dimension)

    def configuration(self, params: Mapping[str, Any]) -> TrialConfiguration:
        """Put the parameters of a trial into the base configuration."""
        return self.base.replace(
            {
                path: self._values.get(path, {}).get(_choice(value), value)
                for path, value in params.items()
            }
        )

    def fixed_point(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Give every dimension the value of `point`, or the base's where `point` has none.

        A value of the loss stands even outside its dimension, being what the point is about; any
        other gives way to the base's there.
        """
        params = {}
        for path in self.dimensions:
            value = point.get(path)
            if value is None or not (path.startswith("loss.") or self._holds(path, value)):
                value = _field_value(self.base, path)
            choice = _choice(value)
            if choice in self._values.get(path, {}):
                value = choice
            params[path] = list(value) if isinstance(value, tuple) else value  # as JSON has it
        return params

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether every parameter lies within its dimension."""
        return all(self._holds(path, params[path]) for path in self.dimensions)

    def _holds(self, path: str, value: Any) -> bool:  # noqa: ANN401 - any field of any model
        if path in self._values:
            return _choice(value) in self._values[path]
        dimension = self.dimensions[path]
        assert dimension.low is not None
        assert dimension.high is not None
        return bool(dimension.low <= value <= dimension.high)

    def grid(self) -> list[dict[str, Any]]:
        """List every point of the grid, the last dimension changing first.

        Raises:
            ConfigurationError: if a range says not how many points it has, or the grid has more
                than `MAX_GRID_POINTS`.
        """
        axes = [self._grid_values(path) for path in self.dimensions]
        num_points = math.prod(map(len, axes))
        if num_points > MAX_GRID_POINTS:
            raise ConfigurationError(
                f"search.space: its grid has {num_points:,} points, more than {MAX_GRID_POINTS:,}; "
                "give fewer points or values, or another sampler"
            )
        return [
            dict(zip(self.dimensions, point, strict=True)) for point in itertools.product(*axes)
        ]

    def _grid_values(self, path: str) -> list[Any]:
        distribution = self.distributions[path]
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        dimension = self.dimensions[path]
        low, high = dimension.low, dimension.high
        if low is None or high is None or dimension.points is None:
            raise ConfigurationError(
                f"search.space.{path}: the grid sampler needs values, or points beside low and high"
            )
        shares = [index / (dimension.points - 1) for index in range(dimension.points)]
        if dimension.log:
            found = [low * (high / low) ** share for share in shares]
        else:
            found = [low + (high - low) * share for share in shares]
        if isinstance(distribution, IntDistribution):
            return sorted({round(value) for value in found})
        return [min(max(_without_rounding(value), low), high) for value in found]

    def _distribution(self, path: str, dimension: Dimension) -> BaseDistribution:
        current = _field_value(self.base, path)
        if dimension.values is not None:
            checked = [self._check(path, value) for value in dimension.values]
            choices = {_choice(value): value for value in checked}
            self._values[path] = choices
            return CategoricalDistribution(list(choices))
        low, high = dimension.low, dimension.high
        if isinstance(current, bool) or not isinstance(current, int | float) or None in (low, high):
            raise ConfigurationError(
                f"search.space.{path}: is no number, so low and high say nothing; give values"
            )
        assert low is not None and high is not None
        if isinstance(current, float):
            self._check(path, low)
            self._check(path, high)
            return FloatDistribution(low, high, log=dimension.log)
        if not (low.is_integer() and high.is_integer()):
            raise ConfigurationError(
                f"search.space.{path}: takes whole numbers, got low {low:g} and high {high:g}"
            )
        self._check(path, int(low))
        self._check(path, int(high))
        return IntDistribution(int(low), int(high), log=dimension.log)

    def _check(self, path: str, value: Any) -> Any:  # noqa: ANN401 - any field of any model
        """Give the value as its field holds it."""
        try:
            return _field_value(self.base.replace({path: value}), path)
        except ConfigurationError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ConfigurationError(f"search.space.{path}: {reason}") from error


def has_field(configuration: TrialConfiguration, path: str) -> bool:
    """Whether a dotted path names a field of the configuration."""
    section, _, field = path.partition(".")
    return field in _section(configuration, section)


def _field_value(configuration: TrialConfiguration, path: str) -> Any:  # noqa: ANN401
    section, _, field = path.partition(".")
    return _section(configuration, section)[field]


def _section(configuration: TrialConfiguration, section: str) -> dict[str, Any]:
    if section == "model":
        return configuration.model_settings
    if section in {"training", "loss"}:
        return dict(getattr(configuration, section))
    return {}


def _without_rounding(value: float) -> float:
    """Say 0.3 for 0.1 + 0.2, so that a grid meets the points that a user writes."""
    return float(f"{value:.12g}")


def _choice(value: Any) -> Any:  # noqa: ANN401
    """Optuna's categories are scalars; a list is named by its JSON."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
