"""Preparation by Ray tasks, on a Ray embedded in this process."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from datasets import TableError, open_dataset, prepare_table
from tuner import preparation_tasks
from tuner.cli import app
from tuner.cluster import connected, free_resources
from tuner.preparation_tasks import map_sources_on_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_FILES = 5
SCHEMA = """
labels: {click: click, conversion: conversion}
categorical: {item: {}, user: {min_count: 2}}
numerical: {price: {}}
split: {valid: 0.1, test: 0.2, seed: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of different lengths, the second of several batches."""
    folder = tmp_path_factory.mktemp("tables")
    random = np.random.default_rng(0)
    for number in range(NUM_FILES):
        rows = 150_000 if number == 1 else 500 * (number + 1)
        click = random.random(rows) < 0.3
        frame = pd.DataFrame(
            {
                "item": random.integers(50, size=rows),
                "user": random.zipf(1.5, size=rows) % 10_000,
                "price": random.lognormal(size=rows).astype(np.float32),
                "click": click.astype(int),
                "conversion": (click & (random.random(rows) < 0.2)).astype(int),
            }
        )
        frame.to_parquet(folder / f"rows-{number}.parquet", index=False)
    return folder


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def ray_session() -> Iterator[None]:
    with connected():
        yield


def test_a_cluster_prepares_the_same_dataset(folder: Path, schema: Path, tmp_path: Path) -> None:
    prepare_table(input=folder, schema=schema, out=tmp_path / "here")
    command = ["data", "prepare", "table", "--ray", "--input", str(folder)]
    command += ["--schema", str(schema), "--out", str(tmp_path / "there")]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    here, there = (open_dataset(str(tmp_path / name)) for name in ("here", "there"))
    assert there.digest == here.digest
    assert there.manifest == here.manifest  # the files' bytes too


def test_a_fault_in_a_task_is_told_as_on_one_machine(
    folder: Path, schema: Path, tmp_path: Path, ray_session: None
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).symlink_to(path)
    bad = pd.read_parquet(folder / "rows-3.parquet")
    bad.loc[7, "click"] = 3
    (damaged / "rows-3.parquet").unlink()
    bad.to_parquet(damaged / "rows-3.parquet", index=False)
    messages = []
    for options in ({}, {"map_sources": map_sources_on_cluster}):
        with pytest.raises(TableError) as refusal:
            prepare_table(input=damaged, schema=schema, out=tmp_path / "out", **options)
        messages.append(str(refusal.value))
    assert "rows-3.parquet: row 8" in messages[0]
    assert messages[1] == messages[0]
    assert not (tmp_path / "out").exists()


def test_the_cores_are_given_back(
    folder: Path, schema: Path, tmp_path: Path, ray_session: None
) -> None:
    before = free_resources()["CPU"]
    prepare_table(
        input=folder, schema=schema, out=tmp_path / "out", map_sources=map_sources_on_cluster
    )
    deadline = time.monotonic() + 20  # Ray tells of what is free with some delay
    while free_resources().get("CPU") != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert free_resources()["CPU"] == before


def test_where_not_all_cores_can_be_held_some_are(
    monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    monkeypatch.setattr(preparation_tasks, "PART_PLACEMENT_WAIT_S", 4.0)
    free = int(free_resources()["CPU"])
    with preparation_tasks._held_cores(2 * free) as group:
        assert group.bundle_count == free
