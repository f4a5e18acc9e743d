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
    from datasets.source_map import MapSources, SplitSource, map_sources_here
    from datasets.sources import (
        COUNTRIES,
        PRESETS,
        prepare_aliccp,
        prepare_aliexpress,
        prepare_aliexpress_raw,
        prepare_table,
        synthesize,
    )
    from datasets.table_reader import RawBatch, RowSource
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
    "MapSources",
    "NumericalStatistics",
    "OutputExistsError",
    "ProgressReport",
    "PwiserError",
    "RawBatch",
    "ReportProgress",
    "RowSource",
    "Schema",
    "SchemaError",
    "SplitSource",
    "SplitStatistics",
    "SplitSummary",
    "TableError",
    "Vocabulary",
    "map_sources_here",
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
    "MapSources": "source_map",
    "NumericalStatistics": "numerical",
    "ProgressReport": "progress",
    "RawBatch": "table_reader",
    "ReportProgress": "progress",
    "RowSource": "table_reader",
    "Schema": "schema",
    "SplitSource": "source_map",
    "SplitStatistics": "dataset",
    "SplitSummary": "manifest",
    "Vocabulary": "vocabulary",
    "map_sources_here": "source_map",
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
