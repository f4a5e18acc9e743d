"""The probe trains on rows of a dataset's shape, whatever its fields and numericals are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
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


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def configuration(**training: Any) -> TrialConfiguration:
    settings = TrainingSettings(batch_size=16, precision="float32", **training)
    return TrialConfiguration.create(
        "dnn", {"embedding_dim": 4, "hidden_units": [8]}, training=settings
    )


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
    probe = measure(configuration(), shape, num_workers=1, threads=1, gpus=0.0)
    assert probe.train_rate > 0
    assert probe.evaluation_rate > 0
    # the table of 3 + 4 ids, a projection of 1 numerical, 3 fields of 4 into 8 units, and a head
    assert probe.parameters == 7 * 4 + 2 * 4 + (12 * 8 + 8) + (8 + 1)


def test_a_worker_without_a_gpu_is_measured_on_the_cpu_of_a_machine_that_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shape = TableShape(vocabulary_sizes=(3,), num_numericals=1)
    probe = measure(configuration(), shape, num_workers=1, threads=1, gpus=0.0)
    assert probe.device == "CPU, 1 threads"
    assert (probe.device_bytes, probe.device_total_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"compile": True}, "training.compile: true needs one worker per lane; set it to false"),
        ({"cuda_graph": "on"}, "training.cuda_graph: on needs one worker per lane; set it to auto"),
    ],
)
def test_what_a_lane_of_several_workers_refuses_is_not_measured(
    training: dict[str, Any], told: str
) -> None:
    shape = TableShape(vocabulary_sizes=(3,), num_numericals=1)
    with pytest.raises(ValueError, match=f"^{told}$"):
        measure(configuration(**training), shape, num_workers=2, threads=1, gpus=0.0)
