"""Adam, and its sparse form for embedding tables of which a step touches few rows.

torch's optimisers load its compiler, `torch._dynamo`, to keep it out of their methods: two seconds
and 67 MB of every lane. These do not; DistributedDataParallel and a compiled model still do.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from trainables.models.embedding import FeatureEmbedding

__all__ = ["EagerAdam", "EmbeddingOptimizer", "Optimizers", "make_optimizers"]

EmbeddingOptimizer = Literal["auto", "dense", "sparse"]

SPARSE_MIN_ROWS_PER_LOOKUP = 24
"""Rows of a table per vector looked up in a step from which sparse Adam is quicker on a CPU."""


SPARSE_BETAS = (0.0, 0.999)
"""Decay of sparse Adam's moments.

A gradient moves a row by dense Adam's momentum in the steps that follow, read or not: by
(1 - beta1) (1 + beta1 + beta1^2 + ...) = 1 in all. Sparse Adam moves it in the steps that read it
alone, so that a row that is read rarely would move by 1 - beta1 of that. Without momentum it moves
by all of it at once (measured in docs/performance.md).
"""


def _keep_compiler_unloaded() -> None:
    """Have torch's optimisers run these methods as they are.

    Where torch no longer knows the attribute, the compiler is loaded, and nothing else happens.
    """
    for method in (
        torch.optim.Optimizer.add_param_group,
        torch.optim.Optimizer.zero_grad,
        torch.optim.Optimizer.state_dict,
        torch.optim.Optimizer.load_state_dict,
    ):
        plain = inspect.unwrap(method)
        setattr(plain, "__dynamo_disable", plain)  # where torch looks for what it has disabled


_keep_compiler_unloaded()


class EagerAdam(torch.optim.Adam):
    """Adam whose step does not load the compiler."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class Optimizers:
    """Adam over the dense weights, and sparse Adam over the tables with sparse gradients.

    Sparse Adam (`torch.optim.SparseAdam`, without momentum) updates weights and second moments of
    the rows that a step reads and of no others: moments of the rest do not decay, and the L2
    penalty, which torch's class does not know, falls on the rows that are read, each time they are.

    Args:
        model: its sparse tables are marked already.
        learning_rate: of both.
        weight_decay: L2 penalty of both.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
        self._weight_decay = weight_decay
        self._tables = [
            embedding.table.weight
            for embedding in _embeddings(model)
            if embedding.table is not None and embedding.table.sparse
        ]
        sparse = {id(table) for table in self._tables}
        dense = [weight for weight in model.parameters() if id(weight) not in sparse]
        self._optimizers: list[torch.optim.Optimizer] = []
        if dense:
            self._optimizers.append(
                EagerAdam(
                    dense,
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    fused=True,
                    capturable=dense[0].is_cuda,
                )
            )
        if self._tables:
            self._optimizers.append(
                torch.optim.SparseAdam(self._tables, lr=learning_rate, betas=SPARSE_BETAS)
            )

    @property
    def has_sparse(self) -> bool:
        """Whether there are tables with sparse gradients."""
        return bool(self._tables)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights from their gradients."""
        for table in self._tables:
            if table.grad is not None and self._weight_decay:
                # Summed up per row first, or a row that occurs often would decay as often.
                gradient = table.grad.coalesce()
                rows = gradient.indices()[0]
                gradient.values().add_(table[rows], alpha=self._weight_decay)
                table.grad = gradient
        for optimizer in self._optimizers:
            optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and counts by name; empty before the first step."""
        found = {}
        for index, optimizer in enumerate(self._optimizers):
            for weight, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    kind = "tensor" if isinstance(value, torch.Tensor) else "number"
                    found[f"{index}.{weight}.{kind}.{name}"] = torch.as_tensor(value)
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: if it is that of other optimisers.
        """
        states: list[dict[int, dict[str, object]]] = [{} for _ in self._optimizers]
        for key, value in state.items():
            index, weight, kind, name = key.split(".")
            restored = value if kind == "tensor" else value.item()
            states[int(index)].setdefault(int(weight), {})[name] = restored
        for optimizer, values in zip(self._optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": values, "param_groups": groups})


def make_optimizers(
    model: nn.Module,
    choice: EmbeddingOptimizer,
    *,
    learning_rate: float,
    weight_decay: float,
    rows_per_step: int,
    can_reduce_sparse: bool = True,
) -> Optimizers:
    """Mark which tables have sparse gradients, and make the optimisers; before DDP wraps the model.

    Args:
        model: any model; one that has no FeatureEmbedding gets Adam alone.
        choice: ``dense``, ``sparse``, or ``auto``: sparse for tables that are large against what a
            step reads of them.
        learning_rate: of all weights.
        weight_decay: L2 penalty.
        rows_per_step: impressions per step over all workers.
        can_reduce_sparse: whether the workers can add up sparse gradients (NCCL cannot).

    Raises:
        ValueError: ``sparse`` where the workers cannot add up sparse gradients.
    """
    if choice == "sparse" and not can_reduce_sparse:
        raise ValueError(
            "training.embedding_optimizer: sparse needs gradients that several GPU workers cannot "
            "add up; set it to dense, or resources.workers_per_lane to 1"
        )
    for embedding in _embeddings(model):
        if embedding.table is not None:
            embedding.table.sparse = choice == "sparse" or (
                choice == "auto" and can_reduce_sparse and _is_large(embedding, rows_per_step)
            )
    return Optimizers(model, learning_rate=learning_rate, weight_decay=weight_decay)


def _is_large(embedding: FeatureEmbedding, rows_per_step: int) -> bool:
    """Whether dense Adam, which walks the whole table, takes longer than sparse Adam."""
    lookups = rows_per_step * sum(embedding.bag_lengths)
    return sum(embedding.vocabulary_sizes) >= SPARSE_MIN_ROWS_PER_LOOKUP * lookups


def _embeddings(model: nn.Module) -> Sequence[FeatureEmbedding]:
    return [module for module in model.modules() if isinstance(module, FeatureEmbedding)]
