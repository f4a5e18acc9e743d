"""Raw AliExpress files, written here cell by cell; every oddity is refused with one line."""

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from datasets import (
    DatasetError,
    Manifest,
    TableError,
    join_engine,
    open_dataset,
    prepare_aliexpress,
    prepare_aliexpress_raw,
)
from datasets.progress import report_nothing
from datasets.sources.aliexpress_raw import join_aliexpress

USER_CATEGORICALS = [*range(2, 9), 32, 33]
ITEM_CATEGORICALS = [19, 34, 35, 36, 40, 41, 42]
SEARCHES = {"train": range(100, 120), "test": range(500, 504)}

Raw = dict[str, list[list[str]]]


def user_row(search: int) -> list[str]:
    """Column c of search s: a small integer for a category, else s.c as a decimal."""
    cells = [
        str((search + c) % 7) if c in USER_CATEGORICALS else f"{c}.{search}" for c in range(34)
    ]
    return [str(search), *cells[2:]]


def item_row(search: int, position: int, label: int) -> list[str]:
    cells = [
        str((search + c + position) % 5)
        if c in ITEM_CATEGORICALS
        else f"-{position}.{c:02}{search}"
        for c in range(49)
    ]
    return [str(search), *cells[2:], str(label)]


@pytest.fixture
def raw() -> Raw:
    """Three impressions per search, labels 0, 1 and 2 in turns."""
    files: Raw = {}
    for split, searches in SEARCHES.items():
        files[f"user_{split}"] = [user_row(search) for search in reversed(searches)]
        files[f"item_{split}"] = [
            item_row(search, position, (search + position) % 3)
            for search in searches
            for position in range(3)
        ]
    return files


