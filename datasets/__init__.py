"""Prepared datasets of pwiser-tuner: schema, encoding, manifest, and the sources they come from.

Imports neither torch nor ray: what is here runs wherever a table is to be read. Names are loaded
when they are first used, so that `pwiser --help` does not wait for pandas and pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from datasets.errors import DatasetError, OutputExistsError, PwiserError, SchemaError, TableError

if TYPE_CHECKING:
    from datasets.dataset import (
        Dataset,
        Impressions,
        SplitStatistics,
        open_dataset,
        statistics,
        total,
    )
    from datasets.encoder import Encoder
    from datasets.labels import CONVERSION_POLICIES, ConversionPolicy
    from datasets.manifest import Manifest, SplitSummary
    from datasets.numerical import NumericalStatistics
    from datasets.progress import ProgressReport, ReportProgress
    from datasets.schema import Schema
    from datasets.schema_file import read_schema
    from datasets.sources import (
        COUNTRIES,
        PRESETS,
        prepare_aliccp,
        prepare_aliexpress,
        prepare_aliexpress_raw,
        prepare_table,
        synthesize,
    )
    from datasets.validation import validate
    from datasets.vocabulary import Vocabulary

__all__ = [
    "CONVERSION_POLICIES",
    "COUNTRIES",
    "PRESETS",
    "ConversionPolicy",
    "Dataset",
    "DatasetError",
    "Encoder",
    "Impressions",
    "Manifest",
    "NumericalStatistics",
    "OutputExistsError",
    "ProgressReport",
    "PwiserError",
    "ReportProgress",
    "Schema",
    "SchemaError",
    "SplitStatistics",
    "SplitSummary",
    "TableError",
    "Vocabulary",
    "open_dataset",
    "prepare_aliccp",
    "prepare_aliexpress",
    "prepare_aliexpress_raw",
    "prepare_table",
    "read_schema",
    "statistics",
    "synthesize",
    "total",
    "validate",
]

_MODULE_OF = {
    "CONVERSION_POLICIES": "labels",
    "COUNTRIES": "sources",
    "PRESETS": "sources",
    "ConversionPolicy": "labels",
    "Dataset": "dataset",
    "Encoder": "encoder",
    "Impressions": "dataset",
    "Manifest": "manifest",
    "NumericalStatistics": "numerical",
    "ProgressReport": "progress",
    "ReportProgress": "progress",
    "Schema": "schema",
    "SplitStatistics": "dataset",
    "SplitSummary": "manifest",
    "Vocabulary": "vocabulary",
    "open_dataset": "dataset",
    "prepare_aliccp": "sources",
    "prepare_aliexpress": "sources",
    "prepare_aliexpress_raw": "sources",
    "prepare_table": "sources",
    "read_schema": "schema_file",
    "statistics": "dataset",
    "synthesize": "sources",
    "total": "dataset",
    "validate": "validation",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
