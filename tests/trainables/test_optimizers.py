import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from trainables import DeviceImpressions, Inputs, TrainingSettings, TrialConfiguration, Workers
from trainables.checkpoint import load_checkpoint, save_checkpoint
from trainables.configuration import build_model
from trainables.models.embedding import FeatureEmbedding
from trainables.optimizers import EagerAdam, EmbeddingOptimizer, RowAdam, make_optimizers
from trainables.training import train

SIZES = (7, 5)
INPUTS = Inputs(vocabulary_sizes=SIZES, num_numericals=2)
MODEL = {"embedding_dim": 4, "num_experts": 2, "expert_units": (8,), "gate_units": ()}


def embedding_of(sizes: tuple[int, ...] = SIZES) -> FeatureEmbedding:
    torch.manual_seed(0)
    return FeatureEmbedding(Inputs(vocabulary_sizes=sizes, num_numericals=0), 4, "project")


def optimize(
    ids_SBF: torch.Tensor, choice: EmbeddingOptimizer, weight_decay: float
) -> Iterator[torch.Tensor]:
    """The table after every step on a loss that is quadratic in the vectors that it reads."""
    embedding = embedding_of()
    optimizers = make_optimizers(
        embedding, choice, learning_rate=0.01, weight_decay=weight_decay, rows_per_step=4
    )
    assert embedding.table is not None
    yield embedding.table.weight.detach().clone()
    for ids_BF in ids_SBF:
        optimizers.zero_grad()
        (embedding(ids_BF, torch.zeros(len(ids_BF), 0)) - 1.0).square().sum().backward()
        optimizers.step()
        yield embedding.table.weight.detach().clone()


def every_row(num_steps: int) -> torch.Tensor:
    """Batches that read every row at least once, and most several times."""
    generator = torch.Generator().manual_seed(1)
    ids_BF = torch.stack([torch.arange(28) % size for size in SIZES], dim=1)
    orders = [torch.randperm(28, generator=generator) for _ in range(num_steps)]
    return torch.stack([ids_BF[order] for order in orders])


def test_sparse_adam_equals_adam_without_momentum_where_every_row_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = every_row(6)
    sparse = list(optimize(batches, "sparse", 0.1))
    with_betas = partial(EagerAdam, betas=(0.0, 0.999))
    monkeypatch.setattr("trainables.optimizers.EagerAdam", with_betas)
    dense = list(optimize(batches, "dense", 0.1))
    assert not torch.allclose(dense[0], dense[-1], atol=0.01)
    for dense_VE, sparse_VE in zip(dense, sparse, strict=True):
        torch.testing.assert_close(sparse_VE, dense_VE)


@pytest.mark.parametrize("num_rows", [3, 1_000, 50_000])
@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_adam_is_that_of_torch_without_momentum(num_rows: int, coalesced: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    first_VE = torch.randn(num_rows, 3, generator=generator)
    tables = [nn.Parameter(first_VE.clone()) for _ in range(2)]
    # torch adds eps to the root before it corrects the root's bias, and so more of it.
    ours = RowAdam(tables[:1], lr=0.1, weight_decay=0.0, eps=1e-30)
    torchs = torch.optim.SparseAdam(tables[1:], lr=0.1, betas=(0.0, 0.999), eps=1e-30)
    for num_reads in (500, 0, 1, 500):
        rows_R = torch.randint(num_rows, (num_reads,), generator=generator)
        gradient_RE = torch.randn(num_reads, 3, generator=generator)
        gradient = torch.sparse_coo_tensor(
            rows_R[None], gradient_RE, first_VE.shape, check_invariants=True
        )
        for table, optimizer in zip(tables, (ours, torchs), strict=True):
            table.grad = gradient.coalesce() if coalesced else gradient.clone()
            optimizer.step()
    torch.testing.assert_close(*tables)
    assert not torch.allclose(tables[0], first_VE)


def test_sparse_adam_moves_a_row_at_once_as_far_as_adam_does_in_the_end() -> None:
    often, once = torch.tensor([[0, 0]]), torch.tensor([[1, 0]])
    batches = torch.stack([often] * 1_000 + [once] + [often] * 100)
    moves = []
    for choice in ("dense", "sparse"):
        tables = list(optimize(batches, choice, 0.0))
        moves.append(tables[-1][1] - tables[1_000][1])
    torch.testing.assert_close(moves[1], moves[0], rtol=0.02, atol=0.0)
    assert (moves[1].abs() > 0.1).all()


def test_sparse_adam_leaves_rows_alone_that_no_step_reads() -> None:
    ids_SBF = torch.tensor([[[1, 2], [1, 3]], [[1, 2], [4, 3]]])
    first_VE, *_, last_VE = optimize(ids_SBF, "sparse", 0.1)
    changed = (first_VE != last_VE).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 4, SIZES[0] + 2, SIZES[0] + 3]


def test_adam_moves_every_row_by_its_decay() -> None:
    first_VE, last_VE = optimize(torch.tensor([[[1, 2]]]), "dense", 0.1)
    assert (first_VE != last_VE).any(dim=1).all()


