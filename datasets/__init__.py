"""Prepared datasets of pwiser-tuner: schema, encoding, manifest, and the sources they come from.

Imports neither torch nor ray: what is here runs wherever a table is to be read.
"""

from datasets.dataset import Dataset, Impressions, SplitStatistics, open_dataset, statistics
from datasets.encoder import Encoder
from datasets.errors import DatasetError, OutputExistsError, PwiserError, SchemaError, TableError
from datasets.labels import CONVERSION_POLICIES, ConversionPolicy
from datasets.manifest import Manifest, SplitSummary
from datasets.numerical import NumericalStatistics
from datasets.schema import Schema
from datasets.schema_file import read_schema
from datasets.sources import PRESETS, prepare_aliexpress, prepare_table, synthesize
from datasets.vocabulary import Vocabulary

__all__ = [
    "CONVERSION_POLICIES",
    "PRESETS",
    "ConversionPolicy",
    "Dataset",
    "DatasetError",
    "Encoder",
    "Impressions",
    "Manifest",
    "NumericalStatistics",
    "OutputExistsError",
    "PwiserError",
    "Schema",
    "SchemaError",
    "SplitStatistics",
    "SplitSummary",
    "TableError",
    "Vocabulary",
    "open_dataset",
    "prepare_aliexpress",
    "prepare_table",
    "read_schema",
    "statistics",
    "synthesize",
]
