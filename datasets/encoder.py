"""Raw features to model inputs: one code path for preparation and for serving.

Shape suffixes: N rows, F id columns (one per categorical field, one per place of a bag), D
numerical fields.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from datasets.bag import categories_per_place
from datasets.category import column_of
from datasets.errors import DatasetError, TableError
from datasets.filesystem import locate
from datasets.numerical import Normalizer, NotANumberError, NumericalStatistics, numbers_of
from datasets.schema import CategoricalField, NumericalField, NumericalType, id_columns
from datasets.vocabulary import (
    VOCABULARIES_FILE,
    Vocabulary,
    encode_categories,
    id_type,
    read_vocabularies,
    write_vocabularies,
)

__all__ = ["ENCODER_FILE", "Encoder"]

ENCODER_FILE = "encoder.json"


class _EncoderFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    categorical: dict[str, CategoricalField]
    numerical: dict[str, NumericalField]
    statistics: dict[str, NumericalStatistics]
    numerical_type: NumericalType = "float32"


class Encoder:
    """Encodes tables of raw feature columns; labels and other columns are not needed.

    Args:
        categorical: The categorical fields in model order.
        numerical: The numerical fields in model order.
        vocabularies: The known values per categorical field.
        statistics: Train's statistics per numerical field.
        numerical_type: Of the normalised values.
    """

    def __init__(
        self,
        *,
        categorical: Mapping[str, CategoricalField],
        numerical: Mapping[str, NumericalField],
        vocabularies: Mapping[str, Vocabulary],
        statistics: Mapping[str, NumericalStatistics],
        numerical_type: NumericalType = "float32",
    ) -> None:
        self.categorical = dict(categorical)
        self.numerical = dict(numerical)
        self.vocabularies = {field: vocabularies[field] for field in categorical}
        self.statistics = {field: statistics[field] for field in numerical}
        self.numerical_type: type[np.floating[Any]] = np.dtype(numerical_type).type
        self._normalizer = Normalizer(self.numerical, self.statistics)

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """The number of ids per categorical field, id 0 included, in model order."""
        return {field: known.size for field, known in self.vocabularies.items()}

    @property
    def id_columns(self) -> dict[str, str]:
        """The columns of ids in model order, with the field of each."""
        return id_columns(self.categorical)

    @property
    def id_type(self) -> type[np.signedinteger[Any]]:
        """The smallest integer type that holds the ids of every field."""
        return id_type(max(self.vocabulary_sizes.values(), default=1))

    def encode(
        self, table: "pa.Table | pd.DataFrame"
    ) -> tuple[npt.NDArray[np.signedinteger[Any]], npt.NDArray[np.floating[Any]]]:
        """Encode raw rows.

        Args:
            table: The feature columns in any order; further columns are ignored. Cells may be
                text, as read from CSV, or typed: both give the same ids. Those of a bag may also
                be lists.

        Returns:
            ``ids_NF`` in the smallest sufficient integer type (an unseen or missing category is
            0, a place that a bag does not fill -1), and ``numericals_ND`` normalised, in the
            numerical type.

        Raises:
            TableError: A column is missing; a cell of a numerical column is no number, or is
                missing or not finite in a field without a fill.
        """
        is_frame = isinstance(table, pd.DataFrame)
        self._check_columns(list(table.columns if is_frame else table.schema.names))
        return self._encode_ids(table), self.normalize(self._read_numericals(table))

    def normalize(self, raw_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.floating[Any]]:
        """Return the model inputs of raw, finite numerical values in model order.

        What is beyond the numerical type becomes its largest value of that sign.
        """
        return self._typed(self._normalizer.normalize(raw_ND))

    def normalize_column(
        self, name: str, raw_N: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.floating[Any]]:
        """Return the model inputs of one field's raw, finite values, as ``normalize`` does."""
        return self._typed(self._normalizer.normalize_column(name, raw_N))

    def _typed(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.floating[Any]]:
        if self.numerical_type is np.float32:
            return values
        limit = np.finfo(self.numerical_type).max
        return values.clip(-limit, limit).astype(self.numerical_type)

    def _check_columns(self, columns: list[str]) -> None:
        missing = [name for name in (*self.categorical, *self.numerical) if name not in columns]
        if missing:
            shown = ", ".join(repr(name) for name in missing[:12])
            raise TableError(
                f"table: no column {shown}; give every feature column that the model was trained on"
            )
        twice = [name for name in (*self.categorical, *self.numerical) if columns.count(name) > 1]
        if twice:
            raise TableError(f"table: column {twice[0]!r} is there twice; give it once")

    def _encode_ids(self, table: "pa.Table | pd.DataFrame") -> npt.NDArray[np.signedinteger[Any]]:
        ids_NF = np.empty((len(table), len(self.id_columns)), self.id_type)
        start = 0
        for name, field in self.categorical.items():
            try:
                places = categories_per_place(column_of(table, name), field)
            except TypeError as error:
                raise TableError(
                    f"table: column {name!r} holds {error}; a category is text, a number or a "
                    "boolean" + (", or a list of these" if field.max_values is not None else "")
                ) from error
            ids = self.vocabularies[name].ids_of(places[0].texts)
            for index, place in enumerate(places, start):
                ids_NF[:, index] = encode_categories(place, ids)
            start += len(places)
        return ids_NF

    def _read_numericals(self, table: "pa.Table | pd.DataFrame") -> npt.NDArray[np.float32]:
        raw_ND = np.empty((len(table), len(self.numerical)), np.float32)
        for index, (field, settings) in enumerate(self.numerical.items()):
            try:
                values_N = numbers_of(column_of(table, field))
            except (NotANumberError, TypeError) as error:
                where = f"row {error.index + 1}: " if isinstance(error, NotANumberError) else ""
                value = repr(error.value) if isinstance(error, NotANumberError) else str(error)
                raise TableError(
                    f"table: {where}column {field!r}: {value} is no number; give a number"
                ) from error
            bad_N = ~np.isfinite(values_N)
            if bad_N.any() and settings.fill is None:
                raise TableError(
                    f"table: row {int(bad_N.argmax()) + 1}: column {field!r} is missing or not "
                    "finite; give a number, or train with a fill for this field in the schema"
                )
            if settings.fill is not None:
                values_N = np.where(bad_N, np.float32(settings.fill), values_N)
            raw_ND[:, index] = values_N
        return raw_ND

    def save(self, directory: str | Path) -> None:
        """Write ``encoder.json`` and ``vocabularies.parquet`` into a directory, made if missing."""
        location = locate(directory)
        content = _EncoderFile(
            format_version=1,
            categorical=self.categorical,
            numerical=self.numerical,
            statistics=self.statistics,
            numerical_type=self.numerical_type.__name__,
        )
        text = json.dumps(content.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (location / ENCODER_FILE).write_bytes(text.encode() + b"\n")
        write_vocabularies(self.vocabularies, location)

    @classmethod
    def load(cls, directory: str | Path) -> "Encoder":
        """Read what ``save`` wrote.

        Raises:
            DatasetError: A file is missing or damaged.
        """
        location = locate(directory)
        try:
            content = _EncoderFile.model_validate_json((location / ENCODER_FILE).read_bytes())
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise DatasetError(
                f"{directory}: cannot read {ENCODER_FILE} ({reason}); "
                f"give a directory with {ENCODER_FILE} and {VOCABULARIES_FILE}"
            ) from error
        return cls(
            categorical=content.categorical,
            numerical=content.numerical,
            vocabularies=read_vocabularies(location, list(content.categorical)),
            statistics=content.statistics,
            numerical_type=content.numerical_type,
        )
