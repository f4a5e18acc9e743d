"""Do the rewrites keep the quality? Test CTR AUC of each form over several seeds.

    python benchmarks/quality.py [--seeds 5] [--epochs 2]

Plain and folded, in float32 and, where the CPU has it, bfloat16; compiled, and with sparse Adam, in
float32: each trained from the same seeds on the 200,000-impression synthetic set and evaluated on
its test split. The embedding is wide enough for folding to be chosen. Beside the seed-to-seed
spread of the plain form stands the mean of the differences from it, seed by seed, with its 95%
interval (t), which sees much smaller ones. The last line is one line of JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from run_header import run_header
from step_profile import precisions_of

from datasets import open_dataset
from datasets.sources.synthetic import synthesize
from trainables import (
    DeviceImpressions,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    inputs_of,
)
from trainables.metrics import evaluate
from trainables.training import predict_logits, train
from tuner.evidence import compare

IMPRESSIONS = 200_000
MODEL_SETTINGS = {
    "embedding_dim": 64,
    "num_experts": 4,
    "expert_units": (64, 32),
    "gate_units": (),
    "tower_units": (32,),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain float32": {"folding": "off", "precision": "float32"},
    "folded float32": {"folding": "on", "precision": "float32"},
    "plain bfloat16": {"folding": "off", "precision": "bfloat16"},
    "folded bfloat16": {"folding": "on", "precision": "bfloat16"},
    "compiled float32": {"folding": "off", "precision": "float32", "compile": True},
    "sparse float32": {
        "folding": "off",
        "precision": "float32",
        "embedding_optimizer": "sparse",
    },
}


def main() -> None:
    """Train every form from every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: a spread needs at least 2")
    torch.set_num_threads(arguments.threads)
    header = run_header(0, "torch", threads=arguments.threads)
    workers = Workers(device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "demo")
        synthesize(out=path, impressions=IMPRESSIONS, preset="demo", seed=0, accidental_clicks=0.3)
        dataset = open_dataset(path)
        splits = {
            name: DeviceImpressions.from_impressions(dataset.load(name), workers.device)
            for name in ("train", "test")
        }
    inputs = inputs_of(dataset)
    test = splits["test"]
    precisions = precisions_of(workers.device)
    forms = {form: options for form, options in FORMS.items() if options["precision"] in precisions}
    if len(forms) < len(FORMS):
        print("bfloat16 was not measured: the device has none")
    metrics: dict[str, dict[str, list[float]]] = {
        form: {"ctr_auc": [], "ctcvr_auc": []} for form in forms
    }
    for seed in range(arguments.seeds):
        for form, options in forms.items():
            training = TrainingSettings.model_validate(
                {"epochs": arguments.epochs, "batch_size": 512, "seed": seed, **options}
            )
            configuration = TrialConfiguration.create("mmoe", MODEL_SETTINGS, training=training)
            for _, model in train(
                configuration, inputs, splits["train"], test.rows(slice(1)), workers
            ):
                trained = model
            logits_NT = predict_logits(trained, test, workers)
            values = evaluate(logits_NT, test.clicks_N, test.conversions_N)
            for name, found in metrics[form].items():
                value = values[name]
                assert value is not None
                found.append(value)
        print(
            f"seed {seed}: " + ", ".join(f"{f} {m['ctr_auc'][-1]:.5f}" for f, m in metrics.items()),
            flush=True,
        )
    print(json.dumps({**summary(metrics), **header}))


def summary(metrics: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Print the table of means and standard deviations over seeds; return its figures."""
    figures: dict[str, Any] = {}
    for name in ("ctr_auc", "ctcvr_auc"):
        plain = metrics["plain float32"][name]
        for form, found in metrics.items():
            compared = compare(plain, found[name])
            print(
                f"{name:>9} {form:<16} mean {compared.winner:.5f} +- {compared.winner_sd:.5f}, "
                f"difference {compared.difference:+.5f} ({compared.low:+.5f} to "
                f"{compared.high:+.5f}), spread of plain float32 {compared.baseline_sd:.5f}"
            )
            figures.setdefault(form, {})[name] = {
                "mean": compared.winner,
                "stdev": compared.winner_sd,
                "difference": compared.difference,
                "interval": (compared.low, compared.high),
                "within_spread": abs(compared.difference) <= compared.baseline_sd,
            }
    return figures


if __name__ == "__main__":
    main()
