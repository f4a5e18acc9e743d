from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets import Dataset, OutputExistsError, TableError
from trainables import CheckpointError, TrialConfiguration, inputs_of, load
from trainables.checkpoint import save_checkpoint
from trainables.configuration import build_model
from tuner.export import EXAMPLE_FILE, save_encoder
from tuner.prediction import predict_table


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    directory = tmp_path_factory.mktemp("export")
    configuration = TrialConfiguration.create("dnn", {"embedding_dim": 2, "hidden_units": [4]})
    inputs = inputs_of(tiny_dataset)
    save_checkpoint(directory, configuration, inputs, build_model(configuration, inputs))
    save_encoder(tiny_dataset, str(directory))
    return directory


@pytest.fixture
def rows(export: Path) -> pd.DataFrame:
    return pd.read_parquet(export / EXAMPLE_FILE)


def test_the_example_of_an_export_is_its_datasets_first_test_rows(
    export: Path, tiny_dataset: Dataset, rows: pd.DataFrame
) -> None:
    ids, numericals = load(export).encoder.encode(rows)
    test = tiny_dataset.load("test")
    assert len(rows) == 5
    assert (ids == test.ids_NF[:5]).all()
    assert (numericals == test.numericals_ND[:5]).all()


def test_rows_of_several_files_are_scored_in_their_order(
    export: Path, rows: pd.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    rows[:2].assign(other="x").to_csv(tmp_path / "rows" / "1.csv", index=False)
    rows[2:].to_parquet(tmp_path / "rows" / "2.parquet")
    out = tmp_path / "made" / "scores.parquet"
    assert predict_table(export, str(tmp_path / "rows"), str(out)) == 5
    scores = pd.read_parquet(out)
    assert list(scores) == ["pctr"]
    np.testing.assert_array_equal(scores["pctr"], load(export).predict(rows)["pctr"])
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]
    with pytest.raises(OutputExistsError, match="already exists"):
        predict_table(export, str(tmp_path / "rows"), str(out))


def test_a_table_without_rows_gives_a_file_without_rows(
    export: Path, rows: pd.DataFrame, tmp_path: Path
) -> None:
    rows[:0].to_csv(tmp_path / "none.csv", index=False)
    assert predict_table(export, str(tmp_path / "none.csv"), str(tmp_path / "s.parquet")) == 0
    assert list(pd.read_parquet(tmp_path / "s.parquet")) == ["pctr"]


def test_a_cell_that_is_no_number_is_told_and_nothing_is_left(
    export: Path, rows: pd.DataFrame, tmp_path: Path
) -> None:
    column = rows.columns[-1]
    rows.astype({column: object}).assign(**{column: "much"}).to_csv(tmp_path / "bad.csv")
    with pytest.raises(TableError, match=rf"bad\.csv: rows 1 to 5: table: .*{column}.*'much'"):
        predict_table(export, str(tmp_path / "bad.csv"), str(tmp_path / "scores.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_a_column_that_is_missing_is_told(export: Path, rows: pd.DataFrame, tmp_path: Path) -> None:
    rows.drop(columns=rows.columns[0]).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(TableError, match=rf"no column '{rows.columns[0]}'"):
        predict_table(export, str(tmp_path / "bad.csv"), str(tmp_path / "scores.parquet"))


def test_what_is_no_export_is_told(tmp_path: Path, rows: pd.DataFrame) -> None:
    rows.to_csv(tmp_path / "rows.csv")
    with pytest.raises(CheckpointError, match="name a directory that pwiser export wrote"):
        predict_table(tmp_path, str(tmp_path / "rows.csv"), str(tmp_path / "scores.parquet"))
