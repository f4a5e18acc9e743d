from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field, ValidationError

from trainables import (
    MODELS,
    ConfigurationError,
    Inputs,
    LossSettings,
    TrainingSettings,
    TrialConfiguration,
)
from trainables.configuration import (
    Settings,
    build_model,
    describe_faults,
    find_model,
    settings_of,
)

INPUTS = Inputs(vocabulary_sizes=(5, 9), num_numericals=3)


class Rigid(torch.nn.Module):
    """Takes settings that only its construction can refuse, in more ways than one."""

    num_heads: ClassVar[int] = 1

    def __init__(self, inputs: Inputs, *, fault: str = "none") -> None:
        super().__init__()
        if fault == "type":
            raise TypeError("fault must be none,\ngot type")
        if fault == "shape":
            torch.zeros(2) @ torch.zeros(3)


def test_settings_are_the_keywords_of_the_constructor_with_their_defaults() -> None:
    assert settings_of("mmoe")().model_dump() == {
        "embedding_dim": 128,
        "num_experts": 8,
        "expert_units": (512, 256, 128),
        "gate_units": (128, 64),
        "tower_units": (128, 64),
        "ctcvr": "direct",
        "numericals": "project",
        "dropout": 0.0,
        "batch_norm": False,
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_configuration_is_complete_and_builds_its_model(model: str) -> None:
    configuration = TrialConfiguration.create(model)
    assert list(configuration.model_settings) == list(settings_of(model).model_fields)
    assert (configuration.training, configuration.loss) == (TrainingSettings(), LossSettings())
    built = build_model(configuration, INPUTS)
    assert type(built) is MODELS[model]
    assert {parameter.device.type for parameter in built.parameters()} == {"cpu"}


@pytest.mark.parametrize("model", MODELS)
def test_a_configuration_survives_json(model: str) -> None:
    configuration = TrialConfiguration.create(model).replace({"loss.gate": "literal"})
    again = TrialConfiguration.model_validate_json(configuration.model_dump_json())
    assert again.model_dump(mode="json") == configuration.model_dump(mode="json")
    torch.manual_seed(0)
    first = build_model(configuration, INPUTS).state_dict()
    torch.manual_seed(0)
    second = build_model(again, INPUTS).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_checking_a_configuration_takes_no_memory_and_no_randomness() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TrialConfiguration.create("mmoe", {"expert_units": [10**6, 10**6]})  # 4 TB for each expert
    assert torch.rand(1) == expected


def test_values_are_replaced_by_dotted_path_in_a_copy() -> None:
    base = TrialConfiguration.create("mmoe", {"num_experts": 3}, loss=LossSettings(m1=0.2))
    copy = base.replace(
        {"loss.alpha": 0.7, "training.batch_size": 64, "model.expert_units": [16, 8]}
    )
    assert (copy.loss.alpha, copy.loss.m1) == (0.7, 0.2)
    assert copy.training.batch_size == 64
    assert copy.model_settings["expert_units"] == (16, 8)
    assert copy.model_settings["num_experts"] == 3
    assert base == TrialConfiguration.create("mmoe", {"num_experts": 3}, loss=LossSettings(m1=0.2))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("loss.alfa", 1, "loss.alfa: no such field; choose from alpha, m1, m2, gate"),
        ("alpha", 1, "alpha: no such field; choose from model, training, loss"),
        (
            "model.hidden_units",
            [1],
            "model.hidden_units: no such field; choose from embedding_dim, num_experts, "
            "expert_units, gate_units, tower_units, ctcvr, numericals, dropout, batch_norm",
        ),
        ("search.trials", 1, "search.trials: no such field; choose from model, training, loss"),
        ("loss.alpha", -1, "loss.alpha: must be at least 0, got -1"),
        ("loss.alpha", float("nan"), "loss.alpha: must be a finite number, got nan"),
        ("training.epochs", 0, "training.epochs: must be at least 1, got 0"),
        ("model.dropout", "much", "model.dropout: must be a number, got 'much'"),
        ("model.num_experts", 0, "model: mmoe: num_experts must be at least 1, got 0"),
        ("model.dropout", 1.0, "model: mmoe: dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_value_that_cannot_be_is_told_by_its_path(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrialConfiguration.create("mmoe").replace({path: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropuot": 0.1}, "model.dropuot: unknown key; the known ones are embedding_dim, "),
        ({"num_experts": 2.5}, "model.num_experts: must be a whole number, got 2.5"),
        ({"num_experts": None}, "model.num_experts: must be a whole number, got None"),
        ({"expert_units": 8}, "model.expert_units: must be a list, got 8"),
        ({"expert_units": ["a"]}, "model.expert_units.0: must be a whole number, got 'a'"),
        ({"expert_units": []}, "model: mmoe: expert_units must list at least one layer width"),
        ({"ctcvr": "x"}, "model.ctcvr: must be one of 'direct' or 'product', got 'x'"),
        ({"batch_norm": 2}, "model.batch_norm: must be true or false, got 2"),
    ],
)
def test_a_setting_that_cannot_be_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrialConfiguration.create("mmoe", settings)
    assert str(caught.value).startswith(message)


def test_faults_of_a_model_are_told_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "rigid", Rigid)
    for fault, message in (
        ("type", "model: rigid: fault must be none, got type"),
        ("shape", "model: rigid: "),
    ):
        with pytest.raises(ConfigurationError) as caught:
            TrialConfiguration.create("rigid", {"fault": fault})
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "MMoE", "mmoe ", "trainables.models", ":", "a:", ":a"])
def test_an_unknown_model_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_model(name)
    assert str(caught.value) == (
        f"models: {name!r} is no model; choose from shared_bottom, mmoe, ple, dnn, masknet, "
        "or name your own as module:Class"
    )


def test_our_own_models_may_be_named_as_a_users() -> None:
    assert find_model("trainables.models.mmoe:MMoE") is MODELS["mmoe"]


class Inner(Settings):
    size: int = 1


class Outer(Settings):
    inner: Inner = Inner()
    many: dict[str, Inner] = Field({})
    name: str


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "name: missing; add it"),
        ({"name": "a", "nme": 1}, "nme: unknown key; the known ones are inner, many, name"),
        ({"name": "a", "inner": {"sze": 1}}, "inner.sze: unknown key; the known ones are size"),
        (
            {"name": "a", "many": {"x": {"sze": 1}}},
            "many.x.sze: unknown key; the known ones are size",
        ),
        (
            {"name": "a", "many": {"x": {"size": "b"}}},
            "many.x.size: must be a whole number, got 'b'",
        ),
        ({"name": 1, "inner": {"size": 1.5}}, "inner.size: must be a whole number, got 1.5; "),
        ({"name": "a", "many": 1}, "many: must be a mapping of keys to values, got 1"),
        ({"name": b"\xff"}, r"name: input should be a valid string, unable to parse raw data as a"),
    ],
)
def test_faults_are_described_on_one_line(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(content)
    told = describe_faults(caught.value, Outer)
    assert told.startswith(message)
    assert "\n" not in told
    inside = describe_faults(caught.value, Outer, "section")
    assert inside.startswith(f"section.{message}")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrialConfiguration.create("mmoe").training.epochs = 3
