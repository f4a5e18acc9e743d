from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import (
    Manifest,
    OutputExistsError,
    SchemaError,
    TableError,
    open_dataset,
    prepare_table,
    table_reader,
    writer,
)

REPOSITORY = Path(__file__).parents[2]
WriteCsv = Callable[..., Path]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def prepared(tmp_path: Path, schema_file: Path) -> Callable[..., Manifest]:
    def prepare(path: Path, out: str = "out", **options: object) -> Manifest:
        return prepare_table(
            input=path,
            schema=options.pop("schema", schema_file),
            out=tmp_path / out,
            **options,  # type: ignore[arg-type]
        )

    return prepare


def test_missing_splits_are_carved_and_no_user_is_in_two(
    tmp_path: Path, frame: pd.DataFrame, write_csv: WriteCsv, schema_file: Path
) -> None:
    # the price tells the user, so that the rows of each split show theirs
    schema_file.write_text(schema_file.read_text().replace("price: {}", "price: {normalize: none}"))
    frame["price"] = frame["user"]
    manifest = prepare_table(input=write_csv(frame), schema=schema_file, out=tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    users = [set(dataset.load(split).numericals_ND[:, 1].tolist()) for split in manifest.splits]
    assert list(manifest.splits) == ["train", "valid", "test"]
    assert sum(split.impressions for split in manifest.splits.values()) == 300
    assert sum(len(found) for found in users) == len(set().union(*users)) == 60
    assert manifest.source == "table rows.csv"


def test_given_splits_are_taken_and_only_the_missing_one_is_carved(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    path, test = write_csv(frame), write_csv(frame[:40], "test.csv")
    manifest = prepared(path, test=test)
    assert manifest.splits["test"].impressions == 40
    assert manifest.splits["train"].impressions + manifest.splits["valid"].impressions == 300
    assert 0 < manifest.splits["valid"].impressions < 150


def test_vocabularies_and_statistics_come_from_train_alone(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv, tmp_path: Path
) -> None:
    other = frame[:20].assign(color="new", price=1e6)
    manifest = prepared(
        write_csv(frame), valid=write_csv(other, "v.csv"), test=write_csv(other, "t.csv")
    )
    assert manifest.vocabulary_sizes["color"] == frame["color"].nunique() + 1
    assert manifest.statistics["price"].mean == pytest.approx(frame["price"].mean(), rel=1e-6)
    assert (open_dataset(str(tmp_path / "out")).load("valid").ids_NF[:, 0] == 0).all()


def test_zero_fraction_makes_no_split(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv, schema_file: Path
) -> None:
    schema_file.write_text(schema_file.read_text().replace("valid: 0.2", "valid: 0"))
    assert list(prepared(write_csv(frame)).splits) == ["train", "test"]


def test_same_rows_have_one_digest_whatever_format_order_and_layout(
    tmp_path: Path,
    frame: pd.DataFrame,
    write_csv: WriteCsv,
    prepared: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame.to_parquet(tmp_path / "rows.parquet")
    frame[frame.columns[::-1]].sample(frac=1, random_state=1).to_csv(
        tmp_path / "shuffled.csv", index=False
    )
    first = prepared(write_csv(frame), "csv")
    digests = {first.digest, prepared(tmp_path / "rows.parquet", "parquet").digest}
    monkeypatch.setattr(table_reader, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(writer, "_ROW_GROUP_ROWS", 16)
    digests.add(prepared(tmp_path / "shuffled.csv", "shuffled").digest)
    assert digests == {first.digest}
    changed = frame.copy()
    changed.loc[5, "price"] += 0.01
    assert prepared(write_csv(changed, "changed.csv"), "changed").digest != first.digest


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "3", "", "NA", "é,"]),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.booleans(),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_csv_and_parquet_of_any_rows_have_one_digest(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, float, bool]]
) -> None:
    directory = tmp_path_factory.mktemp("rows")
    schema = directory / "s.yaml"
    schema.write_text(
        "labels: {click: y, conversion: z}\ncategorical: [t]\nnumerical: [x]\n"
        "split: {valid: 0, test: 0}\n"
    )
    texts, numbers, clicks = (list(column) for column in zip(*cells, strict=True))
    frame = pd.DataFrame({"t": texts, "x": numbers, "y": clicks, "z": False})
    frame.to_csv(directory / "rows.csv", index=False)
    frame.to_parquet(directory / "rows.parquet")
    digests = {
        prepare_table(input=directory / name, schema=schema, out=directory / f"out-{name}").digest
        for name in ("rows.csv", "rows.parquet")
    }
    assert len(digests) == 1


