"""Raw Ali-CCP files, written by hand; every oddity is refused or counted."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from datasets import Dataset, Manifest, TableError, open_dataset, prepare_aliccp, validate
from datasets.sources.aliccp_features import FIELDS, MULTI_VALUED, FeatureListError, field_ids
from tuner.cli.data import data_app

COMMON = """\
u1,3,101\x0211\x031.0\x01121\x021\x031.0\x01150_14\x027\x032.39
u2,4,101\x0212\x031.0\x01150_14\x028\x030.7\x01150_14\x027\x031.1\x01110_14\x021\x031
u3,0,
"""
SKELETON = """\
1,0,0,u1,3,205\x02900\x031.0\x01210\x025\x031.0\x01210\x026\x031.0
2,1,0,u1,1,205\x02901\x031.0
3,1,1,u2,2,205\x02900\x031.0\x01301\x021\x031.0
4,0,0,u2,0,
5,0,1,u3,1,205\x02900\x031.0
6,0,0,u3,1,205\x02900\x031.0
7,0,0,u4,1,205\x02902\x031.0
8,0,0,u5,1,205\x02902\x031.0
"""
COMMON += "u4,1,101\x0211\x031.0\nu5,1,101\x0211\x031.0\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_files(skeleton: str = SKELETON, common: str = COMMON, name: str = "raw") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for split in ("train", "test"):
            (directory / f"sample_skeleton_{split}.csv").write_bytes(skeleton.encode())
            (directory / f"common_features_{split}.csv").write_bytes(common.encode())
        return directory

    return write_files


def prepared(directory: Path, out: Path) -> Manifest:
    return prepare_aliccp(input=directory, out=out, valid_fraction=0.3, min_count=1)


def with_bags(directory: Path, out: Path, bags: dict[str, int]) -> Dataset:
    prepare_aliccp(input=directory, out=out, valid_fraction=0.3, min_count=1, bags=bags)
    return open_dataset(str(out))


def test_rows_are_joined_and_oddities_counted(write: Callable[..., Path], tmp_path: Path) -> None:
    manifest = prepared(write(), tmp_path / "out")
    assert manifest.dropped_rows == 2  # sample 5 of train and of test converts without a click
    assert manifest.counted == {
        "common-feature rows without a feature": 2,
        "impressions without a feature of their own": 2,
    }
    splits = manifest.splits
    assert splits["train"].impressions + splits["valid"].impressions == 7
    assert (splits["test"].impressions, splits["test"].clicks) == (7, 2)
    assert list(manifest.vocabulary_sizes) == list(FIELDS)
    dataset = open_dataset(str(tmp_path / "out"))
    known = dataset.encoder().vocabularies
    test_NF = dataset.load("test").ids_NF
    values = {
        field: [None if i == 0 else known[field].values[i - 1] for i in test_NF[:, index]]
        for index, field in enumerate(FIELDS)
    }
    first_five = {field: values[field][:5] for field in ("205", "210", "101", "150_14")}
    assert first_five["205"] == ["900", "901", "900", None, "900"]
    assert first_five["210"][0] in ("5", None)  # unknown where u1 fell into valid
    assert set(first_five["150_14"]) <= {"7", "8", None}
    assert first_five["150_14"][2:4] in (["8", "8"], [None, None])
    assert first_five["101"][4] is None  # u3 has no common feature


def test_min_count_is_ten_unless_said(write: Callable[..., Path], tmp_path: Path) -> None:
    manifest = prepare_aliccp(input=write(), out=tmp_path / "out", valid_fraction=0.3)
    assert set(manifest.vocabulary_sizes.values()) == {1}
    with pytest.raises(TableError, match="--min-count 0: must be at least 1"):
        prepare_aliccp(input=tmp_path / "raw", out=tmp_path / "b", min_count=0)


def test_line_ends_do_not_matter(write: Callable[..., Path], tmp_path: Path) -> None:
    first = prepared(write(), tmp_path / "a")
    crlf = write(SKELETON.replace("\n", "\r\n"), COMMON.replace("\n", "\r\n"), "crlf")
    assert prepared(crlf, tmp_path / "b").digest == first.digest
    no_end = write(SKELETON.rstrip("\n"), COMMON.rstrip("\n"), "no-end")
    assert prepared(no_end, tmp_path / "c").digest == first.digest


@pytest.mark.parametrize(
    ("skeleton", "common", "message"),
    [
        (
            SKELETON + "9,0,0,u9,0,\n",
            COMMON,
            r"sample_skeleton_train\.csv: 1 impression has a common-feature index that .*common_"
            r"features_train\.csv does not hold \(row 9, index 'u9'\); give the two files of one",
        ),
        (
            SKELETON,
            COMMON + "u2,0,\n",
            r"common_features_train\.csv: 1 index has more than one row \(the first is 'u2'\)",
        ),
        (
            SKELETON.replace("301\x02", "302\x02"),
            COMMON,
            r"sample_skeleton_train\.csv: row 3: unknown field '302'; known: 101, 121, .*mend",
        ),
        (
            SKELETON,
            COMMON.replace("110_14", "110_14_long"),
            r"common_features_train\.csv: row 2: unknown field '110_14_long'; known: 101, 121",
        ),
        (
            SKELETON.replace("\x02901", "\x0290x"),
            COMMON,
            r"sample_skeleton_train\.csv: row 2: id '90x' is no number of at most 18 digits; mend",
        ),
        (
            SKELETON.rstrip("\n").removesuffix("\x031.0"),
            COMMON,
            r"sample_skeleton_train\.csv: row 8: feature '205\\x02902' is not field .x02 id .x03 v",
        ),
        (
            SKELETON + "9,0,0,u",
            COMMON,
            r"sample_skeleton_train\.csv: row 9 has 4 cells instead of 6; mend or remove the line",
        ),
        (
            SKELETON,
            COMMON + "u6,2,101\x021\x031\n",
            r"common_features_train\.csv: row 6: 1 features where feature_num says '2'; mend or",
        ),
        (
            SKELETON.replace("2,1,0,u1", "2,7,0,u1"),
            COMMON,
            r"sample_skeleton_train\.csv: row 2: label column 'click' is '7'; a label is 0 or 1",
        ),
        ("", COMMON, r"sample_skeleton_train\.csv: the file is empty; fetch it again"),
    ],
)
def test_oddities_are_refused_and_leave_nothing(
    write: Callable[..., Path], tmp_path: Path, skeleton: str, common: str, message: str
) -> None:
    with pytest.raises(TableError, match=message):
        prepared(write(skeleton, common), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_conversion_without_click_is_refused_where_that_is_chosen(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=r"train\.csv: 1 conversion has no click \(row 5\)"):
        prepare_aliccp(input=write(), out=tmp_path / "out", conversion_without_click="refuse")


FEATURES = st.lists(st.tuples(st.sampled_from(("205", "210", "110_14")), st.integers(0, 10**17)))


@given(st.lists(FEATURES, max_size=8), st.integers(2, 4))
def test_ids_are_those_of_a_loop_over_the_features(
    rows: list[list[tuple[str, int]]], length: int
) -> None:
    texts = ["\x01".join(f"{field}\x02{number}\x030.5" for field, number in row) for row in rows]
    lists = pa.array(["skipped\x02", *texts], pa.string())[1:]
    for bags in ({}, {"210": length}, {"210": length, "110_14": 2}):
        found = field_ids(lists, bags)
        for field in FIELDS:
            expected = [[n for name, n in row if name == field] for row in rows]
            if field in bags:
                kept = [numbers[: bags[field]] or None for numbers in expected]
            else:
                kept = [numbers[0] if numbers else None for numbers in expected]
            assert found.columns[field].to_pylist() == kept
        assert found.num_features_N.tolist() == [len(row) for row in rows]


def test_bags_keep_the_first_values_in_their_order(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = with_bags(write(), tmp_path / "out", {"150_14": 3, "210": 2})
    assert dataset.manifest.source == (
        "aliccp, raw form, bags 210 up to 2, 150_14 up to 3, first value of other multi-valued "
        "fields"
    )
    assert validate(dataset) == []
    encoder = dataset.encoder()
    columns = list(encoder.id_columns)
    test_NF = dataset.load("test").ids_NF
    assert test_NF.shape == (7, len(FIELDS) + 1 + 2)

    def values(field: str) -> list[list[str | None]]:
        indices = [i for i, column in enumerate(columns) if encoder.id_columns[column] == field]
        known = (None, *encoder.vocabularies[field].values)
        return [[known[i] for i in row if i != -1] for row in test_NF[:, indices].tolist()]

    # train's valid rows are carved by their group: what only they have is unknown
    trained = set(encoder.vocabularies["150_14"].values)
    u1, u2 = (["7"], ["8", "7"])
    expected = [u1, u1, u2, u2, [None], [None], [None]]
    assert values("150_14") == [[v if v in trained else None for v in row] for row in expected]
    assert values("210")[1:] == [[None]] * 6
    assert values("210")[0] in (["5", "6"], [None, None])
    assert values("110_14")[2] in (["1"], [None])  # the first alone


def test_a_bag_of_one_value_is_the_field_as_it_was(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    raw = write()
    manifest = prepared(raw, tmp_path / "plain")
    assert manifest.digest[:16] == "5cd30639cc0a9220"  # before there were bags
    assert manifest.bag_lengths == (1,) * len(FIELDS)
    one = with_bags(raw, tmp_path / "one", dict.fromkeys(MULTI_VALUED, 1))
    assert one.digest == manifest.digest
    for name, bags in (("two", {"210": 2}), ("three", {"210": 3})):
        assert with_bags(raw, tmp_path / name, bags).digest != manifest.digest


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ({"99": 2}, "--bag 99=2: no such field; known: 101, 121"),
        ({"210": 0}, "--bag 210=0: must be 1 to 1024 values"),
    ],
)
def test_bags_of_no_field_or_of_no_value_are_refused(
    write: Callable[..., Path], tmp_path: Path, bags: dict[str, int], message: str
) -> None:
    with pytest.raises(TableError, match=message):
        with_bags(write(), tmp_path / "out", bags)


def test_command_takes_lengths_by_field(write: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["prepare", "aliccp", "--input", str(write()), "--out", str(out), "--min-count", "1"]
    command += ["--valid-fraction", "0.3", "--bag", "all=2", "--bag", "110_14=3"]
    shown = CliRunner().invoke(data_app, command)
    assert shown.exit_code == 0, shown.output
    lengths = dict(zip(FIELDS, open_dataset(str(out)).manifest.bag_lengths, strict=True))
    assert {field: length for field, length in lengths.items() if length > 1} == {
        **dict.fromkeys(MULTI_VALUED, 2),
        "110_14": 3,
    }


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (["210"], "--bag 210: no FIELD=LENGTH; give a field and a number, as 210=5"),
        (["210=-1"], "--bag 210=-1: no FIELD=LENGTH; give a field and a number, as 210=5"),
        (["210=2", "210=3"], "--bag 210=3: 210 is given twice; give it once"),
    ],
)
def test_lengths_that_cannot_be_read_are_refused(
    tmp_path: Path, lengths: list[str], message: str
) -> None:
    options = [option for length in lengths for option in ("--bag", length)]
    command = ["prepare", "aliccp", "--input", str(tmp_path), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(data_app, [*command, *options])
    assert isinstance(shown.exception, TableError)
    assert str(shown.exception) == message


@pytest.mark.parametrize(
    "text",
    [
        *("205", "205\x021", "205\x021\x03", "\x021\x031", "205\x02\x031", "205\x031\x021"),
        *("205\x021\x031\x01", "\x01205\x021\x031", "205\x021\x032\x033"),
    ],
)
def test_a_feature_without_its_parts_is_refused(text: str) -> None:
    with pytest.raises(FeatureListError) as caught:
        field_ids(pa.array(["301\x021\x031", text, ""]), {})
    assert caught.value.index == 1
    assert "is not field \\x02 id \\x03 value" in caught.value.problem
