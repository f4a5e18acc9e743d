"""The first layer folded into the embedding: exact, and cheaper where vocabularies are small.

A first layer reads the concatenated vectors of all fields, and a linear layer of a concatenation is
a sum over fields. A field's share is (indicators of its value) @ (its vectors @ its slice of the
weights): its few vectors meet the weights once per step instead of once per impression.

    concat_f(indicators_f @ vectors_f) @ W.T = concat_f(indicators_f) @ concat_f(vectors_f @ W_f.T)

A categorical field's indicators are one-hot over its vocabulary, a numerical's is its value, that
of a bias is 1. They need no gradient, which saves the third product of a layer. The product with
one-hots is a sum of rows, and so is its gradient: on a CPU both are gathered, a tenth of a matrix
product's work. Layers side by side are computed one after another, each in a block of memory that
stays in cache. Outputs and gradients equal the plain form's up to rounding.

Shape suffixes: B batch, K layers side by side, D input (all fields), C places of one-hots, V rows
of the folded categorical fields, M numericals and 1s, X = V + M indicators, Y input of the other
fields, H hidden, O = K * H, R rows of one block's vectors, E embedding, S width of one block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from trainables.models.gather import by_row, sum_rows


@dataclass(frozen=True, kw_only=True)
class Indicators:
    """Indicators of the folded blocks: V one-hots, of which the few are kept that are not 0, and M.

    Attributes:
        rows_BC: places of the one-hots, each below V.
        weights_BC: their values; None where all are 1.
        num_rows: V.
        dense_BM: the folded numericals, if they are, and 1s.
    """

    rows_BC: Tensor
    weights_BC: Tensor | None
    num_rows: int
    dense_BM: Tensor

    def product(self, folded_KXH: Tensor) -> Tensor:
        """Return indicators_BX @ folded_KXH; on a CPU only the second factor has a gradient.

        `folded_KXH` may have fewer rows than there are indicators: the last 1s are left out then.
        """
        if folded_KXH.is_cuda:  # a matrix product is quick there, and the same from run to run
            return self._matrix(folded_KXH.dtype)[:, : folded_KXH.shape[1]] @ folded_KXH
        product_KBH: Tensor = _Product.apply(folded_KXH, self)  # type: ignore[no-untyped-call]
        return product_KBH

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        dense_BM = self.dense_BM.to(dtype)
        one_hots_BV = dense_BM.new_zeros(len(dense_BM), self.num_rows)
        if self.weights_BC is None:
            one_hots_BV.scatter_(1, self.rows_BC, 1.0)
        else:
            one_hots_BV.scatter_add_(1, self.rows_BC, self.weights_BC.to(dtype))
        return torch.cat([one_hots_BV, dense_BM], dim=1)

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Impressions sorted by the row that they read, where each row's begin, and their weights.

        The same for every layer that reads the input.
        """
        places, starts_V = by_row(self.rows_BC.flatten(), self.num_rows)
        weights = None if self.weights_BC is None else self.weights_BC.flatten()[places]
        return places // self.rows_BC.shape[1], starts_V, weights


class _ProductContext(FunctionCtx):
    indicators: Indicators
    shape: torch.Size


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ProductContext, folded_KXH: Tensor, x: Indicators) -> Tensor:
        ctx.indicators, ctx.shape = x, folded_KXH.shape
        num_layers, num_indicators, num_outputs = folded_KXH.shape
        dense_BM = x.dense_BM[:, : num_indicators - x.num_rows].to(folded_KXH.dtype)
        product_KBH = folded_KXH.new_empty(num_layers, len(dense_BM), num_outputs)
        for folded_XH, product_BH in zip(folded_KXH, product_KBH, strict=True):
            if x.num_rows:
                sum_rows(folded_XH[: x.num_rows], x.rows_BC, None, x.weights_BC, out=product_BH)
                product_BH.addmm_(dense_BM, folded_XH[x.num_rows :])
            else:
                torch.mm(dense_BM, folded_XH, out=product_BH)
        return product_KBH

    @staticmethod
    @once_differentiable
    def backward(ctx: _ProductContext, grad_KBH: Tensor) -> tuple[Tensor, None]:
        x = ctx.indicators
        grad_KXH = grad_KBH.new_empty(ctx.shape)
        dense_MB = x.dense_BM[:, : ctx.shape[1] - x.num_rows].to(grad_KBH.dtype).t()
        for grad_BH, grad_XH in zip(grad_KBH, grad_KXH, strict=True):
            if x.num_rows:
                sum_rows(grad_BH, *x.by_row, out=grad_XH[: x.num_rows])
            torch.mm(dense_MB, grad_BH, out=grad_XH[x.num_rows :])
        return grad_KXH, None


@dataclass(frozen=True, kw_only=True)
class FoldedInput:
    """The concatenated vectors x_BD, not computed; linear layers alone can read them.

    Attributes:
        widths: S of every block of x_BD: the categorical fields, then all numericals as one.
        vectors: vectors_RE of the folded blocks, by their place in ``widths``, ascending, in the
            type that a layer reads.
        indicators: of the folded blocks, in the same order, and a last 1.
        plain_BY: the other blocks of x_BD, side by side, in that type; None where all are folded.
    """

    widths: Sequence[int]
    vectors: Mapping[int, Tensor]
    indicators: Indicators
    plain_BY: Tensor | None

    def linear(self, weight_KHD: Tensor, bias_KH: Tensor | None) -> Tensor:
        """Apply K linear layers: hidden_KBH[k] = x_BD @ weight_KHD[k].T + bias_KH[k]."""
        folded_KXH, rest_KHY = _Folding.apply(  # type: ignore[no-untyped-call]
            cast_as_read(weight_KHD),
            None if bias_KH is None else cast_as_read(bias_KH),
            list(self.widths),
            tuple(self.vectors),
            *self.vectors.values(),
        )
        hidden_KBH = self.indicators.product(folded_KXH)
        if self.plain_BY is not None:
            hidden_KBH += linear_side_by_side(self.plain_BY, rest_KHY, None)
        return hidden_KBH


