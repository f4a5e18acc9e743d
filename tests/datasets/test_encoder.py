import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from datasets import DatasetError, Encoder, TableError, open_dataset, prepare_table
from datasets.numerical import NumericalStatistics
from datasets.schema import CategoricalField, NumericalField
from datasets.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parents[2]
UNIT = NumericalStatistics(mean=0, standard_deviation=1, minimum=-1, maximum=1)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(
        categorical={"color": CategoricalField(), "size": CategoricalField()},
        numerical={"weight": NumericalField(), "price": NumericalField(fill=5)},
        vocabularies={"color": Vocabulary(["red", "blue"]), "size": Vocabulary(["3", "4"])},
        statistics={"weight": UNIT, "price": UNIT},
    )


def rows(**changes: list[object]) -> pd.DataFrame:
    columns: dict[str, list[object]] = {
        "color": ["blue", "red"],
        "size": [3, 4],
        "weight": [0.5, 1.0],
        "price": [1.0, 2.0],
    }
    return pd.DataFrame({**columns, **changes})


def test_frames_and_tables_encode_alike_and_extra_columns_are_ignored(encoder: Encoder) -> None:
    frame = rows(other=[object(), object()])
    for table in (frame, pa.table(rows()), pa.table(rows().astype(str))):
        ids_NF, numericals_ND = encoder.encode(table)
        assert ids_NF.tolist() == [[2, 1], [1, 2]]
        assert numericals_ND.tolist() == [[0.5, 1.0], [1.0, 2.0]]
        assert (str(ids_NF.dtype), str(numericals_ND.dtype)) == ("int8", "float32")


def test_unseen_and_missing_categories_are_id_zero(encoder: Encoder) -> None:
    ids_NF, _ = encoder.encode(rows(color=["green", None], size=[float("nan"), 3.0]))
    assert ids_NF.tolist() == [[0, 0], [0, 1]]


def test_fill_replaces_missing_and_infinite_numbers(encoder: Encoder) -> None:
    _, numericals_ND = encoder.encode(rows(price=[float("nan"), float("inf")]))
    assert numericals_ND[:, 1].tolist() == [5.0, 5.0]


def test_missing_number_without_fill_names_row_and_column(encoder: Encoder) -> None:
    with pytest.raises(TableError, match="table: row 2: column 'weight' is missing or not finite"):
        encoder.encode(rows(weight=[1.0, None]))


def test_cell_that_is_no_number_names_row_and_column(encoder: Encoder) -> None:
    with pytest.raises(TableError, match="table: row 2: column 'price': 'two' is no number"):
        encoder.encode(rows(price=["1", "two"]))


def test_missing_column_is_named(encoder: Encoder) -> None:
    with pytest.raises(TableError, match="table: no column 'size', 'price'; give every feature"):
        encoder.encode(rows().drop(columns=["size", "price"]))


def test_column_given_twice_is_refused(encoder: Encoder) -> None:
    twice = pd.concat([rows(), rows()[["color"]]], axis=1)
    with pytest.raises(TableError, match="table: column 'color' is there twice; give it once"):
        encoder.encode(twice)


def test_category_of_a_wrong_type_is_refused(encoder: Encoder) -> None:
    with pytest.raises(TableError, match=r"column 'color' holds .*a category is text, a number"):
        encoder.encode(rows(color=[pd.Timestamp(0), pd.Timestamp(1)]))


def test_no_rows_give_empty_inputs(encoder: Encoder) -> None:
    ids_NF, numericals_ND = encoder.encode(rows()[:0])
    assert (ids_NF.shape, numericals_ND.shape) == ((0, 2), (0, 2))


def test_saved_encoder_encodes_alike_in_a_fresh_process(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "export")
    rows().to_csv(tmp_path / "rows.csv", index=False)
    script = (
        "import sys, pandas as pd; from datasets import Encoder; "
        "ids, numbers = Encoder.load(sys.argv[1]).encode(pd.read_csv(sys.argv[2])); "
        "print(ids.tolist(), numbers.tolist())"
    )
    paths = (str(tmp_path / "export"), str(tmp_path / "rows.csv"))
    command = [sys.executable, "-c", script, *paths]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    ids_NF, numericals_ND = encoder.encode(rows())
    assert printed.stdout.strip() == f"{ids_NF.tolist()} {numericals_ND.tolist()}"


def test_directory_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot read encoder\.json"):
        Encoder.load(tmp_path)


def test_pandas_and_arrow_readings_of_the_raw_file_give_the_prepared_rows(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> None:
    # one empty cell makes pandas read the integers of size as floats, and booleans as objects
    frame = frame.astype({"size": object, "color": object})
    frame.loc[7, "size"] = None
    frame.loc[9, "color"] = "NA"
    frame["color"] = frame["color"].replace({"red": "True", "blue": "007"})
    path = write_csv(frame)
    for name in ("valid.csv", "test.csv"):
        write_csv(frame, name)
    out = tmp_path / "out"
    prepare_table(
        input=path,
        valid=tmp_path / "valid.csv",
        test=tmp_path / "test.csv",
        schema=schema_file,
        out=out,
    )
    dataset = open_dataset(str(out))
    train = dataset.load("train")
    for table in (pd.read_csv(path), pd.read_csv(path, dtype=str), pacsv.read_csv(path)):
        ids_NF, numericals_ND = dataset.encoder().encode(table)
        np.testing.assert_array_equal(ids_NF, train.ids_NF)
        np.testing.assert_array_equal(numericals_ND, train.numericals_ND)
