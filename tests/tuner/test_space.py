import itertools
import json
import sys
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from trainables import ConfigurationError, TrainingSettings, TrialConfiguration
from trainables.configuration import describe_faults
from tuner.space import PAPER_POINT, Dimension, SearchSpace, has_field

FLOAT_NETWORK = """\
from torch import nn

class Net(nn.Module):
    num_heads = 1

    def __init__(self, inputs, *, rate: float = 1):
        super().__init__()
"""


def space(model: str = "mmoe", **dimensions: Dimension) -> SearchSpace:
    """A space whose paths are written with two underscores for the dot."""
    paths = {name.replace("__", "."): dimension for name, dimension in dimensions.items()}
    return SearchSpace(paths, TrialConfiguration.create(model))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"low": 0.5, "high": 0.1}, "low 0.5 must be below high 0.1"),
        ({"low": 0.5, "high": 0.5}, "low 0.5 must be below high 0.5"),
        ({"low": 0, "high": 1, "log": True}, "low 0 must be above 0 where log is true"),
        ({"low": -1, "high": 1, "log": True}, "low -1 must be above 0 where log is true"),
        ({"values": [1], "low": 0}, "give values alone, or low and high, got low, values"),
        ({"values": [1], "log": True}, "give values alone, or low and high, got log, values"),
        ({"low": 0}, "give low and high, or values, got low"),
        ({}, "give low and high, or values, got nothing"),
        ({"values": []}, "values: must not be empty, got []"),
        ({"low": 0, "high": float("inf")}, "high: must be a finite number, got inf"),
        ({"low": float("nan"), "high": 1}, "low: must be a finite number, got nan"),
        ({"low": "a", "high": 1}, "low: must be a number, got 'a'"),
        ({"low": 0, "high": 1, "points": 1}, "points: must be at least 2, got 1"),
        (0.3, "must be {low: ..., high: ...} or {values: [...]}, got 0.3"),
        ([0.3], "must be {low: ..., high: ...} or {values: [...]}, got [0.3]"),
        (None, "must be {low: ..., high: ...} or {values: [...]}, got None"),
    ],
)
def test_a_dimension_has_one_of_two_forms(content: object, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Dimension.model_validate(content)
    assert describe_faults(caught.value, Dimension) == message


@pytest.mark.parametrize(
    ("path", "dimension", "message"),
    [
        ("loss.m1", Dimension(low=0, high=4), "must be at most 1, got 4.0"),
        ("loss.m1", Dimension(low=-1, high=1), "must be at least 0, got -1.0"),
        ("loss.m1", Dimension(values=(0.1, 2)), "must be at most 1, got 2"),
        ("loss.alpha", Dimension(values=(0.1, "x")), "must be a number, got 'x'"),
        ("loss.gate", Dimension(values=("hinge", "lit")), "must be one of 'hinge' or 'literal',"),
        ("loss.gate", Dimension(low=0, high=1), "is no number, so low and high say nothing;"),
        ("model.batch_norm", Dimension(low=0, high=1), "is no number, so low and high say"),
        ("model.expert_units", Dimension(low=8, high=16), "is no number, so low and high say"),
        ("model.num_experts", Dimension(low=1.5, high=4), "takes whole numbers, got low 1.5 and"),
        ("model.num_experts", Dimension(low=0, high=4), "model: mmoe: num_experts must be at"),
        ("training.epochs", Dimension(low=0, high=4), "must be at least 1, got 0"),
    ],
)
def test_a_dimension_must_fit_its_field(path: str, dimension: Dimension, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SearchSpace({path: dimension}, TrialConfiguration.create("mmoe"))
    assert str(caught.value).startswith(f"search.space.{path}: {message}")


def test_fields_are_of_the_loss_the_training_and_the_model() -> None:
    mmoe = TrialConfiguration.create("mmoe")
    for path in ("loss.alpha", "training.epochs", "model.num_experts"):
        assert has_field(mmoe, path)
    for path in ("alpha", "loss", "loss.alfa", "model.hidden_units", "search.trials", "", "model."):
        assert not has_field(mmoe, path)


def test_the_field_decides_the_kind_of_a_dimension() -> None:
    found = space(
        loss__alpha=Dimension(low=0.01, high=1, log=True),
        model__num_experts=Dimension(low=2, high=8),
        loss__gate=Dimension(values=("hinge", "literal")),
    ).distributions
    assert found == {
        "loss.alpha": FloatDistribution(0.01, 1.0, log=True),
        "model.num_experts": IntDistribution(2, 8),
        "loss.gate": CategoricalDistribution(("hinge", "literal")),
    }


def test_a_whole_default_of_a_fraction_is_a_fraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "float_network.py").write_text(FLOAT_NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "float_network", raising=False)
    found = space("float_network:Net", model__rate=Dimension(low=0.5, high=1.5))
    assert found.distributions == {"model.rate": FloatDistribution(0.5, 1.5)}


def test_dimensions_that_a_model_lacks_are_left_out() -> None:
    dimensions = {
        "loss__alpha": Dimension(low=0, high=1),
        "model__num_experts": Dimension(low=2, high=8),
    }
    assert list(space("mmoe", **dimensions).dimensions) == ["loss.alpha", "model.num_experts"]
    assert list(space("dnn", **dimensions).dimensions) == ["loss.alpha"]


def test_values_are_held_as_their_field_holds_them() -> None:
    found = space(training__learning_rate=Dimension(values=("1e-3", 1, 1.0)))
    assert found.distributions["training.learning_rate"] == CategoricalDistribution((0.001, 1.0))
    assert found.contains(found.fixed_point(PAPER_POINT))


def test_a_list_is_a_category_named_by_its_json() -> None:
    found = space(model__expert_units=Dimension(values=([8], [16, 8], [512, 256, 128])))
    choices = ("[8]", "[16, 8]", "[512, 256, 128]")
    assert found.distributions["model.expert_units"] == CategoricalDistribution(choices)
    configuration = found.configuration({"model.expert_units": "[16, 8]"})
    assert configuration.model_settings["expert_units"] == (16, 8)
    assert found.fixed_point({}) == {"model.expert_units": "[512, 256, 128]"}


def test_a_configuration_takes_parameters_and_keeps_the_rest() -> None:
    base = TrialConfiguration.create("mmoe", {"num_experts": 3})
    found = SearchSpace({"loss.alpha": Dimension(low=0, high=1)}, base)
    configuration = found.configuration({"loss.alpha": 0.7})
    assert configuration.loss.alpha == 0.7
    assert configuration.replace({"loss.alpha": base.loss.alpha}) == base


def test_a_fixed_point_takes_the_rest_from_the_base_and_may_lie_outside() -> None:
    found = space(
        loss__alpha=Dimension(low=0.5, high=1),
        loss__m1=Dimension(low=0, high=0.5),
        model__expert_units=Dimension(values=([8],)),
    )
    point = found.fixed_point({"loss.alpha": 0.0, "loss.m2": 0.9})
    assert point == {"loss.alpha": 0.0, "loss.m1": 0.3, "model.expert_units": [512, 256, 128]}
    assert json.loads(json.dumps(point)) == point  # as a tracking store gives it back
    assert not found.contains(point)
    assert found.configuration(point).model_settings["expert_units"] == (512, 256, 128)
    inside = {"loss.alpha": 0.5, "loss.m1": 0.5, "model.expert_units": "[8]"}
    assert found.contains(inside)
    for path, outside in (("loss.alpha", 0.4), ("loss.m1", 0.6), ("model.expert_units", "[9]")):
        assert not found.contains(inside | {path: outside})


def test_a_grid_has_every_combination_once_the_last_dimension_changing_first() -> None:
    found = space(
        loss__alpha=Dimension(low=0.001, high=1, log=True, points=4),
        loss__m1=Dimension(low=0.1, high=0.5, points=5),
        loss__gate=Dimension(values=("hinge", "literal")),
    )
    axes = ([0.001, 0.01, 0.1, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5], ["hinge", "literal"])
    expected = [
        dict(zip(("loss.alpha", "loss.m1", "loss.gate"), point, strict=True))
        for point in itertools.product(*axes)
    ]
    assert found.grid() == expected


def test_a_grid_of_whole_numbers_has_each_once() -> None:
    found = space(model__num_experts=Dimension(low=1, high=4, points=9))
    assert found.grid() == [{"model.num_experts": number} for number in (1, 2, 3, 4)]


def test_a_grid_stays_within_its_ends() -> None:
    low, high = 0.1234567890123456, 0.9876543210987654
    grid = space(loss__m1=Dimension(low=low, high=high, points=3)).grid()
    assert all(low <= point["loss.m1"] <= high for point in grid)


def test_a_grid_needs_the_number_of_points() -> None:
    with pytest.raises(ConfigurationError) as caught:
        space(loss__alpha=Dimension(low=0, high=1)).grid()
    assert str(caught.value) == (
        "search.space.loss.alpha: the grid sampler needs values, or points beside low and high"
    )


def test_a_grid_of_more_points_than_can_be_run_is_refused_before_it_is_made() -> None:
    fine = Dimension(low=0, high=1, points=400)
    with pytest.raises(ConfigurationError) as caught:
        space(loss__alpha=fine, loss__m1=fine).grid()
    assert str(caught.value) == (
        "search.space: its grid has 160,000 points, more than 100,000; "
        "give fewer points or values, or another sampler"
    )
    with pytest.raises(ValueError, match="less than or equal to 100000"):
        Dimension(low=0, high=1, points=100_001)


def test_the_papers_point_keeps_its_loss_and_gives_way_elsewhere() -> None:
    base = TrialConfiguration.create("dnn", training=TrainingSettings(learning_rate=0.02))
    dimensions = {
        "loss.alpha": Dimension(low=0.01, high=0.1),
        "training.learning_rate": Dimension(low=0.01, high=0.1),
        "training.weight_decay": Dimension(low=0.0, high=0.1),
    }
    point = SearchSpace(dimensions, base).fixed_point(PAPER_POINT)
    assert point == {
        "loss.alpha": 0.3,
        "training.learning_rate": 0.02,
        "training.weight_decay": 1e-6,
    }
