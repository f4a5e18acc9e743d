"""Adam, and its sparse form for embedding tables of which a step touches few rows.

torch's optimisers load its compiler, `torch._dynamo`, to keep it out of their methods: two seconds
and 67 MB of every lane. These do not; DistributedDataParallel and a compiled model still do.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from trainables.models.embedding import FeatureEmbedding
from trainables.models.gather import sum_by_row

__all__ = ["EagerAdam", "EmbeddingOptimizer", "Optimizers", "RowAdam", "make_optimizers"]

EmbeddingOptimizer = Literal["auto", "dense", "sparse"]

SPARSE_MIN_ROWS_PER_LOOKUP = 6
"""Rows of a table per vector looked up in a step from which sparse Adam is quicker on a CPU."""
SPARSE_MIN_GPU_WEIGHTS = 500_000_000
"""Weights of a table from which it may pay on a GPU, where it costs the step its CUDA graph.

Calculated: dense Adam moves 28 bytes per weight, 5 ms at 2.8 TB/s, which is what a graph saves.
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


class RowAdam(torch.optim.Optimizer):
    """Adam without momentum over tables with sparse gradients, row by row.

    A step updates weights and second moments of the rows that it reads and of no others: moments of
    the rest do not decay, and the L2 penalty falls on the rows that are read, each time they are.

    A gradient moves a row by Adam's momentum in the steps that follow, read or not: by
    (1 - beta1) (1 + beta1 + beta1^2 + ...) = 1 in all. In the steps that read it alone, a row that
    is read rarely would move by 1 - beta1 of that. Without momentum it moves by all of it at once
    (measured in docs/performance.md).

    Where every row is read, it is Adam (Kingma and Ba 2015, algorithm 1) with beta1 = 0.
    `torch.optim.SparseAdam` with that does the same in two to three times the time, keeps first
    moments, knows no L2 penalty, and adds eps before it corrects the bias.

    Args:
        tables: with sparse gradients.
        lr: learning rate.
        weight_decay: L2 penalty.
        beta2: decay of the second moments.
        eps: added to the root of a second moment.
    """

    def __init__(
        self,
        tables: Sequence[torch.Tensor],
        *,
        lr: float,
        weight_decay: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            tables, {"lr": lr, "weight_decay": weight_decay, "beta2": beta2, "eps": eps}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group)

    def _update(self, table_VE: torch.Tensor, group: Mapping[str, float]) -> None:
        state = self.state[table_VE]
        if not state:
            state["step"] = 0
            state["exp_avg_sq"] = torch.zeros_like(table_VE)
        state["step"] += 1
        squares_VE: torch.Tensor = state["exp_avg_sq"]
        rows_R, gradient_RE = _by_row(table_VE)
        weights_RE = table_VE.index_select(0, rows_R)
        if group["weight_decay"]:
            gradient_RE = gradient_RE.add(weights_RE, alpha=group["weight_decay"])
        squares_RE = squares_VE.index_select(0, rows_R).mul_(group["beta2"])
        squares_RE.addcmul_(gradient_RE, gradient_RE, value=1.0 - group["beta2"])
        squares_VE.index_copy_(0, rows_R, squares_RE)
        correction = math.sqrt(1.0 - group["beta2"] ** state["step"])
        roots_RE = squares_RE.sqrt_().div_(correction).add_(group["eps"])
        weights_RE.addcdiv_(gradient_RE, roots_RE, value=-group["lr"])
        table_VE.index_copy_(0, rows_R, weights_RE)


def _by_row(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a table that have a gradient, each once, and their gradients."""
    gradient = table.grad
    assert gradient is not None
    if gradient.is_cuda or gradient.is_coalesced():
        gradient = gradient.coalesce()
        return gradient.indices()[0], gradient.values()
    return sum_by_row(gradient._indices()[0], gradient._values(), len(table))


class Optimizers:
    """Adam over the dense weights, and sparse Adam (`RowAdam`) over tables with sparse gradients.

    Args:
        model: its sparse tables are marked already.
        learning_rate: of both.
        weight_decay: L2 penalty of both.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
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
                RowAdam(self._tables, lr=learning_rate, weight_decay=weight_decay)
            )

    @property
    def has_sparse(self) -> bool:
        """Whether there are tables with sparse gradients."""
        return bool(self._tables)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Update all weights from their gradients."""
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
            ValueError: if it is that of other optimisers, as where other tables are sparse; nothing
                has changed then.
        """
        shapes = {
            (index, weight): parameter.shape
            for index, optimizer in enumerate(self._optimizers)
            for group in optimizer.param_groups
            for weight, parameter in enumerate(group["params"])
        }
        states: list[dict[int, dict[str, object]]] = [{} for _ in self._optimizers]
        for key, value in state.items():
            index, weight, kind, name = key.split(".")
            shape = shapes.get((int(index), int(weight)))
            if shape is None or (value.dim() and value.shape != shape):
                raise ValueError(f"{key} is a moment of another weight")
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
            lookups = rows_per_step * sum(embedding.bag_lengths)
            embedding.table.sparse = choice == "sparse" or (
                choice == "auto" and can_reduce_sparse and _is_large(embedding.table, lookups)
            )
    return Optimizers(model, learning_rate=learning_rate, weight_decay=weight_decay)


def _is_large(table: nn.Embedding, lookups: int) -> bool:
    """Whether dense Adam, which walks the whole table, takes longer than sparse Adam."""
    if table.weight.is_cuda and table.weight.numel() < SPARSE_MIN_GPU_WEIGHTS:
        return False
    return table.num_embeddings >= SPARSE_MIN_ROWS_PER_LOOKUP * lookups


def _embeddings(model: nn.Module) -> Sequence[FeatureEmbedding]:
    return [module for module in model.modules() if isinstance(module, FeatureEmbedding)]