class _FoldingContext(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    widths: list[int]
    blocks: tuple[int, ...]
    has_bias: bool


class _Folding(torch.autograd.Function):
    """Vectors times their slices of the weights, below them the bias; and the slices that are left.

    One operation, so that the gradient of the weights is written where it belongs: autograd would
    put it together from one transposed piece per block, which takes longer than the products.
    """

    @staticmethod
    def forward(
        ctx: _FoldingContext,
        weight_KHD: Tensor,
        bias_KH: Tensor | None,
        widths: list[int],
        blocks: tuple[int, ...],
        *vectors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight_KHD, *vectors)
        ctx.widths, ctx.blocks, ctx.has_bias = widths, blocks, bias_KH is not None
        shape_KH = weight_KHD.shape[:2]
        weights_OS = torch.split(weight_KHD.flatten(0, 1), widths, dim=1)
        folded = [
            _fold(vectors_RE, weights_OS[block]).view(-1, *shape_KH).transpose(0, 1)
            for block, vectors_RE in zip(blocks, vectors, strict=True)
        ]
        if bias_KH is not None:
            folded.append(bias_KH.unsqueeze(1))
        rest = [weight_OS for block, weight_OS in enumerate(weights_OS) if block not in blocks]
        rest_OY = torch.cat(rest, dim=1) if rest else weight_KHD.new_empty(shape_KH.numel(), 0)
        return torch.cat(folded, dim=1), rest_OY.view(*shape_KH, rest_OY.shape[1])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _FoldingContext, grad_KXH: Tensor, grad_KHY: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight_KHD, *vectors = ctx.saved_tensors
        weights_OS = torch.split(weight_KHD.flatten(0, 1), ctx.widths, dim=1)
        grad_weight_KHD = weight_KHD.new_empty(weight_KHD.shape)  # contiguous, whatever it is
        grads_OS = torch.split(grad_weight_KHD.flatten(0, 1), ctx.widths, dim=1)
        grad_XO = grad_KXH.transpose(0, 1).flatten(1)
        num_rows = [len(vectors_RE) for vectors_RE in vectors]
        grads_RO = torch.split(grad_XO[: sum(num_rows)], num_rows)
        grads_RE = [
            _fold_backward(grad_RO, vectors_RE, weights_OS[block], grads_OS[block])
            for block, vectors_RE, grad_RO in zip(ctx.blocks, vectors, grads_RO, strict=True)
        ]
        rest = [grad_OS for block, grad_OS in enumerate(grads_OS) if block not in ctx.blocks]
        widths = [grad_OS.shape[1] for grad_OS in rest]
        parts_OS = torch.split(grad_KHY.flatten(0, 1), widths, dim=1)
        for grad_OS, part_OS in zip(rest, parts_OS, strict=True):
            grad_OS.copy_(part_OS)
        grad_bias_KH = grad_KXH[:, -1] if ctx.has_bias else None
        return grad_weight_KHD, grad_bias_KH, None, None, *grads_RE


def _fold(vectors_RE: Tensor, weight_OS: Tensor) -> Tensor:
    """Multiply a block's vectors by its weights: folded_RO."""
    if weight_OS.shape[1] == vectors_RE.shape[1]:
        return vectors_RE @ weight_OS.t()
    # Numericals with a direction each: vector r has its own E columns.
    return torch.einsum("re,ore->ro", vectors_RE, weight_OS.view(-1, *vectors_RE.shape))


def _fold_backward(
    grad_RO: Tensor, vectors_RE: Tensor, weight_OS: Tensor, grad_OS: Tensor
) -> Tensor:
    """Write the weights' gradient to grad_OS, return that of the vectors."""
    if weight_OS.shape[1] == vectors_RE.shape[1]:
        torch.mm(grad_RO.t(), vectors_RE, out=grad_OS)
        return grad_RO @ weight_OS
    shape_RE = vectors_RE.shape
    torch.mul(grad_RO.t().unsqueeze(2), vectors_RE, out=grad_OS.view(-1, *shape_RE))
    return torch.einsum("ro,ore->re", grad_RO, weight_OS.view(-1, *shape_RE))


Features = Tensor | FoldedInput
"""What a first layer reads: x_BD, or its folded form."""


def linear(x: Features, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
    """Return hidden_BH = x_BD @ weight_HD.T + bias_H, of either form of x_BD."""
    if isinstance(x, FoldedInput):
        bias_KH = None if bias_H is None else bias_H.unsqueeze(0)
        return x.linear(weight_HD.unsqueeze(0), bias_KH).squeeze(0)
    return functional.linear(x, weight_HD, bias_H)


def linear_side_by_side(x: Features, weight_KHD: Tensor, bias_KH: Tensor | None) -> Tensor:
    """Return hidden_KBH of K layers, of either form of x_BD; of a tensor as one wide product.

    The product's hidden_KBH is a view, K not its outermost dimension in memory.
    """
    if isinstance(x, FoldedInput):
        return x.linear(weight_KHD, bias_KH)
    bias_O = None if bias_KH is None else bias_KH.flatten()
    hidden_BO = functional.linear(x, weight_KHD.flatten(0, 1), bias_O)
    return hidden_BO.view(-1, *weight_KHD.shape[:2]).transpose(0, 1)


def cast_as_read(x: Tensor) -> Tensor:
    """Convert to the type that autocast would convert it to, where it is on: float64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
