"""One rank of a data-parallel run: python rank.py SCENARIO RANK WORLD_SIZE INIT_FILE OUT_FILE.

A process of its own, started by the fixture run_ranks of conftest.py. Rank 0 saves what the ranks
agree on. A world of 1 runs without process group, as a single worker does.
"""

import sys

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from trainables.loss import pwiser, training_loss
from trainables.models import MODELS, Inputs

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


def main(scenario: str, rank: int, world_size: int, init_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    group = None
    if world_size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size
        )
        group = distributed.group.WORLD
    run = {"models": train_models, "loss": take_gradients}[scenario]
    results = run(rank, world_size, group)
    if rank == 0:
        torch.save(results, out_file)
    if world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
