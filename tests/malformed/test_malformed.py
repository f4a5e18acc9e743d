"""Malformed job files, schema files, tables and prepared datasets: a clear line each, or no harm.

`MALFORMED_INPUTS` says how many of each kind are tried, others in every run; without it a few,
always the same ones.
"""

import os
import re
import shutil
import string
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import DatasetError, Impressions, open_dataset, synthesize
from tuner.cli import run

NUM_INPUTS = int(os.environ.get("MALFORMED_INPUTS", "150"))
tried = settings(
    max_examples=NUM_INPUTS,
    derandomize="MALFORMED_INPUTS" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JOB = yaml.safe_load("""
name: us
datasets: [missing/us]
models: [mmoe, dnn]
search:
  trials: 20
  sampler: tpe
  pruner: asha
  objective: mean_auc
  space:
    loss.alpha: {low: 0.001, high: 1.0, log: true}
    model.expert_units: {values: [[32, 16], [64]]}
training: {epochs: 2, batch_size: 512, learning_rate: 1.0e-3}
model: {embedding_dim: 8, num_experts: 4}
loss: {gate: hinge, m1: 0.3}
resources: {lanes: 2, cpus_per_worker: 1}
budget: {hours: 1.0}
storage: out/pwiser
""")
SCHEMA = yaml.safe_load("""
labels: {click: clicked, conversion: bought}
categorical: [color, size]
numerical: {weight: {normalize: log}, price: {}}
drop: [note]
group: user
split: {valid: 0.2, test: 0.2, seed: 0}
""")
ROWS = pd.DataFrame(
    {
        "user": [f"u{number % 17}" for number in range(60)],
        "color": ["red", "blue", "a, b"] * 20,
        "size": range(60),
        "weight": np.linspace(-1, 1, 60).round(3),
        "price": np.linspace(1, 99, 60).round(2),
        "note": "n",
        "clicked": [0, 1, 1] * 20,
        "bought": [0, 0, 1] * 20,
    }
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "~", "1e999", "nan", "../../x", "s3://", "http://u:p@h", "mmoe", "\x00"]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree in which one to three nodes are something else, are gone, or have a new neighbour."""
    found = yaml.safe_load(yaml.safe_dump(tree))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = found
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            below = holder[key]
            if isinstance(below, dict | list) and below and draw(st.booleans()):
                holder = below
                continue
            match draw(st.sampled_from(["other", "gone", "new"])):
                case "other":
                    holder[key] = draw(values)
                case "gone":
                    del holder[key]
                case "new" if isinstance(holder, dict):
                    holder[draw(st.text(string.ascii_lowercase, max_size=6))] = draw(values)
                case _:
                    holder.append(draw(values))
            break
    return found


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are gone, others, or new."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(found) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "truncate"])):
            case "flip" if found:
                found[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del found[place : place + draw(st.integers(1, 20))]
            case "insert":
                found[place:place] = draw(st.binary(min_size=1, max_size=8))
            case _:
                del found[place:]
    return bytes(found)


SPELLINGS = [
    *("2024-02-30", "2024-01-01", "0x_", "0b", "012", "1_000", "1:99", "yes", ".inf", "=", "<<"),
    *("!!int many", "!!float x", "!!bool x", "!!binary x", "!!set x", "!!timestamp x", "!!omap x"),
    *("!!pairs x", "!!seq x", "!!map x", "!!null x", "!!python/object:os.system []"),
    *("&a [*a]", "&a {a: *a}", "*b", "{<<: 1}", "[<<]", "{[1]: 2}", "@x", "%", "`", "'", '"\\x"'),
    *("-", "?", "|", ">", "9" * 5_000, "[" * 2_000, "{a: " * 2_000),
]
"""Ends of a line that YAML takes for something else, or for nothing."""


@st.composite
def respelled(draw: st.DrawFn, text: str) -> bytes:
    """YAML of which one value is spelled otherwise."""
    lines = text.splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    head = re.match(r"\s*(- |[^:]+: ?)*", lines[place])
    assert head is not None
    lines[place] = f"{head[0].rstrip()} {draw(st.sampled_from(SPELLINGS))}"
    return "\n".join(lines).encode()


def texts(tree: Any) -> st.SearchStrategy[bytes]:
    """Files of a tree that is wrong, or that is not quite YAML, or not at all."""
    text = yaml.safe_dump(tree).encode()
    written = changed(tree).map(lambda found: yaml.safe_dump(found, allow_unicode=True).encode())
    return written | damaged(text) | respelled(text.decode()) | st.binary(max_size=60)


@dataclass
class Place:
    directory: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def pwiser(self, *arguments: object) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", ["pwiser", *map(str, arguments)])
        self.capsys.readouterr()
        code = run()
        return code, self.capsys.readouterr().err

    @contextmanager
    def writes_nothing(self) -> Iterator[None]:
        before = sorted(self.directory.rglob("*"))
        yield
        assert sorted(self.directory.rglob("*")) == before


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Place(tmp_path, monkeypatch, capsys)


def check_line(said: str) -> None:
    assert re.fullmatch(r"pwiser: [^\n]+\n", said), said
    assert "Traceback" not in said


@tried
@given(texts(JOB))
def test_job_files(place: Place, content: bytes) -> None:
    job = place.directory / "job.yaml"
    job.write_bytes(content)
    with place.writes_nothing():  # also one that is right after all has no dataset
        code, said = place.pwiser("tune", job)
    assert code == 2
    check_line(said)


@tried
@given(texts(SCHEMA))
def test_schema_files(place: Place, content: bytes) -> None:
    ROWS.to_csv(place.directory / "rows.csv", index=False)
    (place.directory / "schema.yaml").write_bytes(content)
    prepare_or_complain(place)


@tried
@given(damaged(ROWS.to_csv(index=False).encode()))
def test_tables_of_text(place: Place, content: bytes) -> None:
    (place.directory / "rows.csv").write_bytes(content)
    (place.directory / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    prepare_or_complain(place)


@tried
@given(damaged(ROWS.to_parquet(index=False)))
def test_tables_of_parquet(place: Place, content: bytes) -> None:
    (place.directory / "rows.parquet").write_bytes(content)
    (place.directory / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    prepare_or_complain(place, "rows.parquet")


def prepare_or_complain(place: Place, table: str = "rows.csv") -> None:
    out = place.directory / "prepared"
    arguments = ("--input", table, "--schema", "schema.yaml", "--out", out)
    before = sorted(place.directory.rglob("*"))
    code, said = place.pwiser("data", "prepare", "table", *arguments)
    if code == 0:
        open_dataset(out).load("train")
        shutil.rmtree(out)
    else:
        assert code == 2
        check_line(said)
    assert sorted(place.directory.rglob("*")) == before


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("prepared") / "tiny"
    synthesize(out=out, impressions=2_000, seed=0)
    shutil.rmtree(out / "truth")
    return out


def arrays(impressions: Impressions) -> list[npt.NDArray[Any]]:
    return [value for value in vars(impressions).values() if isinstance(value, np.ndarray)]


def read(directory: Path) -> list[list[npt.NDArray[Any]]]:
    dataset = open_dataset(directory)
    return [arrays(dataset.load(split)) for split in ("train", "valid", "test")]


@tried
@given(st.data())
def test_prepared_datasets(place: Place, prepared: Path, data: st.DataObject) -> None:
    copy = place.directory / "tiny"
    shutil.copytree(prepared, copy)
    try:
        file = data.draw(st.sampled_from(sorted(p for p in copy.rglob("*") if p.is_file())))
        whole = file.read_bytes()
        broken = data.draw(damaged(whole))
        file.write_bytes(broken)
        try:
            found = read(copy)
        except DatasetError as error:
            assert "\n" not in str(error)
            return
        for split, expected in zip(found, read(prepared), strict=True):
            for one, other in zip(split, expected, strict=True):
                assert np.array_equal(one, other, equal_nan=True), (file, len(whole))
    finally:
        shutil.rmtree(copy)
