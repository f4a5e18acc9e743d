"""A training that goes on from a file ends as one that was never interrupted, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import CPU, INPUTS, SMALL_MODELS, make_split

from trainables import (
    CheckpointError,
    Evaluation,
    LossSettings,
    TrainingSettings,
    TrialConfiguration,
    Workers,
)
from trainables.training import Training
from trainables.training_state import STATE_FILE, Position, TrainingState

Told = list[dict[str, Any]]
ALONE = Workers(device=CPU)
TRAIN, VALID = make_split(1_000, seed=0), make_split(301, seed=1)


def configure(model: str = "mmoe", **training: Any) -> TrialConfiguration:
    settings = {"epochs": 2, "batch_size": 100, "learning_rate": 0.01, "precision": "float32"}
    return TrialConfiguration.create(
        model,
        SMALL_MODELS[model] | {"embedding_dim": 4},
        training=TrainingSettings(**settings | training),
        loss=LossSettings(),
    )


def start(configuration: TrialConfiguration) -> Training:
    return Training(configuration, INPUTS, TRAIN, VALID, ALONE)


def told(evaluation: Evaluation) -> dict[str, Any]:
    """All but the clock."""
    values = vars(evaluation).copy()
    assert values.pop("training_s") > 0
    assert values.pop("evaluation_s") > 0
    return values


def finish(training: Training) -> tuple[Told, dict[str, torch.Tensor]]:
    found = [told(evaluation) for evaluation in training.evaluations()]
    return found, {name: value.clone() for name, value in training.model.state_dict().items()}


def interrupt(configuration: TrialConfiguration, directory: Path, after: int) -> Told:
    """Train for so many steps, and save the state there; return the evaluations so far."""
    training = start(configuration)
    steps = iter(range(1, after + 1))
    found = [told(one) for one in training.evaluations(lambda: next(steps) == after)]
    training.state().save(directory)
    return found


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("mmoe", {}),
        ("ple", {"model.batch_norm": True}),
        ("shared_bottom", {"model.dropout": 0.3}),
        ("masknet", {}),
        ("dnn", {"training.embedding_optimizer": "sparse", "training.folding": "off"}),
    ],
)
@pytest.mark.parametrize("after", [1, 10, 13])
def test_it_ends_as_an_uninterrupted_one(
    tmp_path: Path, model: str, changes: dict[str, Any], after: int
) -> None:
    configuration = configure(model, epochs=3, evaluate_every=0.4).replace(changes)
    whole, expected = finish(start(configuration))
    assert len(whole) == 6
    begun = interrupt(configuration, tmp_path, after)
    torch.rand(3)  # whatever another trial does to the random state
    training = start(configuration)
    training.restore(TrainingState.load(tmp_path))
    rest, weights = finish(training)
    assert begun + rest == whole
    assert len(begun) == (after - 1) // 5  # stopped at step 10, it has not been evaluated there
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())


def test_it_goes_on_after_an_evaluation(tmp_path: Path) -> None:
    configuration = configure(epochs=3)
    whole, expected = finish(start(configuration))
    training = start(configuration)
    next(training.evaluations())
    training.state().save(tmp_path)
    training = start(configuration)
    training.restore(TrainingState.load(tmp_path))
    rest, weights = finish(training)
    assert rest == whole[1:]
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())


def test_the_seconds_go_on(tmp_path: Path) -> None:
    configuration = configure(epochs=2)
    interrupt(configuration, tmp_path, 12)
    state = TrainingState.load(tmp_path)
    training = start(configuration)
    training.restore(state)
    (last,) = training.evaluations()
    assert last.training_s > state.position.training_s > 0
    assert last.evaluation_s > state.position.evaluation_s > 0


def test_notes_are_kept(tmp_path: Path) -> None:
    state = start(configure()).state()
    position = Position(step=3, num_evaluations=1, training_s=1.5, evaluation_s=0.25)
    noted = TrainingState(state.tensors, position, {"reports": '["é"]'})
    noted.save(tmp_path)
    found = TrainingState.load(tmp_path)
    assert found.notes == {"reports": '["é"]'}
    assert found.position == position


def test_the_state_of_another_trial_is_refused(tmp_path: Path) -> None:
    interrupt(configure("mmoe"), tmp_path, 1)
    for other in (configure("dnn"), configure("mmoe").replace({"model.embedding_dim": 3})):
        with pytest.raises(CheckpointError, match="a training state of another trial"):
            start(other).restore(TrainingState.load(tmp_path))


@pytest.mark.parametrize(("kept", "wanted"), [("dense", "sparse"), ("sparse", "dense")])
def test_the_state_of_other_optimizers_is_refused_and_changes_nothing(
    tmp_path: Path, kept: str, wanted: str
) -> None:
    interrupt(configure(embedding_optimizer=kept), tmp_path, 3)
    training = start(configure(embedding_optimizer=wanted))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"^a training state of another trial \(\d\.\d+\."):
        training.restore(TrainingState.load(tmp_path))
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert finish(training)[0] == finish(start(configure(embedding_optimizer=wanted)))[0]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "flipped"])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, damage: str) -> None:
    interrupt(configure(), tmp_path, 1)
    path = tmp_path / STATE_FILE
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changed = {"cut": content[:-5], "empty": b"", "flipped": b"\xff" + content[1:]}
        path.write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=r"state\.safetensors: cannot be read as a training"):
        TrainingState.load(tmp_path)