@pytest.mark.parametrize(
    ("sizes", "rows_per_step", "choice", "can_reduce", "sparse"),
    [
        ((24,), 4, "auto", True, True),
        ((23,), 4, "auto", True, False),
        ((200, 40), 20, "auto", True, True),
        ((200, 39), 20, "auto", True, False),
        ((10_000,), 1, "auto", False, False),
        ((10_000,), 1, "dense", True, False),
        ((10,), 4, "sparse", True, True),
    ],
)
def test_large_tables_are_sparse_unless_told_otherwise(
    sizes: tuple[int, ...],
    rows_per_step: int,
    choice: EmbeddingOptimizer,
    can_reduce: bool,
    sparse: bool,
) -> None:
    embedding = embedding_of(sizes)
    make_optimizers(
        embedding,
        choice,
        learning_rate=0.1,
        weight_decay=0.0,
        rows_per_step=rows_per_step,
        can_reduce_sparse=can_reduce,
    )
    assert embedding.table is not None
    embedding.table(torch.zeros(3, dtype=torch.int64)).sum().backward()
    gradient = embedding.table.weight.grad
    assert gradient is not None
    assert gradient.is_sparse is sparse


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_gpu_keeps_its_graph_before_sparse_tables() -> None:
    embedding = embedding_of((1_000,)).cuda()
    make_optimizers(embedding, "auto", learning_rate=0.1, weight_decay=0.0, rows_per_step=1)
    assert embedding.table is not None
    assert not embedding.table.sparse


def test_sparse_is_refused_where_workers_cannot_add_it_up() -> None:
    with pytest.raises(ValueError, match=r"embedding_optimizer: sparse .* set it to dense"):
        make_optimizers(
            embedding_of(),
            "sparse",
            learning_rate=0.1,
            weight_decay=0.0,
            rows_per_step=1,
            can_reduce_sparse=False,
        )


def test_a_model_without_a_table_of_ours_is_trained_as_well() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizers = make_optimizers(
        model, "sparse", learning_rate=0.1, weight_decay=0.0, rows_per_step=1
    )
    model(torch.ones(1, 2)).sum().backward()
    optimizers.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
    optimizers.zero_grad()
    assert model.weight.grad is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("folding", ["on", "off"])
def test_a_trial_with_sparse_tables_learns_and_can_be_loaded(
    precision: str, folding: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_NF = torch.stack([torch.randint(s, (512,), generator=generator) for s in SIZES], 1)
    clicks_N = (ids_NF[:, 0] > 3).byte()
    labels_NT = torch.stack([clicks_N, clicks_N * (ids_NF[:, 1] > 2).byte()], 1)
    split = DeviceImpressions(ids_NF, torch.zeros(512, 2), labels_NT)
    training = TrainingSettings.model_validate(
        {
            "epochs": 20,
            "batch_size": 64,
            "learning_rate": 0.01,
            "precision": precision,
            "folding": folding,
            "embedding_optimizer": "sparse",
        }
    )
    configuration = TrialConfiguration.create("mmoe", MODEL, training=training)
    workers = Workers(device=torch.device("cpu"))
    *_, (evaluation, trained) = train(configuration, INPUTS, split, split, workers)
    assert evaluation.metrics["ctr_auc"] == 1.0
    save_checkpoint(tmp_path, configuration, INPUTS, trained)
    *_, loaded = load_checkpoint(tmp_path)
    fresh = build_model(configuration, INPUTS)
    table = "embedding.table.weight"
    assert torch.equal(loaded.state_dict()[table], trained.state_dict()[table])
    assert not torch.equal(loaded.state_dict()[table], fresh.state_dict()[table])


def test_adam_is_that_of_torch() -> None:
    torch.manual_seed(2)
    first, inputs_SBD = torch.randn(3, 4), torch.randn(5, 2, 4)
    weights = [nn.Parameter(first.clone()) for _ in range(2)]
    ours = EagerAdam(weights[:1], lr=0.1, weight_decay=0.2, fused=True)
    torchs = torch.optim.Adam(weights[1:], lr=0.1, weight_decay=0.2, fused=True)
    for x_BD in inputs_SBD:
        for weight, optimizer in zip(weights, (ours, torchs), strict=True):
            optimizer.zero_grad()
            (x_BD @ weight.T).square().sum().backward()
            optimizer.step()
    assert torch.is_grad_enabled()
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], first)


WITHOUT_COMPILER = """
import sys
import torch
from planted import CPU, INPUTS, SMALL_MODELS, make_split
from trainables import TrainingSettings, TrialConfiguration, Workers
from trainables.optimizers import Optimizers
from trainables.training import train

for choice in ("dense", "sparse"):
    training = TrainingSettings(epochs=1, batch_size=500, embedding_optimizer=choice)
    configuration = TrialConfiguration.create("mmoe", SMALL_MODELS["mmoe"], training=training)
    [*train(configuration, INPUTS, make_split(), make_split(seed=1), Workers(device=CPU))]
optimizers = Optimizers(torch.nn.Linear(1, 1), learning_rate=0.1, weight_decay=0.0)
optimizers.restore(optimizers.state())
sys.exit("torch._dynamo" in sys.modules)
"""


def test_a_trial_is_trained_without_the_compiler_of_torch() -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": str(tests)},
        check=False,
    )
    assert done.returncode == 0
