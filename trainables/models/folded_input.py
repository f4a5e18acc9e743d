"""The first layer folded into the embedding: exact, and cheaper where vocabularies are small.

A first layer reads the concatenated vectors of all fields, and a linear layer of a concatenation is
a sum over fields. A field's share is (indicators of its value) @ (its vectors @ its slice of the
weights): its few vectors meet the weights once per step instead of once per impression.

    concat_f(indicators_f @ vectors_f) @ W.T = concat_f(indicators_f) @ concat_f(vectors_f @ W_f.T)

A categorical field's indicators are one-hot over its vocabulary, a numerical's is its value, that
of a projection's bias is 1. They need no gradient, which saves the third product of a layer. The
product with one-hots is a sum of rows, and so is its gradient: on a CPU both are gathered, a tenth
of a matrix product's work. Outputs and gradients equal the plain form's up to rounding.

Shape suffixes: B batch, E embedding, D input (all fields), C places of one-hots, V rows of the
folded categorical fields, X indicators of the numericals and a last 1, Y input of the other fields,
H hidden, R rows of one field's vectors, S width of one field's input.
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
class OneHots:
    """Indicators of the folded categorical fields: of all V, the few that are not 0.

    Attributes:
        rows_BC: their places, each below V.
        weights_BC: their values; None where all are 1.
        num_rows: V.
    """

    rows_BC: Tensor
    weights_BC: Tensor | None
    num_rows: int

    def product(self, folded_VH: Tensor) -> Tensor:
        """Return indicators_BV @ folded_VH; only the second factor has a gradient."""
        if folded_VH.is_cuda:  # a matrix product is quick there, and the same from run to run
            return self._dense(folded_VH.dtype) @ folded_VH
        product_BH: Tensor = _GatheredProduct.apply(  # type: ignore[no-untyped-call]
            folded_VH, self
        )
        return product_BH

    def _dense(self, dtype: torch.dtype) -> Tensor:
        rows_BC = self.rows_BC
        shape = (len(rows_BC), self.num_rows)
        dense_BV = torch.zeros(shape, dtype=dtype, device=rows_BC.device)
        if self.weights_BC is None:
            return dense_BV.scatter_(1, rows_BC, 1.0)
        return dense_BV.scatter_add_(1, rows_BC, self.weights_BC.to(dtype))

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Impressions sorted by the row that they read, where each row's begin, and their weights.

        The same for every layer that reads the input.
        """
        places, starts_V = by_row(self.rows_BC.flatten(), self.num_rows)
        weights = None if self.weights_BC is None else self.weights_BC.flatten()[places]
        return places // self.rows_BC.shape[1], starts_V, weights


class _GatheredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, folded_VH: Tensor, one_hots: OneHots) -> Tensor:
        ctx.one_hots = one_hots  # type: ignore[attr-defined]
        return sum_rows(folded_VH, one_hots.rows_BC, None, one_hots.weights_BC)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BH: Tensor) -> tuple[Tensor, None]:
        one_hots: OneHots = ctx.one_hots  # type: ignore[attr-defined]
        return sum_rows(grad_BH.contiguous(), *one_hots.by_row), None


@dataclass(frozen=True, kw_only=True)
class FoldedInput:
    """The concatenated vectors x_BD, not computed; linear layers alone can read them.

    Attributes:
        widths: S of every block of x_BD: the categorical fields, then all numericals as one.
        vectors: vectors_RE of the folded blocks, by their place in ``widths``, ascending.
        one_hots: of the folded categorical fields; None without one.
        dense_BX: indicators of the numericals, where they are folded, and a 1 at the end.
        plain_BY: the other blocks of x_BD, side by side; None where all are folded.
    """

    widths: Sequence[int]
    vectors: Mapping[int, Tensor]
    one_hots: OneHots | None
    dense_BX: Tensor
    plain_BY: Tensor | None

    def linear(self, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
        """Return hidden_BH = x_BD @ weight_HD.T + bias_H."""
        # Taken apart at once: autograd would fill a whole gradient with zeros for every slice.
        weights_HS = torch.split(weight_HD, list(self.widths), dim=1)
        folded = [
            _fold(vectors_RE, weights_HS[block]) for block, vectors_RE in self.vectors.items()
        ]
        numericals = folded[-1:] if self.dense_BX.shape[1] > 1 else []
        fields = folded[: len(folded) - len(numericals)]
        if bias_H is not None:  # the indicator that is 1 brings it along with the numericals
            numericals = [*numericals, bias_H.unsqueeze(0)]
        hidden_BH = None
        if self.one_hots is not None:
            hidden_BH = self.one_hots.product(torch.cat(fields))
        if numericals:
            folded_XH = torch.cat([part.to(folded[0].dtype) for part in numericals])
            hidden_BH = _add_product(hidden_BH, self.dense_BX[:, : len(folded_XH)], folded_XH)
        if self.plain_BY is not None:
            rest = [weight for block, weight in enumerate(weights_HS) if block not in self.vectors]
            weight_YH = torch.cat(rest, dim=1).t()
            hidden_BH = _add_product(hidden_BH, self.plain_BY, weight_YH)
        assert hidden_BH is not None
        return hidden_BH


def _add_product(sum_BH: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    if sum_BH is None:
        return left @ right
    return sum_BH.addmm_(left.to(sum_BH.dtype), right.to(sum_BH.dtype))


def _fold(vectors_RE: Tensor, weight_HS: Tensor) -> Tensor:
    """Multiply a block's vectors by its weights: folded_RH."""
    num_rows, embedding_dim = vectors_RE.shape
    if weight_HS.shape[1] == embedding_dim:
        return vectors_RE @ weight_HS.t()
    # Numericals with a direction each: vector r has its own E columns.
    weight_HRE = weight_HS.reshape(-1, num_rows, embedding_dim)
    return torch.einsum("re,hre->rh", vectors_RE, weight_HRE)


Features = Tensor | FoldedInput
"""What a first layer reads: x_BD, or its folded form."""


def linear(x: Features, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
    """Return hidden_BH = x_BD @ weight_HD.T + bias_H, of either form of x_BD."""
    if isinstance(x, FoldedInput):
        return x.linear(weight_HD, bias_H)
    return functional.linear(x, weight_HD, bias_H)
