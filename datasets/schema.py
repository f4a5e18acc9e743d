"""The user's description of a table: which columns are labels, features, and which are left out.

The YAML file::

    labels: {click: visit, conversion: conversion}
    categorical: [channel, zip_code]     # or {channel: {min_count: 5}, zip_code: {}}
    numerical: [recency]                 # or {recency: {normalize: log, fill: 0}}
    drop: [spend]                        # columns that are no features
    group: search_id                     # optional: a session's rows stay in one split
    min_count: 1                         # rarer categories become id 0
    split: {valid: 0.1, test: 0.1, seed: 0}

Every column of the table must be named: one that is forgotten may be a leak of the label.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from datasets.errors import TableError

__all__ = [
    "CLICK",
    "CONVERSION",
    "CategoricalField",
    "Labels",
    "Normalization",
    "NumericalField",
    "Schema",
    "SplitFractions",
]

CLICK = "click"
CONVERSION = "conversion"
"""The names of the label columns in a prepared dataset, whatever the input calls them."""

Normalization = Literal["standard", "log", "minmax", "none"]

_LABEL_NAMES = (CLICK, CONVERSION)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Labels(_Strict):
    """The columns that hold the two labels, 0 or 1 each; a conversion implies a click."""

    click: str = Field(description="column of the click label")
    conversion: str = Field(description="column of the conversion label")


class CategoricalField(_Strict):
    """How one categorical column is encoded."""

    min_count: int | None = Field(
        default=None, ge=1, description="values rarer than this in train become id 0 (unknown)"
    )


class NumericalField(_Strict):
    """How one numerical column is normalised, and what an empty, NaN or infinite cell becomes."""

    normalize: Normalization = Field(
        default="standard",
        description=(
            "standard: mean 0, deviation 1 on train; log: the same of sign(x) log(1 + |x|); "
            "minmax: train's range becomes 0 to 1; none: as it is"
        ),
    )
    fill: float | None = Field(
        default=None,
        description="what an empty, NaN or infinite cell becomes; without it they are refused",
    )

    @field_validator("fill")
    @classmethod
    def _check_fill(cls, fill: float | None) -> float | None:
        if fill is not None and not (
            math.isfinite(fill) and abs(fill) <= float(np.finfo(np.float32).max)
        ):
            raise ValueError("must be a finite 32-bit number")
        return fill


class SplitFractions(_Strict):
    """The shares of train that become the splits for which no file is given; 0 makes none."""

    valid: float = Field(default=0.1, ge=0, lt=1, description="share of groups (or rows) for valid")
    test: float = Field(default=0.1, ge=0, lt=1, description="share of groups (or rows) for test")
    seed: int = Field(default=0, ge=0, description="another seed carves other groups")

    @model_validator(mode="after")
    def _leave_something_for_train(self) -> "SplitFractions":
        if self.valid + self.test >= 1:
            raise ValueError("valid and test together must stay below 1")
        return self


class Schema(_Strict):
    """A table's columns by role; the keys of the YAML file (see the module)."""

    labels: Labels = Field(description="the label columns: {click: NAME, conversion: NAME}")
    categorical: dict[str, CategoricalField] = Field(
        default_factory=dict, description="columns compared as text: a list, or name: {min_count}"
    )
    numerical: dict[str, NumericalField] = Field(
        default_factory=dict, description="columns of numbers: a list, or name: {normalize, fill}"
    )
    drop: tuple[str, ...] = Field(default=(), description="columns that are left out")
    group: str | None = Field(
        default=None, description="column whose equal values stay in one split; no feature"
    )
    min_count: int = Field(
        default=1, ge=1, description="the min_count of categorical columns that give none"
    )
    split: SplitFractions = Field(
        default=SplitFractions(), description="what to carve from train where no file is given"
    )

    @field_validator("categorical", "numerical", mode="before")
    @classmethod
    def _list_to_mapping(cls, fields: object) -> object:
        if isinstance(fields, list | tuple):
            _check_names(fields)
            return {name: {} for name in fields}
        if isinstance(fields, dict):
            _check_names(list(fields))
            return {name: {} if field is None else field for name, field in fields.items()}
        return fields

    @field_validator("drop", mode="before")
    @classmethod
    def _list_to_tuple(cls, names: object) -> object:
        if isinstance(names, list | tuple):
            _check_names(names)
            return tuple(names)
        return names

    @model_validator(mode="after")
    def _check_roles(self) -> "Schema":
        if not self.categorical and not self.numerical:
            raise ValueError("no feature; list columns under categorical or numerical")
        roles = Counter(self.columns)
        twice = [name for name, count in roles.items() if count > 1]
        if twice:
            raise ValueError(
                f"column {twice[0]!r} has more than one role; leave it under one of labels, "
                "categorical, numerical, drop and group"
            )
        taken = [name for name in (*self.categorical, *self.numerical) if name in _LABEL_NAMES]
        if taken:
            raise ValueError(
                f"feature {taken[0]!r} has the name of a prepared dataset's label column; "
                "rename the column"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the schema names, in the order of its roles."""
        group = () if self.group is None else (self.group,)
        labels = (self.labels.click, self.labels.conversion)
        return (*labels, *self.categorical, *self.numerical, *self.drop, *group)

    def min_count_of(self, field: str) -> int:
        """Return how often a value of a categorical field must occur in train to get an id."""
        own = self.categorical[field].min_count
        return self.min_count if own is None else own

    def check_columns(self, columns: Sequence[str], *, file: str) -> None:
        """Refuse a table whose columns are not the schema's.

        Raises:
            TableError: A column is there twice, is missing, or has no role.
        """
        twice = [name for name, count in Counter(columns).items() if count > 1]
        if twice:
            raise TableError(f"{file}: column {twice[0]!r} is there twice; rename one of the two")
        # a dropped column may be absent: a file without the leak needs no second schema
        missing = [name for name in self.columns if name not in columns and name not in self.drop]
        if missing:
            raise TableError(
                f"{file}: no column {_names(missing)}, which the schema names; "
                f"the file has {_names(columns)}"
            )
        known = set(self.columns)
        unlisted = [name for name in columns if name not in known]
        if unlisted:
            raise TableError(
                f"{file}: the schema does not name column {_names(unlisted)}; "
                "list under categorical, numerical or drop"
            )


def _names(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _check_names(names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"column {name!r} is read as {type(name).__name__}, not as text; put it in quotes"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"column {twice[0]!r} is listed twice; list it once")
