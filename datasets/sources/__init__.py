"""Where rows come from, a file per source. Each ends in ``datasets.preparation.prepare``.

A further raw format is a class with the three members of ``RowSource`` and a ``prepare_<name>``.
"""

from datasets.sources.aliccp import prepare_aliccp
from datasets.sources.aliexpress import prepare_aliexpress, prepare_aliexpress_raw
from datasets.sources.aliexpress_raw import COUNTRIES
from datasets.sources.synthetic import PRESETS, synthesize
from datasets.sources.table import prepare_table

__all__ = [
    "COUNTRIES",
    "PRESETS",
    "prepare_aliccp",
    "prepare_aliexpress",
    "prepare_aliexpress_raw",
    "prepare_table",
    "synthesize",
]
