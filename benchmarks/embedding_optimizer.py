"""Dense or sparse Adam for embedding tables: where sparse is quicker, and what it does to quality.

    python benchmarks/embedding_optimizer.py [--only speed|quality] [--seeds 5] [--threads 1]

Speed: lookup, gradient and update of tables of growing size, dense, sparse and by torch's
SparseAdam in turns. Dense and sparse meet where ``training.embedding_optimizer: auto`` should go
over.

Quality: synthetic funnels whose users and items have ids of their own, some seen often and most a
few times, as in Ali-CCP: one of 200,000, and one whose table is as small as those for which
``auto`` still chooses sparse Adam. MMoE is trained from the same seeds with either, and tested as a
trial is: at its best evaluation on valid. The last line is one line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import quality
import torch
from run_header import run_header

from datasets import Schema, open_dataset, prepare_table
from trainables import (
    DeviceImpressions,
    Inputs,
    TrainingSettings,
    TrialConfiguration,
    Workers,
    inputs_of,
)
from trainables.execution import keep_freed_memory
from trainables.metrics import evaluate
from trainables.models.embedding import FeatureEmbedding
from trainables.optimizers import SPARSE_MIN_ROWS_PER_LOOKUP, Optimizers, make_optimizers
from trainables.training import predict_logits, train

CHOICES = ("dense", "sparse")
TORCHS = "torch_sparse"

FIELDS = 16
BATCH = 2048
SIZES = {
    8: (100_000, 200_000, 400_000, 1_000_000),
    16: (100_000, 200_000, 400_000, 1_000_000),
    40: (100_000, 200_000, 400_000, 1_000_000),
    128: (50_000, 100_000, 200_000, 400_000),
}
"""Rows of the table by the embedding's width."""
STEPS = 8
ROUNDS = 3

FUNNELS = ((150_000, 50_000), (12_000, 2_000))
"""Users and items."""
IMPRESSIONS = 600_000
LATENTS = 4
MODEL_SETTINGS = quality.MODEL_SETTINGS | {"embedding_dim": 16}
TRAINING = {"epochs": 2, "batch_size": 512, "evaluate_every": 0.25, "precision": "float32"}


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as in a trial: dense gradients are large
    header = run_header(0, "torch", threads=arguments.threads)
    figures: dict[str, Any] = {}
    if arguments.only != "quality":
        figures["speed"] = measure_speed()
    if arguments.only != "speed":
        figures["quality"] = [measure_quality(*funnel, arguments.seeds) for funnel in FUNNELS]
    print(json.dumps({**figures, **header}))


def measure_speed() -> list[dict[str, float]]:
    """Time both optimisers over the sizes and print a table."""
    found = []
    lookups = FIELDS * BATCH
    for width, sizes in SIZES.items():
        for size in sizes:
            times: dict[str, list[float]] = {choice: [] for choice in (*CHOICES, TORCHS)}
            for _ in range(ROUNDS):
                for choice, found_ms in times.items():
                    found_ms.append(step_ms(size, width, choice))
            medians = {choice: statistics.median(values) for choice, values in times.items()}
            found.append(
                {"rows": size, "width": width, "per_lookup": size / lookups}
                | {f"{choice}_ms": median for choice, median in medians.items()}
            )
            shown = (
                f"{choice} {median:5.1f} ms ({spread(times[choice])})"
                for choice, median in medians.items()
            )
            print(
                f"E {width:>3}, {size:>9,} rows, {size / lookups:4.1f} per lookup: "
                f"{', '.join(shown)}, dense / sparse {medians['dense'] / medians['sparse']:.2f}",
                flush=True,
            )
    print(f"auto is sparse from {SPARSE_MIN_ROWS_PER_LOOKUP} rows per lookup on")
    return found


