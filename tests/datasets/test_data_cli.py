import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from datasets import (
    CONVERSION_POLICIES,
    COUNTRIES,
    PRESETS,
    OutputExistsError,
    TableError,
    open_dataset,
)
from datasets.schema import NumericalType
from tuner.cli.data import Country, NumericalChoice, OrphanChoice, PresetName, data_app

REPOSITORY = Path(__file__).parents[2]


def pwiser_data(*arguments: object) -> Result:
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments])


def test_choices_are_those_of_the_library() -> None:
    assert tuple(PresetName) == tuple(PRESETS)
    assert tuple(Country) == COUNTRIES
    assert tuple(NumericalChoice) == get_args(NumericalType)
    assert tuple(choice.policy for choice in OrphanChoice) == CONVERSION_POLICIES


def test_synth_makes_a_dataset_and_stats_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    made = pwiser_data(
        *("synth", "--out", out, "--preset", "demo", "--impressions", 20_000),
        *("--seed", 3, "--accidental-clicks", 0.2),
    )
    assert made.exit_code == 0, made.output
    digest = open_dataset(str(out)).digest
    assert made.stdout.startswith(f"prepared {out}: train 16,")
    assert made.stdout.endswith(f"rows; digest {digest[:12]}\n")
    shown = pwiser_data("stats", out, "--json")
    content = json.loads(shown.stdout)
    assert (content["dataset"], content["digest"]) == ("demo", digest)
    assert list(content["splits"]) == ["train", "valid", "test"]
    assert content["all"]["impressions"] == 20_000
    train = content["splits"]["train"]
    assert list(train) == ["impressions", "clicks", "conversions", "ctr", "cvr", "ctcvr"]
    assert train["ctr"] == train["clicks"] / train["impressions"]
    table = pwiser_data("stats", out).stdout
    assert f"{train['impressions']:,}" in table
    assert f"{train['ctr']:.3%}" in table
    assert all(heading in table for heading in ("CTR", "CVR", "CTCVR", "valid", "test"))


def test_prepare_table_prints_what_was_dropped_and_filled(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> None:
    frame.loc[4, ["clicked", "bought"]] = 0, 1
    frame.loc[[6, 7], "price"] = None
    schema_file.write_text(schema_file.read_text().replace("price: {}", "price: {fill: 0}"))
    path = write_csv(frame)
    arguments = ("prepare", "table", "--input", path, "--schema", schema_file)
    refused = pwiser_data(*arguments, "--out", tmp_path / "refused")
    assert isinstance(refused.exception, TableError)
    assert not (tmp_path / "refused").exists()
    choice = "--conversion-without-click"
    dropped = pwiser_data(*arguments, "--out", tmp_path / "dropped", choice, "drop")
    assert "dropped 1 rows with a conversion without a click\n" in dropped.stdout
    assert "filled 2 empty, NaN or infinite cells in 1 fields\n" in dropped.stdout
    clicked = pwiser_data(*arguments, "--out", tmp_path / "clicked", choice, "as-click")
    assert "added 1 clicks to conversions without one\n" in clicked.stdout
    again = pwiser_data(*arguments, "--out", tmp_path / "clicked", choice, "as-click")
    assert isinstance(again.exception, OutputExistsError)


def test_prepare_table_takes_files_for_the_splits(
    tmp_path: Path, schema_file: Path, frame: pd.DataFrame, write_csv: Callable[..., Path]
) -> None:
    made = pwiser_data(
        *("prepare", "table", "--input", write_csv(frame), "--schema", schema_file),
        *("--valid", write_csv(frame[:10], "v.csv"), "--test", write_csv(frame[:20], "t.csv")),
        *("--out", tmp_path / "out"),
    )
    assert "train 300, valid 10, test 20 rows" in made.stdout


def test_prepare_aliexpress_takes_fraction_and_seed(shared_data: Path, tmp_path: Path) -> None:
    made = pwiser_data(
        *("prepare", "aliexpress", "--input", shared_data / "fuxictr-tiny-mtl"),
        *("--out", tmp_path / "out", "--valid-fraction", 0.3, "--split-seed", 2),
    )
    assert made.exit_code == 0, made.output
    split = open_dataset(str(tmp_path / "out")).manifest.table.split
    assert (split.valid, split.seed) == (0.3, 2)


@pytest.mark.parametrize(
    "command",
    [
        *(["synth"], ["stats"], ["validate"]),
        *(["prepare", "table"], ["prepare", "aliexpress"], ["prepare", "aliccp"]),
    ],
)
def test_help_has_an_example(command: list[str]) -> None:
    shown = pwiser_data(*command, "--help")
    assert f"Example: pwiser data {' '.join(command)}" in shown.stdout


def test_unknown_preset_and_negative_seed_are_refused() -> None:
    for option in (("--preset", "uk"), ("--seed", -1)):
        refused = pwiser_data("synth", "--out", "x", "--impressions", 10, *option)
        assert refused.exit_code == 2


def test_raw_files_are_read_by_their_commands(tmp_path: Path) -> None:
    for kind in ("aliexpress", "aliccp"):
        subprocess.run(
            [
                *(sys.executable, REPOSITORY / "benchmarks" / "raw_files.py", kind),
                *("--out", tmp_path / kind, "--impressions", "1000"),
            ],
            check=True,
            capture_output=True,
        )
    out = tmp_path / "out"
    raw = ("--input", tmp_path / "aliexpress", "--out", out / "nl", "--raw", "--country", "nl")
    made = pwiser_data("prepare", "aliexpress", *raw)
    assert made.exit_code == 0, made.output
    assert "test 100 rows; digest" in made.stdout
    made = pwiser_data(
        *("prepare", "aliccp", "--input", tmp_path / "aliccp", "--out", out / "ccp"),
        *("--min-count", 2, "--valid-fraction", 0.2),
    )
    assert made.exit_code == 0, made.output
    assert "test 100 rows; digest" in made.stdout
    assert sorted(path.name for path in out.iterdir()) == ["ccp", "nl"]


@pytest.mark.parametrize("options", [["--raw"], ["--country", "nl"]])
def test_raw_and_country_come_together(tmp_path: Path, options: list[str]) -> None:
    refused = pwiser_data(
        "prepare", "aliexpress", "--input", tmp_path, "--out", tmp_path / "o", *options
    )
    assert isinstance(refused.exception, TableError)
    assert "--raw and --country: give both" in str(refused.exception)
