"""Batches from memory and from a stream: their rows, their order, and beginning anywhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datasets import Dataset, open_dataset, synthesize
from trainables.batches import BatchShape, DeviceImpressions, Rows, StreamedRows
from trainables.configuration import TrialConfiguration
from trainables.metrics import evaluate
from trainables.models import Inputs
from trainables.training import predict_logits, train
from trainables.workers import Workers

CPU = torch.device("cpu")
ALONE = Workers(device=CPU)
WINDOW_ROWS = 50_000
SHAPE = BatchShape(steps_per_epoch=170, rows=900, seed=4)

MakeRows = Callable[[str], Rows]


class Rank(Workers):
    """One of several workers, for batches alone: no process group is asked."""

    size = 2
    rank = 0


class SecondRank(Rank):
    rank = 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out: Path = tmp_path_factory.mktemp("prepared") / "batches"
    synthesize(out=out, impressions=200_000, seed=1)
    return open_dataset(str(out))


@pytest.fixture(scope="module")
def held(dataset: Dataset) -> MakeRows:
    return lambda split: DeviceImpressions.from_impressions(dataset.load(split), CPU)


@pytest.fixture(scope="module")
def streamed(dataset: Dataset) -> MakeRows:
    return lambda split: StreamedRows(dataset.stream(split), CPU, WINDOW_ROWS, labelled=True)


@pytest.fixture(params=["held", "streamed"])
def rows(request: pytest.FixtureRequest) -> Rows:
    found: Rows = request.getfixturevalue(request.param)("train")
    return found


def keys(batch: DeviceImpressions) -> list[float]:
    """Name each row by a weighing of all its numericals, which hardly two rows share."""
    weights_D = torch.linspace(0.1, 9.7, batch.numericals_ND.shape[1], dtype=torch.float64) ** 3
    found: list[float] = (batch.numericals_ND.double() @ weights_D).tolist()
    return found


def test_a_copy_becomes_another_batch_in_its_own_memory(rows: Rows) -> None:
    batches = rows.batches(SHAPE, ALONE)
    first = batches.next()
    copy = first.clone()
    before = keys(first.load())
    second = batches.next()
    assert keys(copy.load()) == before
    copy.copy_(second)
    assert keys(copy.load()) == keys(second.load()) != before
    assert keys(first.load()) == before


def test_an_epoch_gives_no_row_twice(rows: Rows) -> None:
    batches = rows.batches(SHAPE, ALONE)
    epoch = [key for _ in range(SHAPE.steps_per_epoch) for key in keys(batches.next().load())]
    assert len(epoch) == SHAPE.steps_per_epoch * SHAPE.rows
    assert len(set(epoch)) > 0.999 * len(epoch)


def test_epochs_differ_and_the_seed_repeats_them(rows: Rows) -> None:
    batches, again = rows.batches(SHAPE, ALONE), rows.batches(SHAPE, ALONE)
    first = keys(batches.next().load())
    assert keys(again.next().load()) == first
    batches.seek(SHAPE.steps_per_epoch)
    assert keys(batches.next().load()) != first


@pytest.mark.parametrize("step", [0, 1, 55, 56, 57, 169, 170, 171, 400])
def test_beginning_at_a_step_gives_the_batches_from_there(rows: Rows, step: int) -> None:
    through, there = rows.batches(SHAPE, ALONE), rows.batches(SHAPE, ALONE)
    for _ in range(step):
        through.next()
    there.seek(step)
    for _ in range(3):
        ours, theirs = through.next().load(), there.next().load()
        assert torch.equal(ours.ids_NF, theirs.ids_NF)
        assert torch.equal(ours.numericals_ND, theirs.numericals_ND)
        assert torch.equal(ours.clicks_N, theirs.clicks_N)
        assert torch.equal(ours.conversions_N, theirs.conversions_N)


def test_workers_train_on_rows_of_their_own(rows: Rows) -> None:
    shape = BatchShape(steps_per_epoch=80, rows=900, seed=4)
    epochs = []
    for workers in (Rank(device=CPU), SecondRank(device=CPU)):
        batches = rows.batches(shape, workers)
        steps = range(shape.steps_per_epoch)
        epochs.append({key for _ in steps for key in keys(batches.next().load())})
    first, second = epochs
    assert len(first & second) < 0.001 * len(first)


def test_chunks_are_the_rows_as_they_are_stored(held: MakeRows, streamed: MakeRows) -> None:
    share = slice(1_000, 140_001)
    whole = held("train")
    assert isinstance(whole, DeviceImpressions)
    parts = list(streamed("train").chunks(share, 16_384))
    assert max(map(len, parts)) <= 16_384
    assert torch.equal(torch.cat([part.ids_NF for part in parts]), whole.ids_NF[share])
    assert torch.equal(torch.cat([part.clicks_N for part in parts]), whole.clicks_N[share])


def test_a_worker_without_a_share_has_no_chunks(held: MakeRows, streamed: MakeRows) -> None:
    for rows in (held("train"), streamed("train")):
        assert list(rows.chunks(slice(7, 7), 16_384)) == []


def test_a_streamed_evaluation_equals_one_in_memory(held: MakeRows, streamed: MakeRows) -> None:
    configuration = TrialConfiguration.create(
        "shared_bottom", {"embedding_dim": 4, "bottom_units": [8]}
    ).replace({"training.epochs": 1, "training.precision": "float32"})
    train_rows, valid_rows = held("valid"), streamed("valid")
    assert isinstance(train_rows, DeviceImpressions)
    inputs = Inputs(
        vocabulary_sizes=tuple(int(ids.max()) + 1 for ids in held("train").ids_NF.T),  # type: ignore[attr-defined]
        num_numericals=train_rows.numericals_ND.shape[1],
    )
    ((evaluation, model),) = train(configuration, inputs, train_rows, train_rows, ALONE)
    logits_NT = predict_logits(model, valid_rows, ALONE)
    metrics = evaluate(logits_NT, valid_rows.clicks_N, valid_rows.conversions_N)
    assert metrics == pytest.approx(evaluation.metrics, abs=1e-6)