def step_ms(size: int, width: int, choice: str) -> float:
    """Return the median time of lookup, gradient and update, after two steps that are not timed."""
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(vocabulary_sizes=(size // FIELDS,) * FIELDS, num_numericals=0)
    embedding = FeatureEmbedding(inputs, width, "project")
    optimizers: Optimizers | torch.optim.Optimizer = make_optimizers(
        embedding,
        "dense" if choice == "dense" else "sparse",
        learning_rate=1e-3,
        weight_decay=1e-6,
        rows_per_step=BATCH,
    )
    if choice == TORCHS:
        optimizers = torch.optim.SparseAdam(embedding.parameters(), betas=(0.0, 0.999))
    gradient_BGE = torch.randn(BATCH, FIELDS, width, generator=generator)
    numericals_BN = torch.zeros(BATCH, 0)
    seconds = []
    for _ in range(STEPS + 2):
        share_BF = torch.rand(BATCH, FIELDS, generator=generator).square()
        ids_BF = (share_BF * (size // FIELDS)).to(torch.int32)
        started = time.perf_counter()
        vectors_BGE = embedding(ids_BF, numericals_BN)
        optimizers.zero_grad()
        vectors_BGE.backward(gradient_BGE)
        optimizers.step()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[2:])


def spread(values: list[float]) -> str:
    """Say what lies between the smallest and the largest."""
    return f"{min(values):.1f}-{max(values):.1f}"


def measure_quality(users: int, items: int, num_seeds: int) -> dict[str, Any]:
    """Train with either from the same seeds and print test metrics."""
    workers = Workers(device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as directory:
        dataset = open_dataset(make_dataset(Path(directory), users, items))
        train_split, valid, test = (
            DeviceImpressions.from_impressions(dataset.load(name), workers.device)
            for name in ("train", "valid", "test")
        )
    inputs = inputs_of(dataset)
    num_rows = sum(inputs.vocabulary_sizes)
    per_lookup = num_rows / (int(TRAINING["batch_size"]) * len(inputs.vocabulary_sizes))
    print(f"{num_rows:,} ids, {per_lookup:.0f} rows of the table per lookup of a step", flush=True)
    assert per_lookup > SPARSE_MIN_ROWS_PER_LOOKUP, "auto would choose dense"

    metrics: dict[str, dict[str, list[float]]] = {
        choice: {"ctr_auc": [], "ctcvr_auc": []} for choice in CHOICES
    }
    for seed in range(num_seeds):
        for choice in CHOICES:
            training = TrainingSettings.model_validate(
                {**TRAINING, "seed": seed, "embedding_optimizer": choice}
            )
            configuration = TrialConfiguration.create("mmoe", MODEL_SETTINGS, training=training)
            best, tested, epoch = -1.0, {}, 0.0
            for evaluation, model in train(configuration, inputs, train_split, valid, workers):
                value = statistics.mean(
                    evaluation.metrics[name] or 0.0 for name in ("ctr_auc", "ctcvr_auc")
                )
                if value > best:
                    logits_NT = predict_logits(model, test, workers)
                    tested = evaluate(logits_NT, test.clicks_N, test.conversions_N)
                    best, epoch = value, evaluation.epoch
            for name, values in metrics[choice].items():
                values.append(tested[name] or 0.0)
            print(
                f"seed {seed}, {choice:>6}: CTR AUC {tested['ctr_auc']:.5f}, "
                f"CTCVR AUC {tested['ctcvr_auc']:.5f}, best after {epoch:.2f} epochs of "
                f"{evaluation.epoch:.0f}, {evaluation.training_s:.0f} s of training",
                flush=True,
            )
    return {"ids": num_rows, "rows_per_lookup": per_lookup} | summary(metrics)


def make_dataset(directory: Path, users: int, items: int) -> str:
    """Draw the funnel and prepare it.

    A click's logit is a bias of the user, of the item and of the hour, and a product of the two's
    latent vectors; so is a conversion's after a click, with vectors of its own.
    """
    generator = np.random.default_rng(0)
    columns = {
        "user": (generator.random(IMPRESSIONS) ** 2 * users).astype(np.int32),
        "item": (generator.random(IMPRESSIONS) ** 3 * items).astype(np.int32),
        "hour": generator.integers(24, size=IMPRESSIONS, dtype=np.int32),
        "place": generator.integers(5, size=IMPRESSIONS, dtype=np.int32),
    }
    labels = []
    for intercept in (-2.4, -1.4):
        logits_N = np.full(IMPRESSIONS, intercept)
        for name, size in (("user", users), ("item", items), ("hour", 24), ("place", 5)):
            logits_N += 0.6 * generator.standard_normal(size)[columns[name]]
        likes_UK, traits_IK = (
            generator.standard_normal((size, LATENTS)) for size in (users, items)
        )
        logits_N += 0.4 * (likes_UK[columns["user"]] * traits_IK[columns["item"]]).sum(1)
        labels.append(generator.random(IMPRESSIONS) < 1.0 / (1.0 + np.exp(-logits_N)))
    clicked, converted = labels
    table = pa.table(
        columns | {"click": clicked.astype(np.int8), "buy": (clicked & converted).astype(np.int8)}
    )
    rows = directory / "rows.parquet"
    pq.write_table(table, rows)
    schema = Schema.model_validate(
        {
            "labels": {"click": "click", "conversion": "buy"},
            "categorical": list(columns),
            "split": {"valid": 0.1, "test": 0.2, "seed": 0},
        }
    )
    out = directory / "prepared"
    prepare_table(input=rows, schema=schema, out=out)
    return str(out)


def summary(metrics: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Print means, spreads and differences over seeds; return them."""
    figures: dict[str, Any] = {}
    for name in ("ctr_auc", "ctcvr_auc"):
        dense, sparse = (np.array(metrics[choice][name]) for choice in CHOICES)
        difference = sparse - dense
        print(
            f"{name}: dense {dense.mean():.5f} +- {dense.std(ddof=1):.5f}, sparse "
            f"{sparse.mean():.5f} +- {sparse.std(ddof=1):.5f}, sparse less dense "
            f"{difference.mean():+.5f} +- {difference.std(ddof=1):.5f}"
        )
        figures[name] = {
            "dense": dense.tolist(),
            "sparse": sparse.tolist(),
            "difference": difference.mean(),
            "stdev": difference.std(ddof=1),
        }
    return figures


if __name__ == "__main__":
    main()
