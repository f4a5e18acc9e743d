"""A job's winner beside tables' usual models, on the same prepared dataset and split.

    python benchmarks/table_baseline.py data/hillstrom hillstrom

Reads the winner's test metrics from MLflow. Beside them: logistic regression (ids one-hot, the
numericals as the dataset normalises them) and gradient-boosted trees (ids as categories), each
trained on the train split for clicks and, where the splits hold conversions, a second time for
conversions over all impressions. Their settings are chosen by AUC on the valid split, as the
winner's were; the test split is scored once. Needs scikit-learn, one of the development packages.
The last line is one line of JSON; a value that cannot be computed is null.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from run_header import run_header

from datasets import Dataset, Impressions, PwiserError, open_dataset
from tuner.errors import JobNotFoundError
from tuner.results import DatasetResult, find_experiment, read_results
from tuner.tracking import connect
from tuner.tracking_store import existing_uri

try:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder
except ImportError:
    sys.exit("table_baseline: scikit-learn is not installed; pip install scikit-learn")

SEED = 0
PENALTIES = (0.003, 0.03, 0.3, 3.0)
"""Inverse strengths of the logistic regression's L2 penalty."""
LEAVES, TREES = (4, 8, 16), (50, 100, 200)
MAX_CATEGORIES = 255
"""Of the trees' categorical columns; a field with more ids enters as a number."""
METRICS = ("ctr_auc", "ctr_logloss", "ctcvr_auc")
HEADINGS = {"ctr_auc": "CTR AUC", "ctr_logloss": "CTR logloss", "ctcvr_auc": "CTCVR AUC"}
Metrics = dict[str, float | None]
Classifier = Any  # scikit-learn has no types
Matrix = npt.NDArray[Any]


def logistic_candidates(dataset: Dataset) -> dict[str, Classifier]:
    """Logistic regressions from strong to weak penalty."""
    sizes = list(dataset.manifest.vocabulary_sizes.values())
    columns = list(range(len(sizes)))
    encoder = OneHotEncoder(categories=[np.arange(size) for size in sizes])
    one_hot = ColumnTransformer([("ids", encoder, columns)], remainder="passthrough")
    return {
        f"C {penalty:g}": make_pipeline(one_hot, LogisticRegression(C=penalty, max_iter=2000))
        for penalty in PENALTIES
    }


def tree_candidates(dataset: Dataset) -> dict[str, Classifier]:
    """Gradient-boosted trees, from few and small to many and large ones."""
    sizes = dataset.manifest.vocabulary_sizes.values()
    categorical = [index for index, size in enumerate(sizes) if size <= MAX_CATEGORIES]
    return {
        f"{trees} trees of {leaves} leaves": HistGradientBoostingClassifier(
            learning_rate=0.05,
            max_iter=trees,
            max_leaf_nodes=leaves,
            early_stopping=False,
            categorical_features=categorical,
            random_state=SEED,
        )
        for leaves in LEAVES
        for trees in TREES
    }


def features(split: Impressions) -> Matrix:
    """Ids and normalised numericals side by side."""
    return np.hstack([split.ids_NF.astype(np.float64), split.numericals_ND])


def auc(labels_N: npt.NDArray[np.uint8], scores_N: npt.NDArray[np.float64]) -> float | None:
    """Area under the ROC curve; None where one class alone is there."""
    return float(roc_auc_score(labels_N, scores_N)) if 0 < labels_N.sum() < len(labels_N) else None


def fit_best(
    candidates: Mapping[str, Classifier],
    splits: Mapping[str, Impressions],
    label: Literal["clicks_N", "conversions_N"],
) -> tuple[str, dict[str, npt.NDArray[np.float64]]] | None:
    """Fit every candidate on train; return the best on valid, and its probabilities by split.

    Ties go to the earlier candidate. None if a label is constant on train or on valid.
    """
    labels = {name: getattr(split, label) for name, split in splits.items()}
    if any(len(np.unique(labels[name])) < 2 for name in ("train", "valid")):
        return None
    matrices = {name: features(split) for name, split in splits.items()}
    best: tuple[float, str, Classifier] | None = None
    for settings, model in candidates.items():
        model.fit(matrices["train"], labels["train"])
        score = auc(labels["valid"], model.predict_proba(matrices["valid"])[:, 1])
        if score is not None and (best is None or score > best[0]):
            best = (score, settings, model)
    if best is None:
        return None
    _, settings, model = best
    return settings, {name: model.predict_proba(matrices[name])[:, 1] for name in ("valid", "test")}


