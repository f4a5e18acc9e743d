"""Rows of a table, looked up or summed up on a CPU: torch's kernels put together for the gradient.

Shape suffixes: R rows read, U different ones of them, V rows of the table, E their width.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

STRIP_BYTES = 512
"""Of a table's columns that are summed up together."""


def look_up(table_VE: Tensor, rows_R: Tensor) -> Tensor:
    """Return vectors_RE.

    The gradient adds up the reads of every row in float32 or wider, after sorting them, in half the
    time of ``index_select``'s own; that one serves where no more rows are read than the table
    has, and adds in the table's type.
    """
    if torch.is_grad_enabled() and sorts_rows(table_VE, len(rows_R)):
        vectors_RE: Tensor = _LookUp.apply(table_VE, rows_R)  # type: ignore[no-untyped-call]
        return vectors_RE
    return table_VE.index_select(0, rows_R)


def sorts_rows(table_VE: Tensor, num_lookups: int) -> bool:
    """Whether the gradient of so many lookups sorts them."""
    return len(table_VE) < num_lookups


class _LookUpContext(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    num_rows: int


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _LookUpContext, table_VE: Tensor, rows_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_R)
        ctx.num_rows = len(table_VE)
        return table_VE.index_select(0, rows_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LookUpContext, grad_RE: Tensor) -> tuple[Tensor, None]:
        (rows_R,) = ctx.saved_tensors
        places_R, starts_V = by_row(rows_R, ctx.num_rows)
        return sum_rows(grad_RE, places_R, starts_V, None), None


def by_row(rows_R: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sort places by the row that they read.

    Args:
        rows_R: rows, each below V.
        num_rows: V.

    Returns:
        places_R, the places of row 0, of row 1 and so on, each in order; starts_V, where those of
        each row begin.
    """
    sorted_R, places_R = _sort(rows_R, num_rows)
    rows_V = torch.arange(num_rows, dtype=sorted_R.dtype, device=rows_R.device)
    return places_R, torch.searchsorted(sorted_R, rows_V)


def sum_by_row(rows_R: Tensor, vectors_RE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Add up the vectors of every row that occurs.

    What ``coalesce`` of a sparse tensor does, in a third of the time.

    Args:
        rows_R: rows, each below V, in any order.
        vectors_RE: a vector for each.
        num_rows: V.

    Returns:
        rows_U, those that occur, in order, and sums_UE.
    """
    sorted_R, places_R = _sort(rows_R, num_rows)
    rows_U, counts_U = torch.unique_consecutive(sorted_R, return_counts=True)
    starts_U = counts_U.cumsum(0) - counts_U
    return rows_U.long(), sum_rows(vectors_RE, places_R, starts_U, None)


def _sort(rows_R: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the sorted rows, narrow ones in half the time, and the place of each in `rows_R`."""
    narrow = torch.int16 if num_rows <= 1 << 15 else torch.int32
    sorted_R, places_R = rows_R.to(narrow).sort(stable=True)
    return sorted_R, places_R


def sum_rows(
    table: Tensor,
    rows: Tensor,
    starts: Tensor | None,
    weights: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Add up rows of a table, as many as a row of `rows` has, or between two `starts`.

    Strip by strip of its columns: where rows are read often, those of a strip fit a core's cache.
    """
    weights = None if weights is None else weights.to(table.dtype)
    strips = [
        functional.embedding_bag(
            rows, strip.contiguous(), starts, mode="sum", per_sample_weights=weights
        )
        for strip in torch.split(table, STRIP_BYTES // table.element_size(), dim=1)
    ]
    return strips[0] if len(strips) == 1 and out is None else torch.cat(strips, dim=1, out=out)
