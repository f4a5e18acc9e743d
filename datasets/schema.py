"""The user's description of a table: which columns are labels, features, and which are left out.

The YAML file::

    labels: {click: visit, conversion: conversion}
    categorical: [channel, zip_code]     # or {channel: {min_count: 5}, tags: {max_values: 8}}
    numerical: [recency]                 # or {recency: {normalize: log, fill: 0}}
    numerical_type: float32              # or float16: half the memory of the loaded values
    drop: [spend]                        # columns that are no features
    group: search_id                     # optional: a session's rows stay in one split
    min_count: 1                         # rarer categories become id 0
    split: {valid: 0.1, test: 0.1, seed: 0}

Every column of the table must be named: one that is forgotten may be a leak of the label.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from datasets.errors import TableError

__all__ = [
    "CLICK",
    "CONVERSION",
    "MAX_VALUES",
    "CategoricalField",
    "Labels",
    "Normalization",
    "NumericalField",
    "NumericalType",
    "Schema",
    "SplitFractions",
    "id_columns",
]

CLICK = "click"
CONVERSION = "conversion"
"""The names of the label columns in a prepared dataset, whatever the input calls them."""

Normalization = Literal["standard", "log", "minmax", "none"]
NumericalType = Literal["float32", "float16"]

MAX_VALUES = 1024
"""How long a bag may be: every place is a column of the prepared dataset."""

_LABEL_NAMES = (CLICK, CONVERSION)
_SEPARATOR = "|"


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
    max_values: int | None = Field(
        default=None,
        ge=1,
        le=MAX_VALUES,
        description=(
            "cells hold several values, of which the first so many count: 1 keeps the first alone, "
            "more make the field a bag, whose values' vectors are averaged; without it a cell is "
            "one value"
        ),
    )
    separator: str = Field(
        default=_SEPARATOR,
        min_length=1,
        description="between the values of a text cell, with max_values; list cells need none",
    )

    @model_validator(mode="after")
    def _check_separator(self) -> "CategoricalField":
        if self.max_values is None and self.separator != _SEPARATOR:
            raise ValueError(
                f"separator {self.separator!r} without max_values; add max_values: how many of a "
                "cell's values count"
            )
        return self

    @property
    def num_ids(self) -> int:
        """How many ids a row has: 1, or the length of the bag."""
        return self.max_values or 1


def id_columns(categorical: Mapping[str, CategoricalField]) -> dict[str, str]:
    """Return the columns of ids of a prepared dataset, in model order, with the field of each.

    A field of one id per row has one column of its name, a bag one per place: ``name[0]`` and on.
    """
    return {
        (name if field.num_ids == 1 else f"{name}[{place}]"): name
        for name, field in categorical.items()
        for place in range(field.num_ids)
    }


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
        default_factory=dict,
        description="columns compared as text: a list, or name: {min_count, max_values, separator}",
    )
    numerical: dict[str, NumericalField] = Field(
        default_factory=dict, description="columns of numbers: a list, or name: {normalize, fill}"
    )
    numerical_type: NumericalType = Field(
        default="float32",
        description=(
            "of the loaded, normalised numerical values; float16 halves their memory, keeps 11 "
            "bits of each and nothing beyond 65504; arithmetic is the same"
        ),
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
        bags = {name: field for name, field in self.categorical.items() if field.num_ids > 1}
        places = id_columns(bags)
        taken = [name for name in (*self.categorical, *self.numerical) if name in places]
        if taken:
            raise ValueError(
                f"feature {taken[0]!r} has the name of a place in the bag "
                f"{places[taken[0]]!r}; rename the column"
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
