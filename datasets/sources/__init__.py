"""Where rows come from, a file per source. Each ends in ``datasets.preparation.prepare``.

A further raw format is a class with the three members of ``RowSource`` and a ``prepare_<name>``.
"""

from datasets.sources.aliexpress import prepare_aliexpress
from datasets.sources.synthetic import PRESETS, synthesize
from datasets.sources.table import prepare_table

__all__ = ["PRESETS", "prepare_aliexpress", "prepare_table", "synthesize"]
