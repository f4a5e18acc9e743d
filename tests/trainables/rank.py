"""One rank of a data-parallel run: python rank.py SCENARIO RANK WORLD_SIZE INIT_FILE OUT_FILE.

A process of its own, started by the fixture run_ranks of conftest.py. Rank 0 saves what the ranks
agree on. A world of 1 runs without process group, as a single worker does.
"""

import gc
import sys

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from trainables.configuration import LossSettings, TrainingSettings, TrialConfiguration
from trainables.loss import pwiser, training_loss
from trainables.models import MODELS, Inputs
from trainables.training import DeviceImpressions, TrainingError, predict_logits, train
from trainables.workers import Workers

NUM_ROWS = 64
STEPS = 5
VARIANTS = {
    "shared_bottom": ("shared_bottom", {"bottom_units": (16, 8)}),
    "mmoe": ("mmoe", {"expert_units": (16, 8), "num_experts": 3, "gate_units": (6,)}),
    "ple": ("ple", {"expert_units": (16, 8), "num_experts": 3, "num_levels": 2}),
    "dnn": ("dnn", {"hidden_units": (16, 8)}),
    "masknet serial": ("masknet", {"hidden_units": (16, 8)}),
    "masknet parallel": ("masknet", {"hidden_units": (16, 8), "variant": "parallel"}),
}


def local_rows(values: Tensor, rank: int, world_size: int) -> Tensor:
    return values.chunk(world_size)[rank]


def mean_over_ranks(value: Tensor, world_size: int) -> Tensor:
    value = value.detach().clone()
    if world_size > 1:
        distributed.all_reduce(value)
    return value / world_size


def train_models(rank: int, world_size: int, group: ProcessGroup | None) -> dict[str, Tensor]:
    results = {}
    inputs = Inputs(vocabulary_sizes=(5, 9), num_numericals=3)
    for variant, (name, settings) in VARIANTS.items():
        torch.manual_seed(0)
        model = MODELS[name](inputs, embedding_dim=4, batch_norm=True, **settings).double()
        parallel = model if group is None else DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            ids_BF = torch.randint(5, (NUM_ROWS, 2))
            numericals_BN = torch.randn(NUM_ROWS, 3, dtype=torch.float64)
            clicks_B = torch.rand(NUM_ROWS) < 0.4
            conversions_B = clicks_B & (torch.rand(NUM_ROWS) < 0.3)
            batch = [ids_BF, numericals_BN, clicks_B, conversions_B]
            ids, numericals, clicks, conversions = (
                local_rows(part, rank, world_size) for part in batch
            )
            losses = training_loss(
                parallel(ids, numericals), clicks, conversions, 0.7, 0.3, 0.1, group=group
            )
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            results[f"{variant} loss {step}"] = mean_over_ranks(losses.total, world_size)
        for key, value in model.state_dict().items():
            results[f"{variant} {key}"] = value
    return results


def take_gradients(rank: int, world_size: int, group: ProcessGroup | None) -> dict[str, Tensor]:
    results = {}
    for case, rate in {"dense": 0.5, "none on the first rank": 0.02, "no conversion": 0.0}.items():
        for gate in ("hinge", "literal"):
            torch.manual_seed(1)
            weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
            clicks_N = torch.rand(NUM_ROWS) < 0.5
            conversions_N = clicks_N & (torch.rand(NUM_ROWS) < rate)
            if case == "none on the first rank":
                conversions_N = torch.arange(NUM_ROWS) == NUM_ROWS - 1
                clicks_N = clicks_N | conversions_N
            features_N = local_rows(torch.randn(NUM_ROWS, dtype=torch.float64), rank, world_size)
            loss = pwiser(
                torch.sigmoid((1 + weight) * features_N),
                local_rows(clicks_N, rank, world_size),
                local_rows(conversions_N, rank, world_size),
                0.25,
                torch.tensor(0.1),
                gate=gate,
                group=group,
            )
            loss.backward()
            results[f"{case} {gate} loss"] = loss.detach()
            results[f"{case} {gate} gradient"] = mean_over_ranks(weight.grad, world_size)
    return results


