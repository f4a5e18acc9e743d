"""The first layer folded into the embedding: exact, and cheaper where vocabularies are small.

A first layer reads the concatenated vectors of all fields, and a linear layer of a concatenation is
a sum over fields. A field's share is (indicators of its value) @ (its vectors @ its slice of the
weights): its few vectors meet the weights once per step instead of once per impression.

    concat_f(indicators_f @ vectors_f) @ W.T = concat_f(indicators_f) @ concat_f(vectors_f @ W_f.T)

A categorical field's indicators are one-hot over its vocabulary, a numerical's is its value, that
of a projection's bias is 1. They need no gradient, which saves the third product of a layer.
Outputs and gradients equal the plain form's up to rounding.

Shape suffixes: B batch, E embedding, D input (all fields), X indicators of the folded fields, Y
input of the others, H hidden, R rows of one field's vectors, S width of one field's input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class FoldedInput:
    """The concatenated vectors x_BD, not computed; linear layers alone can read them.

    Attributes:
        widths: S of every block of x_BD: the categorical fields, then all numericals as one.
        vectors: vectors_RE of the folded blocks, by their place in ``widths``, ascending.
        indicators_BX: of the folded blocks, in the same order.
        plain_BY: the other blocks of x_BD, side by side; None where all are folded.
    """

    widths: Sequence[int]
    vectors: Mapping[int, Tensor]
    indicators_BX: Tensor
    plain_BY: Tensor | None

    def linear(self, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
        """Return hidden_BH = x_BD @ weight_HD.T + bias_H."""
        # Taken apart at once: autograd would fill a whole gradient with zeros for every slice.
        weights_HS = torch.split(weight_HD, list(self.widths), dim=1)
        folded_XH = torch.cat(
            [_fold(vectors_RE, weights_HS[block]) for block, vectors_RE in self.vectors.items()]
        )
        indicators_BX = self.indicators_BX.to(folded_XH.dtype)
        if bias_H is None:
            hidden_BH = indicators_BX @ folded_XH
        else:
            hidden_BH = torch.addmm(bias_H, indicators_BX, folded_XH)
        if self.plain_BY is None:
            return hidden_BH
        rest = [weight for block, weight in enumerate(weights_HS) if block not in self.vectors]
        return hidden_BH + functional.linear(self.plain_BY, torch.cat(rest, dim=1))


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
