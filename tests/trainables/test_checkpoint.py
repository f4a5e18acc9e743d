"""Checkpoints and exports of real models on a real prepared dataset, and what others lack."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from planted import SMALL_MODELS
from torch import nn

from datasets import Dataset, TableError, open_dataset, prepare_table
from trainables import (
    MODELS,
    CheckpointError,
    DeviceImpressions,
    Inputs,
    TrialConfiguration,
    Workers,
    load,
)
from trainables.checkpoint import load_checkpoint, save_checkpoint
from trainables.configuration import build_model
from trainables.metrics import probabilities
from trainables.training import predict_logits

SCHEMA = """\
labels: {click: clicked, conversion: bought}
categorical: [color, size]
numerical: {weight: {normalize: log}, price: {fill: 0}}
"""
NUM_TEST = 50


class Prepared(NamedTuple):
    """A dataset, and its test rows as a user has them."""

    dataset: Dataset
    test: pd.DataFrame


def raw_rows(num_rows: int, seed: int) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    clicked = generator.integers(0, 2, num_rows)
    return pd.DataFrame(
        {
            "color": generator.choice(["red", "blue", "dark, green"], num_rows),
            "size": generator.integers(36, 48, num_rows),
            "weight": generator.normal(size=num_rows).round(3),
            "price": generator.integers(1, 10_000, num_rows) / 100,
            "clicked": clicked,
            "bought": clicked * generator.integers(0, 2, num_rows),
        }
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    directory = tmp_path_factory.mktemp("table")
    (directory / "schema.yaml").write_text(SCHEMA)
    paths = {}
    for seed, (split, num_rows) in enumerate({"input": 300, "valid": 40, "test": NUM_TEST}.items()):
        paths[split] = directory / f"{split}.csv"
        raw_rows(num_rows, seed).to_csv(paths[split], index=False)
    out = directory / "prepared"
    prepare_table(schema=directory / "schema.yaml", out=out, **paths)
    return Prepared(open_dataset(str(out)), pd.read_csv(paths["test"]))


def make_model(name: str, dataset: Dataset, **settings: Any) -> tuple[Any, Inputs, nn.Module]:
    configuration = TrialConfiguration.create(
        name, SMALL_MODELS[name] | {"embedding_dim": 4} | settings
    )
    inputs = Inputs(tuple(dataset.manifest.vocabulary_sizes.values()), num_numericals=2)
    torch.manual_seed(0)
    model = build_model(configuration, inputs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # predictions far from one another
    return configuration, inputs, model


@pytest.fixture
def export(prepared: Prepared, tmp_path: Path) -> Callable[..., tuple[Path, nn.Module]]:
    """Write an export; give its directory and the model in it."""

    def write(name: str = "mmoe", **settings: Any) -> tuple[Path, nn.Module]:
        directory = tmp_path / name
        directory.mkdir()
        configuration, inputs, model = make_model(name, prepared.dataset, **settings)
        save_checkpoint(directory, configuration, inputs, model)
        prepared.dataset.encoder().save(str(directory))
        return directory, model.eval()

    return write


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_checkpoint_gives_back_model_and_configuration(
    prepared: Prepared, tmp_path: Path, name: str, batch_norm: bool
) -> None:
    configuration, inputs, model = make_model(name, prepared.dataset, batch_norm=batch_norm)
    ids_BF = torch.randint(3, (20, 2))
    numericals_BN = torch.randn(20, 2)
    model(ids_BF, numericals_BN)  # moves what batch norm remembers
    save_checkpoint(tmp_path, configuration, inputs, model)
    loaded_configuration, loaded_inputs, loaded = load_checkpoint(tmp_path)
    assert loaded_configuration.model_dump(mode="json") == configuration.model_dump(mode="json")
    assert loaded_inputs == inputs
    assert not loaded.training
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    with torch.no_grad():
        expected_BT = model.eval()(ids_BF, numericals_BN)
        assert torch.equal(loaded(ids_BF, numericals_BN), expected_BT)


def test_a_later_checkpoint_replaces_the_earlier(prepared: Prepared, tmp_path: Path) -> None:
    configuration, inputs, model = make_model("dnn", prepared.dataset)
    save_checkpoint(tmp_path, configuration, inputs, model)
    with torch.no_grad():
        next(model.parameters()).fill_(7.0)
    save_checkpoint(tmp_path, configuration, inputs, model)
    *_, loaded = load_checkpoint(tmp_path)
    assert bool((next(loaded.parameters()) == 7.0).all())


@pytest.mark.parametrize("name", MODELS)
def test_predictions_from_raw_rows_are_those_of_the_prepared_split(
    prepared: Prepared, export: Callable[..., tuple[Path, nn.Module]], name: str
) -> None:
    directory, model = export(name)
    device = torch.device("cpu")
    split = DeviceImpressions.from_impressions(prepared.dataset.load("test"), device)
    expected = probabilities(predict_logits(model, split, Workers(device=device)))
    predictor = load(directory)
    tables = (
        prepared.test,
        prepared.test.astype(str),
        pa.Table.from_pandas(prepared.test[["price", "weight", "size", "color"]]),
    )
    for table in tables:
        predictions = predictor.predict(table)
        assert list(predictions) == list(expected)
        for key, values_N in predictions.items():
            assert values_N.dtype == np.float64
            np.testing.assert_allclose(values_N, expected[key].numpy(), rtol=0, atol=1e-12)
            assert values_N.std() > 0.001


def test_a_long_table_is_predicted_as_its_parts(
    prepared: Prepared, export: Callable[..., tuple[Path, nn.Module]]
) -> None:
    predictor = load(export("dnn")[0])
    table = pd.concat([prepared.test] * 400, ignore_index=True)
    pctr_N = predictor.predict(table)["pctr"]
    assert pctr_N.shape == (400 * NUM_TEST,)
    expected_N = np.tile(predictor.predict(prepared.test)["pctr"], 400)
    np.testing.assert_allclose(pctr_N, expected_N, rtol=1e-5)


def test_unseen_and_missing_categories_are_the_unknown_one(
    prepared: Prepared, export: Callable[..., tuple[Path, nn.Module]]
) -> None:
    predictor = load(export()[0])
    rows = prepared.test.iloc[[0, 0, 0]].assign(color=["pink", None, ""])
    pctr_N = predictor.predict(rows)["pctr"]
    assert pctr_N[0] == pctr_N[1] == pctr_N[2]
    known = predictor.predict(prepared.test.iloc[[0]])["pctr"]
    assert abs(known[0] - pctr_N[0]) > 1e-6


def test_missing_numericals_follow_the_schema(
    prepared: Prepared, export: Callable[..., tuple[Path, nn.Module]]
) -> None:
    predictor = load(export()[0])
    row = prepared.test.iloc[[0]]
    filled = predictor.predict(row.assign(price=float("nan")))["pctr"]
    assert filled == predictor.predict(row.assign(price=0.0))["pctr"]
    with pytest.raises(
        TableError, match=r"^table: row 1: column 'weight' is missing or not finite"
    ):
        predictor.predict(row.assign(weight=float("nan")))


def test_a_missing_column_is_told(
    prepared: Prepared, export: Callable[..., tuple[Path, nn.Module]]
) -> None:
    predictor = load(export()[0])
    with pytest.raises(TableError, match=r"^table: no column 'size', 'price'; give every feature"):
        predictor.predict(prepared.test.drop(columns=["size", "price"]))


@pytest.mark.parametrize(
    ("name", "keys"), [("mmoe", ["pctr", "pctcvr", "pcvr"]), ("dnn", ["pctr"])]
)
def test_an_empty_table_has_no_predictions(
    prepared: Prepared,
    export: Callable[..., tuple[Path, nn.Module]],
    name: str,
    keys: list[str],
) -> None:
    predictions = load(export(name)[0]).predict(prepared.test.iloc[:0])
    assert list(predictions) == keys
    assert all(values_N.shape == (0,) for values_N in predictions.values())


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message.replace(str(directory), "DIR")


def test_a_directory_that_is_no_export_is_told(tmp_path: Path) -> None:
    expected = "DIR/configuration.json: not found; name a directory that pwiser export wrote"
    assert refused(tmp_path) == expected
    assert refused(tmp_path / "missing") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read (Expecting value: line 1 column 1 (char 0)); export it again"),
        (b"\xff\xfe", "cannot be read ('utf-8' codec can't decode byte"),
        (b"[1]", "not the configuration of a checkpoint; export it again"),
        (b"{}", "not the configuration of a checkpoint (it has no 'configuration'); export it"),
        (
            b'{"configuration": {"model": "mmoe"}}',
            "not the configuration of a checkpoint (configuration.model_settings: missing; add it",
        ),
        (b'{"configuration": 3}', "not the configuration of a checkpoint ("),
    ],
)
def test_a_foreign_configuration_is_told(
    export: Callable[..., tuple[Path, nn.Module]], content: bytes, message: str
) -> None:
    directory, _ = export()
    (directory / "configuration.json").write_bytes(content)
    assert refused(directory).startswith(f"DIR/configuration.json: {message}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("configuration", "model"),
            "esmm",
            "its model cannot be built: models: 'esmm' is no model; choose from",
        ),
        (
            ("configuration", "model"),
            "gone:Net",
            "its model cannot be built: models: 'gone:Net' cannot be imported",
        ),
        (
            ("configuration", "model_settings"),
            {"width": 3},
            "its model cannot be built: model: mmoe: MMoE.__init__() got an unexpected",
        ),
        (
            ("configuration", "loss", "alpha"),
            -1,
            "not the configuration of a checkpoint (configuration.loss.alpha: must be at least 0",
        ),
        (
            ("inputs", "vocabulary_sizes"),
            [0],
            "not the configuration of a checkpoint (vocabulary_sizes[0] must be at least 1, got 0",
        ),
        (("inputs", "vocabulary_sizes"), 3, "not the configuration of a checkpoint ("),
        (("inputs",), {}, "not the configuration of a checkpoint (it has no 'vocabulary_sizes')"),
    ],
)
def test_a_configuration_of_another_model_is_told(
    export: Callable[..., tuple[Path, nn.Module]],
    path: tuple[str, ...],
    value: object,
    message: str,
) -> None:
    directory, _ = export()
    file = directory / "configuration.json"
    content = json.loads(file.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    assert refused(directory).startswith(f"DIR/configuration.json: {message}")


def test_damaged_missing_and_foreign_weights_are_told(
    export: Callable[..., tuple[Path, nn.Module]],
) -> None:
    directory, _ = export("mmoe")
    other, _ = export("dnn")
    weights = directory / "model.safetensors"
    start = "DIR/model.safetensors: cannot be read as the weights of 'mmoe' ("
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert refused(directory).startswith(start)
    weights.write_bytes(b"")
    assert refused(directory).startswith(start)
    shutil.copy(other / "model.safetensors", weights)
    assert refused(directory).startswith(
        f"{start}Error(s) in loading state_dict for MMoE: Missing key(s) in state_dict"
    )
    weights.unlink()
    message = refused(directory)
    assert message.startswith(start)
    assert message.endswith("; export it again")


def test_a_checkpoint_is_no_export_before_its_encoder_is_there(
    export: Callable[..., tuple[Path, nn.Module]],
) -> None:
    directory, _ = export()
    (directory / "encoder.json").unlink()
    load_checkpoint(directory)
    message = refused(directory)
    assert message.startswith("DIR: cannot read encoder.json (")
    assert message.endswith("(a checkpoint becomes one by pwiser export)")
