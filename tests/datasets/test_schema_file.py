from pathlib import Path

import pytest

from datasets import SchemaError, TableError, read_schema
from datasets.schema import NumericalField, Schema, SplitFractions

MINIMAL = "labels: {click: c, conversion: v}\n"


def schema_of(tmp_path: Path, text: str) -> Schema:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return read_schema(path)


def test_lists_and_mappings_name_fields_and_defaults_hold(tmp_path: Path) -> None:
    schema = schema_of(
        tmp_path,
        MINIMAL
        + "categorical: {zip: {min_count: 5}, city: }\nnumerical: [age]\ndrop: [spend]\n"
        + "group: user\nmin_count: 2\n",
    )
    assert schema.columns == ("c", "v", "zip", "city", "age", "spend", "user")
    assert (schema.min_count_of("zip"), schema.min_count_of("city")) == (5, 2)
    assert schema.numerical == {"age": NumericalField(normalize="standard", fill=None)}
    assert schema.split == SplitFractions(valid=0.1, test=0.1, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", r"s\.yaml: line 2: not YAML \(.*\); mend that line"),
        ("", "holds no keys; write labels, categorical and numerical"),
        ("- a\n", "holds no keys"),
        ("drop: [a]\ndrop: [b]\n", "line 2: not YAML .key 'drop' is there twice."),
        ("categorical: [a]\n", "labels: missing; add it .known keys here: labels, categorical"),
        ("labels: {click: c}\n", "labels.conversion: missing; add it .*click, conversion"),
        (MINIMAL, "no feature; list columns under categorical or numerical"),
        (
            MINIMAL + "categoricals: [a]\n",
            "unknown key 'categoricals'; known: labels, categorical, numerical, numerical_type, "
            "drop, group, min_count, split",
        ),
        (
            MINIMAL + "numerical: {a: {normalise: log}}\n",
            "numerical.a: unknown key 'normalise'; known: normalize, fill",
        ),
        (MINIMAL + "numerical: {a: {normalize: ln}}\n", "numerical.a.normalize: 'ln' is wrong"),
        (MINIMAL + "numerical: {a: {fill: mean}}\n", "numerical.a.fill: 'mean' is wrong"),
        (MINIMAL + "numerical: {a: {fill: .inf}}\n", "numerical.a.fill: must be a finite 32-bit"),
        (MINIMAL + "numerical: {a: {fill: 1.0e+39}}\n", "fill: must be a finite 32-bit number"),
        (MINIMAL + "categorical: a\n", "categorical: 'a' is wrong; input should be a valid dict"),
        (MINIMAL + 'categorical: {"a\\n b": false}\n', "categorical.a b: False is wrong; input"),
        (MINIMAL + "categorical: [109_14]\n", "column 10914 is read as int, .*put it in quotes"),
        (MINIMAL + "categorical: [on]\n", "column True is read as bool, .*put it in quotes"),
        (
            MINIMAL + "drop: [2024-02-30]\n",
            "line 2: not YAML .'2024-02-30' is no timestamp that can be read; text",
        ),
        ("[" * 2_000, "not YAML .it is nested too deeply"),
        (MINIMAL + "categorical: [a, a]\n", "column 'a' is listed twice; list it once"),
        (MINIMAL + "categorical: [a, c]\n", "column 'c' has more than one role; leave it under"),
        (MINIMAL + "categorical: [a]\ngroup: a\n", "column 'a' has more than one role"),
        (MINIMAL + "categorical: [click]\n", "feature 'click' has the name of a prepared"),
        (
            MINIMAL + "categorical: {a: {max_values: 0}}\n",
            "categorical.a.max_values: 0 is wrong; .*greater than or equal to 1",
        ),
        (
            MINIMAL + "categorical: {a: {separator: ;}}\n",
            "categorical.a: separator ';' without max_values; add max_values: how many",
        ),
        (
            MINIMAL + "categorical: {a: {max_values: 2}, 'a[1]': {}}\n",
            r"feature 'a\[1\]' has the name of a place in the bag 'a'; rename the column",
        ),
        (
            MINIMAL + "categorical: {a: {max_values: 2}}\nnumerical: ['a[0]']\n",
            r"feature 'a\[0\]' has the name of a place in the bag 'a'; rename the column",
        ),
        (
            MINIMAL + "numerical: [a]\nnumerical_type: half\n",
            "numerical_type: 'half' is wrong; input should be 'float32' or 'float16'",
        ),
        (MINIMAL + "categorical: [a]\nmin_count: 0\n", "min_count: 0 is wrong; .*greater than or"),
        (
            MINIMAL + "categorical: [a]\nsplit: {valid: 0.5, test: 0.5}\n",
            "split: valid and test together must stay below 1",
        ),
        (
            MINIMAL + "categorical: [a]\nsplit: {valid: -1}\n",
            "split.valid: -1 is wrong; .*greater than or equal to 0",
        ),
        (
            MINIMAL + "categorical: [a]\nsplit: {fraction: 1}\n",
            "split: unknown key 'fraction'; known: valid, test, seed",
        ),
    ],
)
def test_faulty_schema_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message) as fault:
        schema_of(tmp_path, text)
    assert str(fault.value).startswith(str(tmp_path / "s.yaml"))
    assert "\n" not in str(fault.value)


def test_missing_and_undecodable_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"no\.yaml: cannot read the schema .*give a YAML file"):
        read_schema(tmp_path / "no.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(SchemaError, match="not UTF-8 text; save it as UTF-8"):
        read_schema(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["c", "v", "a", "a"], "f.csv: column 'a' is there twice; rename one of the two"),
        (["c", "a"], "f.csv: no column 'v', which the schema names; the file has 'c', 'a'"),
        (
            ["c", "v", "a", "leak", "id"],
            "f.csv: the schema does not name column 'leak', 'id'; "
            "list under categorical, numerical or drop",
        ),
    ],
)
def test_table_with_other_columns_is_refused(
    tmp_path: Path, columns: list[str], message: str
) -> None:
    schema = schema_of(tmp_path, MINIMAL + "categorical: [a]\n")
    with pytest.raises(TableError, match=message):
        schema.check_columns(columns, file="f.csv")


def test_dropped_column_may_be_absent(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, MINIMAL + "categorical: [a]\ndrop: [leak]\n")
    schema.check_columns(["a", "v", "c"], file="f.csv")
