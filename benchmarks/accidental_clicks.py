"""Do accidental clicks make PWiseR worth while, and where does the best alpha move?

    python benchmarks/accidental_clicks.py [--impressions 200000] [--seeds 3] [--figure FILE.svg]

MMoE on synthetic funnels of which 0, 10, 30 and 50% of the clicks are accidents, at each alpha of a
grid from the same seeds, with both gates, as two jobs of `pwiser tune` without pruning. Printed is
the CTR and CTCVR AUC on valid at each alpha as the difference to BCE (alpha 0), paired by seed:
mean and standard deviation. The ceiling is the AUC of the true probabilities that the labels were
drawn with. The last line is one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
import torch
import yaml
from mlflow.tracking import MlflowClient
from run_header import run_header

from datasets import open_dataset
from datasets.sources.synthetic import synthesize
from trainables.metrics import auc
from tuner.results import find_experiment, search_all

SHARES = (0.0, 0.1, 0.3, 0.5)
ALPHAS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
GATES = ("hinge", "literal")
METRICS = ("ctr_auc", "ctcvr_auc")
SETTINGS = {
    "models": ["mmoe"],
    "training": {
        "epochs": 4,
        "evaluate_every": 0.5,
        "batch_size": 512,
        "learning_rate": 3e-3,
    },
    "model": {
        "embedding_dim": 16,
        "num_experts": 4,
        "expert_units": [64, 32],
        "gate_units": [],
        "tower_units": [32],
    },
}

Table = dict[float, dict[float, dict[int, dict[str, float]]]]
"""Metrics by share, alpha and seed."""


def main() -> None:
    """Make the datasets, run a job per gate, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impressions", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: one seed shows no spread; give at least 2")
    header = run_header(0, "torch", "ray", impressions=arguments.impressions)
    tables, ceilings = {}, {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for share in SHARES:
            out = directory / dataset_name(share)
            synthesize(out=out, impressions=arguments.impressions, seed=0, accidental_clicks=share)
            ceilings[share] = ceiling(out)
        for gate in GATES:
            tables[gate] = run(directory, gate, arguments.seeds)
            show(gate, tables[gate], ceilings)
    if arguments.figure is not None:
        draw(tables, arguments.figure)
    found = {
        gate: {
            metric: {share: differences(table[share], metric) for share in SHARES}
            for metric in METRICS
        }
        for gate, table in tables.items()
    }
    print(json.dumps(header | {"ceiling": ceilings, "minus_bce": found}))


def dataset_name(share: float) -> str:
    """Name the dataset with a share of accidental clicks."""
    return f"accidental-{share:.0%}".rstrip("%")


def ceiling(prepared: Path) -> dict[str, float]:
    """AUC of the true probabilities on valid."""
    truth = pq.read_table(prepared / "truth" / "valid")
    valid = open_dataset(prepared).load("valid")
    conversions = torch.from_numpy(valid.conversions_N).double()
    clicks = torch.from_numpy(valid.clicks_N).double()
    click = torch.from_numpy(truth["p_click"].to_numpy())
    conversion = torch.from_numpy(truth["p_conversion"].to_numpy())
    found = {"ctr_auc": auc(click, clicks), "ctcvr_auc": auc(conversion, conversions)}
    return {metric: value for metric, value in found.items() if value is not None}


def run(directory: Path, gate: str, num_seeds: int) -> Table:
    """Run the job of one gate; give the best evaluation of every trial."""
    name = f"alpha-{gate}"
    space = {
        "loss.alpha": {"values": list(ALPHAS)},
        "training.seed": {"values": list(range(num_seeds))},
    }
    search = {"sampler": "grid", "pruner": "none", "replicates": 0, "space": space}
    job = {
        "name": name,
        "datasets": [str(directory / dataset_name(share)) for share in SHARES],
        "search": search,
        "loss": {"gate": gate},
        "storage": str(directory / "storage"),
        "tracking": {"uri": f"sqlite:///{directory / 'mlflow.db'}"},
        **SETTINGS,
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    subprocess.run(
        [sys.executable, "-m", "tuner", "tune", str(path)], check=True, stdout=sys.stderr
    )
    client = MlflowClient(job["tracking"]["uri"])  # type: ignore[index]
    shares = {dataset_name(share): share for share in SHARES}
    table: Table = {share: defaultdict(dict) for share in SHARES}
    for found in search_all(client, find_experiment(client, name).experiment_id, "trial"):
        configuration = json.loads(found.data.tags["pwiser.configuration"])
        alpha, seed = configuration["loss"]["alpha"], configuration["training"]["seed"]
        metrics = {metric: found.data.metrics[f"best/{metric}"] for metric in METRICS}
        table[shares[found.data.tags["pwiser.dataset"]]][alpha][seed] = metrics
    return table


def differences(
    of_share: dict[float, dict[int, dict[str, float]]], metric: str
) -> dict[float, Any]:
    """Mean and standard deviation of each alpha's difference to alpha 0, seed by seed."""
    baseline = of_share[0.0]
    found = {}
    for alpha in ALPHAS[1:]:
        values = [of_share[alpha][seed][metric] - baseline[seed][metric] for seed in baseline]
        found[alpha] = (statistics.mean(values), statistics.stdev(values))
    return found


def show(gate: str, table: Table, ceilings: dict[float, dict[str, float]]) -> None:
    """Print a Markdown table per metric."""
    for metric in METRICS:
        print(f"\n{gate} gate, {metric} on valid\n")
        print("| alpha |", " | ".join(f"{share:.0%} accidents" for share in SHARES), "|")
        print("|---" * (len(SHARES) + 1) + "|")
        means = [
            statistics.mean(one[metric] for one in table[share][0.0].values()) for share in SHARES
        ]
        print("| 0 (BCE) |", " | ".join(f"{mean:.4f}" for mean in means), "|")
        columns = [differences(table[share], metric) for share in SHARES]
        for alpha in ALPHAS[1:]:
            cells = [f"{mean:+.4f} ± {spread:.4f}" for mean, spread in (c[alpha] for c in columns)]
            print(f"| {alpha:g} |", " | ".join(cells), "|")
        print("| ceiling |", " | ".join(f"{ceilings[s][metric]:.4f}" for s in SHARES), "|")


def draw(tables: dict[str, Table], path: Path) -> None:
    """Draw the differences over alpha, a panel per gate and metric."""
    figure, panels = plt.subplots(
        len(METRICS), len(GATES), figsize=(9, 6), sharex=True, sharey="row", layout="constrained"
    )
    for row, metric in zip(panels, METRICS, strict=True):
        for panel, gate in zip(row, GATES, strict=True):
            for share in SHARES:
                found = differences(tables[gate][share], metric)
                means, spreads = zip(*found.values(), strict=True)
                panel.errorbar(
                    list(found),
                    means,
                    spreads,
                    marker="o",
                    capsize=3,
                    label=f"{share:.0%} accidents",
                )
            panel.axhline(0.0, color="grey", linewidth=1)
            panel.set(xscale="log", xlabel="alpha", title=f"{gate} gate")
        row[0].set_ylabel(f"{metric} minus BCE's")
    panels[0][0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
