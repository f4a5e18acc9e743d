"""Layers that the architectures share: a perceptron, and many of one shape side by side.

Shape suffixes: B batch, K layers side by side (experts, gates, towers), D input, H hidden.
"""

import math

import torch
from torch import Tensor, nn

from trainables.models.batch_norm import BatchNorm
from trainables.models.folded_input import Features, FoldedInput, linear, linear_side_by_side
from trainables.models.linears import linear_each, linears


class Linear(nn.Linear):
    """nn.Linear of x_BD, which may be a folded input."""

    def forward(self, x: Features) -> Tensor:
        """Return hidden_BH."""
        if isinstance(x, Tensor) and x.is_cuda:
            return linears(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


class ParallelLinear(nn.Module):
    """K linear layers of one shape.

    ``weight_KHD[k]`` and ``bias_KH[k]`` are layer k's, laid out and initialised as in nn.Linear.

    Args:
        copies: K.
        num_inputs: D.
        num_outputs: H.
        bias: whether the layers have a bias.
    """

    def __init__(
        self, copies: int, num_inputs: int, num_outputs: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight_KHD = nn.Parameter(torch.empty(copies, num_outputs, num_inputs))
        self.bias_KH = nn.Parameter(torch.empty(copies, num_outputs)) if bias else None
        bound = 1.0 / math.sqrt(num_inputs)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Features) -> Tensor:
        """Apply every layer.

        Args:
            x: x_BD, read by all layers (one wide matrix product, or what its folded form takes),
                or x_KBD, layer k reading ``x[k]`` (one batched product).

        Returns:
            hidden_KBH.
        """
        if isinstance(x, Tensor) and x.is_cuda:
            return linears(x, self.weight_KHD, self.bias_KH)
        if isinstance(x, FoldedInput) or x.dim() == 2:
            # Contiguous: the next batched product's backward takes 5 times longer on strided input.
            return linear_side_by_side(x, self.weight_KHD, self.bias_KH).contiguous()
        return linear_each(x, self.weight_KHD, self.bias_KH)


class MLP(nn.Sequential):
    """Linear, [batch norm], ReLU, [dropout] per layer; one perceptron or ``copies`` side by side.

    Reads x_BD; with ``copies`` K also x_KBD, one input per copy. Returns hidden_BH, or hidden_KBH
    with ``copies``. Without layers it returns its input as it is.

    Args:
        num_inputs: D.
        units: the layers' widths; may be empty.
        copies: K perceptrons side by side, None for a single one.
        dropout: share of hidden values dropped while training, 0 for none.
        batch_norm: normalise before each ReLU; it takes the linear bias out again, so there is
            none.
    """

    def __init__(
        self,
        num_inputs: int,
        units: tuple[int, ...],
        *,
        copies: int | None = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        width = num_inputs
        for unit in units:
            if copies is None:
                layers.append(Linear(width, unit, bias=not batch_norm))
            else:
                layers.append(ParallelLinear(copies, width, unit, bias=not batch_norm))
            if batch_norm:
                layers.append(BatchNorm((unit,) if copies is None else (copies, unit)))
            layers.append(nn.ReLU(inplace=True))  # nothing else reads what it overwrites
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
            width = unit
        super().__init__(*layers)
        self.num_outputs = width