def evaluate(
    candidates: Mapping[str, Classifier], splits: Mapping[str, Impressions]
) -> tuple[str, dict[str, Metrics]]:
    """Choose and score one kind of model; return its settings in words and metrics by split."""
    by_click = fit_best(candidates, splits, "clicks_N")
    by_conversion = fit_best(candidates, splits, "conversions_N")
    metrics: dict[str, Metrics] = {}
    for name in ("valid", "test"):
        found: Metrics = dict.fromkeys(METRICS)
        if by_click is not None:
            clicks_N, chances_N = splits[name].clicks_N, by_click[1][name]
            found["ctr_auc"] = auc(clicks_N, chances_N)
            found["ctr_logloss"] = float(log_loss(clicks_N, chances_N, labels=[0, 1]))
        if by_conversion is not None:
            found["ctcvr_auc"] = auc(splits[name].conversions_N, by_conversion[1][name])
        metrics[name] = found
    chosen = [
        f"{label}: {fitted[0]}"
        for label, fitted in (("clicks", by_click), ("conversions", by_conversion))
        if fitted is not None
    ]
    return ", ".join(chosen) or "one class only", metrics


def find_winner(dataset: Dataset, job: str, tracking: str | None) -> DatasetResult:
    """Read a job's winner on a dataset.

    Raises:
        JobNotFoundError: if the job is unknown, has no winner yet, or did not use this dataset.
    """
    client = connect(existing_uri(tracking))
    results = read_results(client, find_experiment(client, job))
    if dataset.name not in results.datasets:
        raise JobNotFoundError(
            f"job {job!r}: has no winner on {dataset.name!r}; "
            f"its datasets are {', '.join(results.datasets)}"
        )
    winner = results.datasets[dataset.name]
    digest = client.get_run(winner.run_id).data.tags.get("pwiser.dataset_digest")
    if digest != dataset.digest:
        raise JobNotFoundError(
            f"job {job!r}: was run on another {dataset.name!r} (digest {digest}) than "
            f"{dataset.uri} (digest {dataset.digest}); name the dataset that it was run on"
        )
    return winner


def print_table(rows: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> None:
    """Print the metrics of every model side by side, split by split."""
    print(f"{'split':<6} {'model':<24}" + "".join(f"{HEADINGS[name]:>13}" for name in METRICS))
    for split in ("valid", "test"):
        for model, metrics in rows.items():
            values = (metrics[split][name] for name in METRICS)
            cells = "".join(f"{'-' if value is None else f'{value:.4f}':>13}" for value in values)
            print(f"{split:<6} {model:<24}{cells}")


def compare(directory: str, job: str, tracking: str | None) -> dict[str, Any]:
    """Print the comparison; return the figures of the last line.

    Raises:
        PwiserError: if the dataset, the job or its winner is not there.
    """
    dataset = open_dataset(directory)
    winner = find_winner(dataset, job, tracking)
    splits = {name: dataset.load(name) for name in ("train", "valid", "test")}
    logistic_settings, logistic = evaluate(logistic_candidates(dataset), splits)
    tree_settings, trees = evaluate(tree_candidates(dataset), splits)
    run = run_header(SEED, "scikit-learn", job=job, dataset=dataset.name, digest=dataset.digest)
    alpha, m1, m2 = (winner.config["loss"][name] for name in ("alpha", "m1", "m2"))
    print(f"winner: {winner.model}, alpha {alpha:.4g}, m1 {m1:.3g}, m2 {m2:.3g}")
    print(f"logistic regression: {logistic_settings}")
    print(f"gradient-boosted trees: {tree_settings}")
    print_table(
        {
            f"winner ({winner.model})": winner.metrics,
            "its baseline (BCE)": winner.baseline.metrics,
            "logistic regression": logistic,
            "gradient-boosted trees": trees,
        }
    )
    rows = {
        "winner": winner.metrics,
        "baseline": winner.baseline.metrics,
        "logistic": logistic,
        "trees": trees,
    }
    figures = {
        f"{model}_{name}": metrics["test"][name]
        for model, metrics in rows.items()
        for name in METRICS
    }
    valid = {
        f"{model}_valid_ctr_auc": metrics["valid"]["ctr_auc"] for model, metrics in rows.items()
    }
    return {**figures, **valid, "winner_model": winner.model, **run}


def main() -> int:
    """Parse, compare, print; 2 for a dataset or job that is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", metavar="DATASET_DIR", help="the prepared dataset")
    parser.add_argument("job", metavar="JOB_NAME", help="the name in the job file")
    parser.add_argument("--tracking", metavar="URI", help="the store; as for pwiser best")
    arguments = parser.parse_args()
    try:
        figures = compare(arguments.dataset, arguments.job, arguments.tracking)
    except PwiserError as error:
        print(f"table_baseline: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