def test_parts_hold_raw_values_under_the_field_names(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv, tmp_path: Path
) -> None:
    manifest = prepared(write_csv(frame))
    table = pq.read_table(tmp_path / "out" / "train")
    names = ["color", "size", "weight", "price", "click", "conversion"]
    assert table.column_names == names
    assert table["price"].type == pa.float32()
    assert set(np.float32(frame["price"])) >= set(table["price"].to_numpy())
    assert manifest.splits["train"].parts == ("train/part-00000.parquet",)
    assert sorted(names_in(tmp_path / "out")) == [
        "manifest.json",
        "test",
        "train",
        "valid",
        "vocabularies.parquet",
    ]


def refused(prepared: Callable[..., Manifest], path: Path, message: str, **options: object) -> None:
    """Check that preparing fails with one line of this beginning, and leaves nothing behind."""
    before = names_in(path.parent)
    with pytest.raises(TableError, match=message) as fault:
        prepared(path, "deep/out", **options)
    assert "\n" not in str(fault.value)
    assert names_in(path.parent) == before


def test_label_that_is_not_zero_or_one_is_refused(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    frame.loc[2, "clicked"] = 3
    refused(
        prepared, write_csv(frame), r"rows\.csv: row 3: label column 'clicked' is '3'; a label is"
    )


def test_conversion_without_click_is_refused_with_count_and_rows(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    frame.loc[[4, 9], ["clicked", "bought"]] = 0, 1
    refused(
        prepared,
        write_csv(frame),
        r"rows\.csv: 2 conversions have no click \(rows 5, 10\); mend the labels, or choose "
        "--conversion-without-click drop or as-click",
    )


def test_conversion_without_click_is_dropped_or_clicked_by_choice(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    frame.loc[[4, 9], ["clicked", "bought"]] = 0, 1
    path = write_csv(frame)
    dropped = prepared(path, "drop", conversion_without_click="drop")
    clicked = prepared(path, "as-click", conversion_without_click="as-click")
    assert (dropped.dropped_rows, dropped.added_clicks) == (2, 0)
    assert (clicked.dropped_rows, clicked.added_clicks) == (0, 2)
    assert sum(split.impressions for split in dropped.splits.values()) == 298
    assert sum(split.impressions for split in clicked.splits.values()) == 300
    assert sum(split.clicks for split in clicked.splits.values()) == frame["clicked"].sum() + 2
    without = prepared(write_csv(frame.drop(index=[4, 9]), "without.csv"), "without")
    assert without.digest == dropped.digest


def test_cell_that_is_no_number_is_refused(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    frame = frame.astype({"price": object})
    frame.loc[6, "price"] = "cheap"
    message = r"rows\.csv: row 7: column 'price' is 'cheap', no number; mend the row, or list"
    refused(prepared, write_csv(frame), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_missing_and_infinite_numbers_need_a_fill(
    prepared: Callable[..., Manifest],
    frame: pd.DataFrame,
    write_csv: WriteCsv,
    schema_file: Path,
    value: float,
) -> None:
    frame.loc[[6, 8], "price"] = value
    path = write_csv(frame)
    refused(
        prepared,
        path,
        r"rows\.csv: row 7: column 'price' is empty, NaN or infinite \(2 cells are in the file\); "
        r"mend the rows or add fill: 0 \(a number\) to 'price' under numerical in .*schema\.yaml",
    )
    schema_file.write_text(schema_file.read_text().replace("price: {}", "price: {fill: -1}"))
    assert prepared(path).filled_cells == {"price": 2}


def test_later_file_is_checked_before_anything_is_written(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    path = write_csv(frame)
    test = write_csv(frame.assign(bought=1, clicked=0), "test.csv")
    refused(
        prepared,
        path,
        r"test\.csv: 300 conversions have no click \(first rows 1, 2, 3, 4, 5\)",
        test=test,
    )
    missing = write_csv(frame.drop(columns="color"), "valid.csv")
    refused(prepared, path, r"valid\.csv: no column 'color', which the schema", valid=missing)


def test_empty_group_key_is_refused(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    frame = frame.astype({"user": object})
    frame.loc[3, "user"] = None
    refused(prepared, write_csv(frame), r"row 4: group column 'user' is empty; give every row")


def test_category_of_dates_is_refused(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    frame.assign(color=pd.Timestamp(0)).to_parquet(path)
    refused(prepared, path, "column 'color' holds timestamp.*list it under drop")


def test_empty_carved_split_is_refused(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    refused(
        prepared,
        write_csv(frame.assign(user=1)),
        r"no row falls into the valid split \(split\.valid: 0\.2 of 300 rows, seed 0\); give "
        r"--valid FILE, a larger split\.valid or another split\.seed",
    )


def test_file_with_a_header_alone_is_refused(
    prepared: Callable[..., Manifest], frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    path, empty = write_csv(frame), write_csv(frame[:0], "empty.csv")
    message = r"empty\.csv: no row, so the (train|test) split would be empty; give a file with rows"
    refused(prepared, empty, message)
    refused(prepared, path, message, test=empty)


def test_existing_output_and_missing_schema_are_refused_first(
    prepared: Callable[..., Manifest], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match=r"--out .*out: already exists; give another"):
        prepared(tmp_path / "no.csv")
    with pytest.raises(SchemaError, match=r"no\.yaml: cannot read the schema"):
        prepared(tmp_path / "no.csv", "new", schema=tmp_path / "no.yaml")


def test_interrupt_while_writing_leaves_nothing(
    prepared: Callable[..., Manifest],
    frame: pd.DataFrame,
    write_csv: WriteCsv,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_csv(frame)
    before = names_in(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.PartsWriter, "_write_group", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared(path, "deep/out")
    assert names_in(tmp_path) == before


def test_hillstrom_prepares_with_its_example_schema(shared_data: Path, tmp_path: Path) -> None:
    manifest = prepare_table(
        input=shared_data / "hillstrom" / "hillstrom.csv",
        schema=REPOSITORY / "examples" / "hillstrom.schema.yaml",
        out=tmp_path / "hillstrom",
    )
    splits = manifest.splits.values()
    assert sum(split.impressions for split in splits) == 64_000
    assert sum(split.clicks for split in splits) == 9_394
    assert sum(split.conversions for split in splits) == 578
    assert manifest.splits["valid"].impressions == pytest.approx(9_600, rel=0.03)
    assert manifest.splits["test"].impressions == pytest.approx(12_800, rel=0.03)


def test_hillstrom_with_its_leak_unlisted_is_refused(shared_data: Path, tmp_path: Path) -> None:
    text = (REPOSITORY / "examples" / "hillstrom.schema.yaml").read_text()
    schema = tmp_path / "s.yaml"
    schema.write_text("\n".join(line for line in text.splitlines() if "drop:" not in line))
    source = shared_data / "hillstrom" / "hillstrom.csv"
    with pytest.raises(TableError, match="the schema does not name column 'spend'; list under"):
        prepare_table(input=source, schema=schema, out=tmp_path / "out")


def test_paddlerec_file_with_orphan_conversions_is_refused(
    shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "paddlerec-fixtures" / "aitm_data_sample_data_train_train.csv"
    columns = pd.read_csv(source, nrows=0).columns[2:].tolist()
    schema = tmp_path / "s.yaml"
    schema.write_text(
        f"labels: {{click: click, conversion: purchase}}\ncategorical: {columns}\n"
        "split: {valid: 0.3, test: 0.3}\n"
    )
    with pytest.raises(TableError, match=r"\d+ conversions? ha(s|ve) no click \((first )?rows? \d"):
        prepare_table(input=source, schema=schema, out=tmp_path / "out")


def test_many_files_give_the_dataset_of_one(
    prepared: Callable[..., Manifest], tmp_path: Path, frame: pd.DataFrame, write_csv: WriteCsv
) -> None:
    whole = prepared(write_csv(frame))
    parts = tmp_path / "parts"
    parts.mkdir()
    for index in range(8):
        rows = frame.iloc[index * 300 // 8 : (index + 1) * 300 // 8]
        if index % 2:
            rows.to_parquet(parts / f"{index}.parquet")
        else:
            rows.to_csv(parts / f"{index}.csv", index=False)
    split_up = prepared(parts, "parts-out")
    assert split_up.digest == whole.digest
    assert split_up.files == whole.files


@pytest.mark.parametrize("option", ["valid", "test"])
def test_a_file_that_is_in_two_splits_is_refused(
    frame: pd.DataFrame, prepared: Callable[..., Manifest], tmp_path: Path, option: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "held"):
        frame.to_csv(folder / f"{name}.csv", index=False)
    (tmp_path / "link.csv").symlink_to(folder / "held.csv")
    for held in (folder / "held.csv", tmp_path / "link.csv"):
        with pytest.raises(TableError, match=f"--{option} .*: is among the files of --input too"):
            prepared(folder, **{option: held})
    assert not (tmp_path / "out").exists()
    prepared(f"{folder}/train*", **{option: folder / "held.csv"})


def test_a_fault_in_one_of_many_files_is_named_by_its_file_and_row(
    prepared: Callable[..., Manifest], tmp_path: Path, frame: pd.DataFrame
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    frame.to_csv(parts / "a.csv", index=False)
    frame.assign(price=["oops", *frame["price"][1:]]).to_csv(parts / "b.csv", index=False)
    with pytest.raises(TableError, match=r"parts/b\.csv: row 1: column 'price' is 'oops'"):
        prepared(parts)
    frame.drop(columns="price").to_csv(parts / "b.csv", index=False)
    with pytest.raises((SchemaError, TableError), match=r"parts/b\.csv"):
        prepared(parts)
    assert names_in(tmp_path) == ["parts", "schema.yaml"]
