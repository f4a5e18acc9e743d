from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from datasets import PRESETS, Impressions, TableError, open_dataset, synthesize
from datasets.sources.synthetic import SyntheticRows

SPLITS = ("train", "valid", "test")


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def make(tmp_path: Path, name: str, **options: object) -> str:
    synthesize(out=tmp_path / name, **{"impressions": 20_000, **options})  # type: ignore[arg-type]
    return str(tmp_path / name)


def truth_of(uri: str, split: str, column: str) -> np.ndarray:
    return pq.read_table(Path(uri) / "truth" / split)[column].to_numpy()


def overall(uri: str, column: str) -> float:
    return float(np.concatenate([truth_of(uri, split, column) for split in SPLITS]).mean())


@pytest.mark.parametrize("preset", PRESETS)
def test_expected_rates_are_those_of_the_preset(tmp_path: Path, preset: str) -> None:
    uri = make(tmp_path, preset, impressions=120_000, preset=preset)
    assert overall(uri, "p_click_true") == pytest.approx(PRESETS[preset].ctr, rel=0.05)
    assert overall(uri, "p_conversion") == pytest.approx(PRESETS[preset].ctcvr, rel=0.08)
    clicks = sum(split.clicks for split in open_dataset(uri).manifest.splits.values())
    assert clicks == pytest.approx(PRESETS[preset].ctr * 120_000, rel=0.1)


def test_accidental_clicks_are_the_given_share_and_change_nothing_else(tmp_path: Path) -> None:
    plain = make(tmp_path, "plain", impressions=100_000)
    mixed = make(tmp_path, "mixed", impressions=100_000, accidental_clicks=0.3)
    share = 1 - overall(mixed, "p_click_true") / overall(mixed, "p_click")
    assert share == pytest.approx(0.3, abs=0.01)
    assert overall(mixed, "p_click_true") == overall(plain, "p_click_true")
    for split in SPLITS:
        before, after = open_dataset(plain).load(split), open_dataset(mixed).load(split)
        np.testing.assert_array_equal(before.ids_NF, after.ids_NF)
        np.testing.assert_array_equal(before.numericals_ND, after.numericals_ND)
        np.testing.assert_array_equal(before.conversions_N, after.conversions_N)
        assert (after.clicks_N >= before.clicks_N).all()
        accidental_N = after.clicks_N > before.clicks_N
        assert accidental_N.sum() / after.clicks_N.sum() == pytest.approx(0.3, abs=0.03)
        assert not after.conversions_N[accidental_N].any()
        # independent of relevance: as relevant, on average, as all that was not clicked before
        relevance_N = truth_of(mixed, split, "p_click_true")
        rest = relevance_N[before.clicks_N == 0].mean()
        assert relevance_N[accidental_N].mean() == pytest.approx(rest, rel=0.2)


def test_same_seed_gives_the_same_dataset_and_another_seed_another(tmp_path: Path) -> None:
    digests = [
        open_dataset(make(tmp_path, name, seed=seed)).digest
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_row_does_not_depend_on_how_many_follow() -> None:
    def rows(num_impressions: int) -> list[dict[str, object]]:
        source = SyntheticRows(
            PRESETS["demo"], num_impressions=num_impressions, seed=1, accidental_clicks=0.1
        )
        batches = list(source.batches())
        assert sum(batch.rows.num_rows for batch in batches) == num_impressions
        assert max(batch.rows.num_rows for batch in batches) <= 32_768
        return [batch.rows.slice(0, 200).to_pylist() for batch in batches][-1]

    assert rows(32_768 + 200) == rows(2 * 32_768)


def test_sessions_have_ten_to_forty_rows_and_stay_in_one_split(tmp_path: Path) -> None:
    source = SyntheticRows(PRESETS["demo"], num_impressions=65_536, seed=0, accidental_clicks=0)
    searches = np.concatenate([batch.rows["search_id"].to_numpy() for batch in source.batches()])
    lengths = np.unique(searches, return_counts=True)[1]
    assert lengths.max() <= 40
    assert (lengths < 10).sum() <= 2  # the last of each chunk is cut
    splits = open_dataset(make(tmp_path, "x", impressions=65_536)).manifest.splits
    assert splits["valid"].impressions / 65_536 == pytest.approx(0.1, abs=0.02)
    assert splits["test"].impressions / 65_536 == pytest.approx(0.1, abs=0.02)


def test_truth_lies_row_by_row_beside_the_data(tmp_path: Path) -> None:
    uri = make(tmp_path, "x", impressions=60_000)
    for split in SPLITS:
        impressions = open_dataset(uri).load(split)
        p_click_N, p_conversion_N = (
            truth_of(uri, split, column) for column in ("p_click", "p_conversion")
        )
        assert roc_auc_score(impressions.clicks_N, p_click_N) > 0.85
        assert roc_auc_score(impressions.conversions_N, p_conversion_N) > 0.9


def test_linear_model_learns_less_than_trees_and_trees_less_than_the_truth(tmp_path: Path) -> None:
    uri = make(tmp_path, "x", impressions=60_000)
    dataset = open_dataset(uri)
    train, test = dataset.load("train"), dataset.load("test")

    def inputs(rows: Impressions) -> np.ndarray:
        return np.hstack([rows.ids_NF, rows.numericals_ND])

    linear = LogisticRegression(max_iter=200).fit(train.numericals_ND, train.clicks_N)
    trees = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    trees.fit(inputs(train), train.clicks_N)
    scores = [
        linear.predict_proba(test.numericals_ND)[:, 1],
        trees.predict_proba(inputs(test))[:, 1],
        truth_of(uri, "test", "p_click"),
    ]
    by_linear, by_trees, by_truth = (roc_auc_score(test.clicks_N, score) for score in scores)
    assert 0.65 < by_linear < by_trees - 0.03
    assert 0.78 < by_trees < by_truth - 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "uk"}, "--preset uk: unknown; known: demo, fr, nl, us, ccp"),
        ({"impressions": 0}, "--impressions 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"accidental_clicks": 1.0}, "--accidental-clicks 1: must be from 0 to 0.9"),
        ({"accidental_clicks": -0.1}, "--accidental-clicks -0.1: must be from 0 to 0.9"),
        ({"accidental_clicks": float("nan")}, "--accidental-clicks nan: must be from 0 to 0.9"),
        ({"impressions": 5}, "synthetic rows: no row falls into the valid split"),
    ],
)
def test_argument_out_of_range_is_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(TableError, match=message):
        make(tmp_path, "x", **options)
    assert names_in(tmp_path) == []
