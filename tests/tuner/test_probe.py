"""The probe trains on rows of a dataset's shape, whatever its fields and numericals are."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from datasets import open_dataset, prepare_table
from trainables import TrainingSettings, TrialConfiguration
from tuner.plan import table_shape
from tuner.probe import TableShape, measure

SCHEMA = """\
labels: {click: clicked, conversion: bought}
categorical: {color: {}, topics: {max_values: 3}}
numerical: [price]
numerical_type: float16
"""


def test_rows_with_bags_and_float16_are_measured(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    rows = pd.DataFrame(
        {
            "color": ["red", "blue"] * 50,
            "topics": ["a|b", "c"] * 50,
            "price": np.arange(100.0),
            "clicked": [0, 1] * 50,
            "bought": [0, 0, 0, 1] * 25,
        }
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    prepare_table(
        input=tmp_path / "rows.csv", schema=tmp_path / "schema.yaml", out=tmp_path / "out"
    )
    shape = table_shape(open_dataset(str(tmp_path / "out")))
    assert shape == TableShape(
        vocabulary_sizes=(3, 4),
        num_numericals=1,
        bag_lengths=(1, 3),
        numerical_type="float16",
    )
    configuration = TrialConfiguration.create(
        "dnn",
        {"embedding_dim": 4, "hidden_units": [8]},
        training=TrainingSettings(batch_size=16, precision="float32"),
    )
    threads = torch.get_num_threads()
    try:
        probe = measure(configuration, shape, num_workers=1, threads=1)
    finally:
        torch.set_num_threads(threads)
    assert probe.train_rate > 0
    assert probe.evaluation_rate > 0
    # the table of 3 + 4 ids, a projection of 1 numerical, 3 fields of 4 into 8 units, and a head
    assert probe.parameters == 7 * 4 + 2 * 4 + (12 * 8 + 8) + (8 + 1)
