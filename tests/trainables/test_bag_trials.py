"""A dataset with bags and float16 numericals from raw rows to predictions."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from planted import CPU, SMALL_MODELS

from datasets import Dataset, open_dataset, prepare_table
from trainables import (
    MODELS,
    DeviceImpressions,
    Inputs,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    load,
    train,
)
from trainables.checkpoint import load_checkpoint, save_checkpoint
from trainables.configuration import build_model
from trainables.execution import Folding
from trainables.metrics import probabilities
from trainables.optimizers import EmbeddingOptimizer
from trainables.training import predict_logits

SCHEMA = """\
labels: {click: clicked, conversion: bought}
categorical: {color: {}, topics: {max_values: 3}}
numerical: [weight, price]
numerical_type: float16
"""
ALONE = Workers(device=CPU)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def raw_rows(num_rows: int, seed: int) -> pd.DataFrame:
    """Rows whose clicks depend on how many of their first three topics are even."""
    generator = np.random.default_rng(seed)
    topics = [
        generator.choice(20, generator.integers(0, 6)).astype(str).tolist() for _ in range(num_rows)
    ]
    even = np.array([np.mean([int(t) % 2 == 0 for t in cell[:3]] or [0.5]) for cell in topics])
    clicked = (generator.random(num_rows) < even).astype(int)
    return pd.DataFrame(
        {
            "color": generator.choice(["red", "blue"], num_rows),
            "topics": topics,
            "weight": generator.normal(size=num_rows),
            "price": generator.normal(size=num_rows) * 100,
            "clicked": clicked,
            "bought": clicked * generator.integers(0, 2, num_rows),
        }
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("bags")
    (directory / "schema.yaml").write_text(SCHEMA)
    paths = {}
    for seed, (split, num_rows) in enumerate({"input": 2000, "valid": 500, "test": 60}.items()):
        paths[split] = directory / f"{split}.parquet"
        raw_rows(num_rows, seed).to_parquet(paths[split])
    prepare_table(schema=directory / "schema.yaml", out=directory / "prepared", **paths)
    return open_dataset(str(directory / "prepared"))


def inputs_of(dataset: Dataset) -> Inputs:
    manifest = dataset.manifest
    sizes = tuple(manifest.vocabulary_sizes.values())
    return Inputs(sizes, num_numericals=2, bag_lengths=manifest.bag_lengths)


def split_of(dataset: Dataset, split: str) -> DeviceImpressions:
    return DeviceImpressions.from_impressions(dataset.load(split), ALONE.device)


def configure(model: str, *, folding: Folding = "auto") -> TrialConfiguration:
    training = TrainingSettings(
        epochs=3, batch_size=100, learning_rate=0.02, precision="float32", folding=folding
    )
    return TrialConfiguration.create(
        model, SMALL_MODELS[model] | {"embedding_dim": 4}, training=training
    )


@pytest.mark.parametrize(
    ("folding", "optimizer"), [("on", "dense"), ("off", "dense"), ("off", "sparse")]
)
def test_a_trial_learns_from_its_bags(
    dataset: Dataset, folding: Folding, optimizer: EmbeddingOptimizer
) -> None:
    splits = split_of(dataset, "train"), split_of(dataset, "valid")
    configuration = configure("dnn", folding=folding)
    configuration = configuration.replace({"training.embedding_optimizer": optimizer})
    *_, (last, _) = train(configuration, inputs_of(dataset), *splits, ALONE)
    assert (last.metrics["ctr_auc"] or 0) > 0.75


def test_arithmetic_on_float16_numericals_is_that_on_float32(dataset: Dataset) -> None:
    half = [split_of(dataset, split) for split in ("train", "valid")]
    assert half[0].numericals_ND.dtype == torch.float16
    full = [
        DeviceImpressions(split.ids_NF, split.numericals_ND.float(), split.labels_NT)
        for split in half
    ]
    told = [
        [
            (evaluation.train_loss, evaluation.metrics)
            for evaluation, _ in train(configure("mmoe"), inputs_of(dataset), *splits, ALONE)
        ]
        for splits in (half, full)
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", MODELS)
def test_predictions_from_raw_rows_are_those_of_the_prepared_split(
    dataset: Dataset, tmp_path: Path, name: str
) -> None:
    splits = split_of(dataset, "train"), split_of(dataset, "valid")
    configuration = configure(name)
    *_, (_, model) = train(configuration, inputs_of(dataset), *splits, ALONE)
    save_checkpoint(tmp_path, configuration, inputs_of(dataset), model)
    dataset.encoder().save(tmp_path)
    expected = probabilities(predict_logits(model, split_of(dataset, "test"), ALONE))
    lists = raw_rows(60, seed=2)
    for table in (lists, lists.assign(topics=lists.topics.map("|".join)), pa.table(lists)):
        predictions = load(tmp_path).predict(table)
        assert list(predictions) == list(expected)
        for key, values_N in predictions.items():
            np.testing.assert_allclose(values_N, expected[key].numpy(), rtol=0, atol=1e-6)
            assert values_N.std() > 0.001


def test_a_checkpoint_of_before_there_were_bags_is_read(tmp_path: Path) -> None:
    configuration, inputs = configure("dnn"), Inputs((3, 4), num_numericals=2)
    model = build_model(configuration, inputs).eval()
    save_checkpoint(tmp_path, configuration, inputs, model)
    file = tmp_path / "configuration.json"
    description = json.loads(file.read_text())
    del description["inputs"]["bag_lengths"]
    file.write_text(json.dumps(description))
    *_, loaded = load_checkpoint(tmp_path)
    ids_BF, values_BN = torch.ones(3, 2, dtype=torch.int8), torch.randn(3, 2)
    assert torch.equal(loaded(ids_BF, values_BN), model(ids_BF, values_BN))