def text_of(rows: list[list[str]], end: str = "\n") -> str:
    return "".join(",".join(row) + end for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_files(raw: Raw, name: str = "raw", end: str = "\n") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for stem, rows in raw.items():
            (directory / f"nl_{stem}.csv").write_bytes(text_of(rows, end).encode())
        return directory

    return write_files


def prepared(directory: Path, out: Path) -> Manifest:
    return prepare_aliexpress_raw(input=directory, country="nl", out=out)


def processed_rows(raw: Raw, split: str) -> pd.DataFrame:
    """Join by hand, in the processed form: categories and numbers of the user, then of the item."""
    users = {row[0]: row for row in raw[f"user_{split}"]}
    rows = []
    for item in raw[f"item_{split}"]:
        user = users[item[0]]
        categories = [user[c - 1] for c in USER_CATEGORICALS]
        categories += [item[c - 1] for c in ITEM_CATEGORICALS]
        numbers = [user[c - 1] for c in range(2, 34) if c not in USER_CATEGORICALS]
        numbers += [item[c - 1] for c in range(2, 49) if c not in ITEM_CATEGORICALS]
        labels = [str(int(item[48] != "0")), str(int(item[48] == "2"))]
        rows.append([item[0], *categories, *numbers, *labels])
    names = ["search_id", *(f"categorical_{i}" for i in range(1, 17))]
    names += [*(f"numerical_{i}" for i in range(1, 64)), "click", "conversion"]
    return pd.DataFrame(rows, columns=names)


def test_raw_and_processed_rows_give_the_same_dataset(
    raw: Raw, write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "processed").mkdir()
    for split in ("train", "test"):
        processed_rows(raw, split).to_csv(tmp_path / "processed" / f"{split}.csv", index=False)
    from_raw = prepared(write(raw), tmp_path / "a")
    from_processed = prepare_aliexpress(input=tmp_path / "processed", out=tmp_path / "b")
    assert from_raw.digest == from_processed.digest
    assert from_raw.statistics == from_processed.statistics
    assert from_raw.table == from_processed.table
    pairs = [open_dataset(str(tmp_path / name)).load("valid").ids_NF for name in ("a", "b")]
    assert pairs[0].tolist() == pairs[1].tolist()  # in the order of the item file
    splits = from_raw.splits
    assert splits["train"].impressions + splits["valid"].impressions == 60
    assert (splits["test"].clicks, splits["test"].conversions) == (8, 4)


def test_rows_keep_the_order_of_the_item_file(write: Callable[..., Path], tmp_path: Path) -> None:
    searches = range(100, 2_100)
    items = [item_row(search, position, 0) for search in searches for position in range(3)]
    items = [items[7_919 * place % len(items)] for place in range(len(items))]
    files: Raw = {}
    for split in SEARCHES:
        files |= {f"user_{split}": [user_row(s) for s in searches], f"item_{split}": items}
    joined = join_aliexpress(write(files), "nl", work=tmp_path, report=report_nothing)
    found = pa.concat_tables(
        pa.Table.from_batches([batch.rows]) for batch in joined["train"].batches()
    )
    assert found["search_id"].to_pylist() == [row[0] for row in items]
    expected = [float(row[1]) for row in items]  # column 2, numerical 24
    assert found["numerical_24"].to_pylist() == pytest.approx(expected)


def test_a_join_without_room_is_told(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_engine, "MEMORY_LIMIT", "6MB")
    items = [item_row(100 + number % 2_000, number, 0) for number in range(6_000)]
    users = [user_row(search) for search in range(100, 2_100)]
    files = {f"user_{split}": users for split in SEARCHES}
    files |= {f"item_{split}": items for split in SEARCHES}
    with pytest.raises(DatasetError, match=r"joining train: memory or disk do not suffice \(.*Mem"):
        prepared(write(files), tmp_path / "out")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_do_not_matter(
    raw: Raw, write: Callable[..., Path], tmp_path: Path, end: str
) -> None:
    first = prepared(write(raw, "plain"), tmp_path / "a")
    assert prepared(write(raw, "other", end), tmp_path / "b").digest == first.digest


def test_a_last_line_without_its_end_is_whole(
    raw: Raw, write: Callable[..., Path], tmp_path: Path
) -> None:
    directory = write(raw)
    first = prepared(directory, tmp_path / "a")
    path = directory / "nl_item_train.csv"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert prepared(directory, tmp_path / "b").digest == first.digest


@pytest.mark.parametrize("kind", ["gz", "zst", "zip", "zip per country"])
def test_compressed_files_give_the_same_digest(
    raw: Raw, write: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    directory = write(raw)
    expected = prepared(directory, tmp_path / "a").digest
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if kind == "gz":
            (directory / f"{path.name}.gz").write_bytes(gzip.compress(content))
        elif kind == "zst":
            with pa.output_stream(str(directory / f"{path.name}.zst"), compression="zstd") as out:
                out.write(content)
        else:
            archive = f"{path.stem}.zip" if kind == "zip" else "NL.zip"
            with zipfile.ZipFile(directory / archive, "a", zipfile.ZIP_DEFLATED) as opened:
                opened.writestr(f"NL/{path.name}", content)
    assert prepared(directory, tmp_path / "b").digest == expected


def remove_search(raw: Raw) -> None:
    raw["user_train"] = [row for row in raw["user_train"] if row[0] != "103"]


def repeat_search(raw: Raw) -> None:
    raw["user_test"].append(user_row(502))


def spoil_label(raw: Raw) -> None:
    raw["item_train"][7][48] = "3"


def empty_label(raw: Raw) -> None:
    raw["item_train"][7][48] = ""


def spoil_number(raw: Raw) -> None:
    raw["item_train"][4][1] = "abc"


def empty_number(raw: Raw) -> None:
    raw["user_train"][0][9] = ""


def truncate(raw: Raw) -> None:
    raw["item_test"][-1] = raw["item_test"][-1][:20]


def truncate_in_the_last_cell(raw: Raw) -> None:
    raw["item_test"][-1][48] = ""


def no_impression(raw: Raw) -> None:
    raw["item_test"].clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            remove_search,
            r"nl_item_train\.csv: 3 impressions have a search that .*nl_user_train\.csv does not "
            r"hold \(row 10, search '103'\); give the two files of one download",
        ),
        (
            repeat_search,
            r"nl_user_test\.csv: 1 search has more than one row \(search '502' in rows 2, 5\);",
        ),
        (spoil_label, r"nl_item_train\.csv: row 8: column 49 is '3', a label is 0 .none.*mend"),
        (empty_label, r"nl_item_train\.csv: row 8: column 49 is '', a label is 0 .none.*mend"),
        (spoil_number, r"nl_item_train\.csv: row 5: column 2 is 'abc', no number; mend the row"),
        (empty_number, r"nl_item_train\.csv: row 58: column 'numerical_2' is empty, NaN or inf"),
        (
            truncate,
            r"nl_item_test\.csv: row 12 has 20 cells instead of 49; mend or remove the line",
        ),
        (truncate_in_the_last_cell, r"nl_item_test\.csv: row 12: column 49 is '', a label is 0"),
        (no_impression, r"nl_item_test\.csv: no row, so the test split would be empty"),
    ],
)
def test_oddities_are_refused_and_leave_nothing(
    raw: Raw,
    write: Callable[..., Path],
    tmp_path: Path,
    spoil: Callable[[Raw], None],
    message: str,
) -> None:
    spoil(raw)
    directory = write(raw)
    with pytest.raises(TableError, match=message):
        prepared(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_file_and_unknown_country_are_refused(
    raw: Raw, write: Callable[..., Path], tmp_path: Path
) -> None:
    directory = write(raw)
    (directory / "nl_user_test.csv").unlink()
    with pytest.raises(TableError, match=r"no nl_user_test\.csv in it .*give the directory"):
        prepared(directory, tmp_path / "out")
    with pytest.raises(TableError, match=r"--country uk: unknown; known: nl, fr, us, es, ru"):
        prepare_aliexpress_raw(input=directory, country="uk", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_damaged_archive_is_refused(raw: Raw, write: Callable[..., Path], tmp_path: Path) -> None:
    directory = write(raw)
    path = directory / "nl_item_train.csv"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    (directory / "nl_item_train.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(TableError, match=r"nl_item_train\.csv\.gz: .*fetch (it|the file) again"):
        prepared(directory, tmp_path / "out")
    (directory / "nl_item_train.csv.gz").unlink()
    (directory / "NL.zip").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(TableError, match=r"NL\.zip: not readable as zip .*fetch it again"):
        prepared(directory, tmp_path / "out")