def make_split(num_rows: int, seed: int) -> DeviceImpressions:
    generator = torch.Generator().manual_seed(seed)
    ids_NF = torch.randint(5, (num_rows, 2), generator=generator)
    numericals_ND = torch.randn(num_rows, 3, generator=generator)
    clicks_N = torch.rand(num_rows, generator=generator) < 0.2 + 0.1 * ids_NF[:, 0]
    conversions_N = clicks_N & (torch.rand(num_rows, generator=generator) < 0.3)
    labels_NT = torch.stack([clicks_N, conversions_N], 1).byte()
    return DeviceImpressions(ids_NF, numericals_ND, labels_NT)


def run_trials(rank: int, world_size: int, group: ProcessGroup | None) -> dict[str, Tensor]:
    """Train by trainables.train on 320 rows, 5 steps of 64, with valid splits of any length."""
    results = {}
    workers = Workers(device=torch.device("cpu"), group=group)
    inputs = Inputs(vocabulary_sizes=(5, 9), num_numericals=3)
    training = TrainingSettings(epochs=1, batch_size=64, precision="float32", evaluate_every=0.6)
    variants = {name: VARIANTS[name] for name in ("mmoe", "dnn")}
    normalised = {"mmoe batch norm": ("mmoe", VARIANTS["mmoe"][1] | {"batch_norm": True})}
    sparse = {"mmoe sparse": VARIANTS["mmoe"]}
    for variant, (architecture, settings) in (variants | normalised | sparse).items():
        optimizer = "sparse" if variant in sparse else "dense"
        configuration = TrialConfiguration.create(
            architecture,
            settings | {"embedding_dim": 4},
            training=training.model_copy(update={"embedding_optimizer": optimizer}),
            loss=LossSettings(alpha=0.7),
        )
        valid = make_split(37, seed=1)
        evaluations = train(configuration, inputs, make_split(5 * 64, seed=0), valid, workers)
        for evaluation, model in evaluations:
            key = f"{variant} {evaluation.step}"
            losses = (evaluation.train_loss, evaluation.train_bce, evaluation.train_pwiser)
            results[f"{key} losses"] = torch.tensor(losses, dtype=torch.float64)
            metrics = [value for value in evaluation.metrics.values() if value is not None]
            results[f"{key} metrics"] = torch.tensor(metrics, dtype=torch.float64)
            agree = [None] * world_size
            if group is not None:
                distributed.all_gather_object(agree, (losses, evaluation.metrics), group=group)
                assert agree == [(losses, evaluation.metrics)] * world_size
            for num_rows in (1, 2, 37, 64):
                rows = make_split(num_rows, seed=num_rows)
                results[f"{key} logits {num_rows}"] = predict_logits(model, rows, workers)
            if variant not in normalised:  # a bias before batch norm has no gradient but rounding
                for name, value in model.state_dict().items():
                    results[f"{key} {name}"] = value.clone()
    if world_size > 1:
        too_few = train(configuration, inputs, make_split(1, seed=0), valid, workers)
        try:
            next(too_few)
        except TrainingError as error:
            expected = "1 train impressions cannot feed 2 workers; lower resources.workers_per_lane"
            assert str(error) == expected, error
        else:
            raise AssertionError("one row fed two workers")
    return results


def gather_shares(rank: int, world_size: int, group: ProcessGroup | None) -> dict[str, Tensor]:
    workers = Workers(device=torch.device("cpu"), group=group)
    assert (workers.rank, workers.size) == (rank, world_size)
    results = {}
    for num_rows in range(7):
        rows_BT = torch.arange(2.0 * num_rows).view(num_rows, 2)
        share = workers.share_of(num_rows)
        results[f"{num_rows} rows"] = workers.gather_rows(rows_BT[share], num_rows)
    return results


def main(scenario: str, rank: int, world_size: int, init_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size
        )
    scenarios = {
        "models": train_models,
        "loss": take_gradients,
        "trials": run_trials,
        "workers": gather_shares,
    }
    run = scenarios[scenario]
    results = run(rank, world_size, distributed.group.WORLD if world_size > 1 else None)
    if rank == 0:
        torch.save(results, out_file)
    if world_size > 1:
        distributed.destroy_process_group()
    # a thread of Gloo's that holds a tensor while the interpreter ends aborts the process: nothing
    # may keep the group, and so its threads, beyond this line
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
