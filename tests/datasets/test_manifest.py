import json
from pathlib import Path

import pytest

from datasets.errors import DatasetError
from datasets.filesystem import locate
from datasets.manifest import Manifest, SplitSummary
from datasets.numerical import NumericalStatistics
from datasets.schema import CategoricalField, Labels, NumericalField, Schema


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        source="a test",
        schema=Schema(
            labels=Labels(click="c", conversion="v"),
            categorical={"a": CategoricalField(min_count=2)},
            numerical={"x": NumericalField(normalize="log", fill=0)},
            drop=("q",),
        ),
        vocabulary_sizes={"a": 3},
        statistics={
            "x": NumericalStatistics(mean=0.1, standard_deviation=1e-300, minimum=0, maximum=1)
        },
        splits={"train": SplitSummary(impressions=1, clicks=0, conversions=0, parts=("p",))},
        digest="0" * 64,
    )


def test_manifest_survives_its_file(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(locate(tmp_path))
    assert Manifest.read(locate(tmp_path), shown="x") == manifest
    assert "schema" in json.loads((tmp_path / "manifest.json").read_text())


def test_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="data/x: no such dataset; make one with 'pwiser data"):
        Manifest.read(locate(tmp_path / "x"), shown="data/x")


def test_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"x: not a prepared dataset \(no manifest\.json\); make"
    ):
        Manifest.read(locate(tmp_path), shown="x")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}'])
def test_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DatasetError, match=r"x: manifest\.json is damaged .*prepare the dataset"):
        Manifest.read(locate(tmp_path), shown="x")


def test_manifest_of_another_version_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    manifest.model_copy(update={"format_version": 9}).write(locate(tmp_path))
    with pytest.raises(DatasetError, match="format_version 9, this release reads 1; prepare"):
        Manifest.read(locate(tmp_path), shown="x")
