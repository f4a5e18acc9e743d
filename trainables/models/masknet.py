"""MaskNet: blocks that multiply their input by a mask made from the impression itself.

Source: Wang et al. 2021, arXiv:2102.07619. Shape suffixes: B batch, F fields, N numericals, G
fields of the embedding, E embedding, D = G * E, H hidden, K blocks side by side.
"""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.models.batch_norm import BatchNorm
from trainables.models.embedding import FeatureEmbedding, Numericals
from trainables.models.folded_input import Features
from trainables.models.heads import Head
from trainables.models.inputs import Inputs
from trainables.models.mlp import MLP, Linear, ParallelLinear
from trainables.models.settings import check_at_least, check_dropout, check_option, check_units

Variant = Literal["serial", "parallel"]


class ChannelNorm(nn.Module):
    """Layer norm over the last dimension with a scale and shift per channel of a wider shape.

    With ``channels=(G, E)`` it is G layer norms side by side (LN_EMB of the paper, equation 8).
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, whose last dimensions are the channels; or x_KBH with channels (K, 1, H)."""
        return functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def _activation(norm: tuple[int, ...] | None, dropout: float) -> nn.Sequential:
    """[Batch norm], ReLU, [dropout]: what follows a block's layer norm."""
    layers: list[nn.Module] = [] if norm is None else [BatchNorm(norm)]
    layers.append(nn.ReLU())
    if dropout > 0.0:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class SerialBlocks(nn.Module):
    """Mask blocks in a row: the first masks the normalised embeddings, each other its predecessor.

    mask = W2 relu(W1 V_emb + b1) + b2 (equations 2 and 3), output = relu(LN(W (mask * hidden)))
    (equations 9 to 11). The first layers W1 of all masks read V_emb and are one product.
    """

    def __init__(
        self,
        num_inputs: int,
        units: tuple[int, ...],
        reduction_ratio: float,
        *,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        masked = (num_inputs, *units[:-1])
        self.aggregation_units = [_aggregation(width, reduction_ratio) for width in masked]
        self.aggregations = Linear(num_inputs, sum(self.aggregation_units))
        self.projections = nn.ModuleList(
            Linear(aggregation, width)
            for aggregation, width in zip(self.aggregation_units, masked, strict=True)
        )
        self.hidden = nn.ModuleList(
            Linear(width, unit, bias=False) for width, unit in zip(masked, units, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(unit) for unit in units)
        self.activations = nn.ModuleList(
            _activation((unit,) if batch_norm else None, dropout) for unit in units
        )
        self.num_outputs = units[-1]

    def forward(self, input_BD: Features, normalised_BD: Tensor) -> Tensor:
        """Return hidden_BH of the last block."""
        aggregated = torch.split(
            functional.relu(self.aggregations(input_BD)), self.aggregation_units, dim=1
        )
        hidden = normalised_BD
        for block, projection in enumerate(self.projections):
            mask = projection(aggregated[block])
            hidden = self.norms[block](self.hidden[block](mask * hidden))
            hidden = self.activations[block](hidden)
        return hidden


class ParallelBlocks(nn.Module):
    """Mask blocks side by side over the normalised embeddings, then a perceptron over them all."""

    def __init__(
        self,
        num_inputs: int,
        num_blocks: int,
        block_dim: int,
        units: tuple[int, ...],
        reduction_ratio: float,
        *,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        aggregation = _aggregation(num_inputs, reduction_ratio)
        self.masks = nn.Sequential(
            ParallelLinear(num_blocks, num_inputs, aggregation),
            nn.ReLU(),
            ParallelLinear(num_blocks, aggregation, num_inputs),
        )
        self.hidden = ParallelLinear(num_blocks, num_inputs, block_dim, bias=False)
        self.norm = ChannelNorm((num_blocks, 1, block_dim))
        self.activation = _activation((num_blocks, block_dim) if batch_norm else None, dropout)
        self.mlp = MLP(num_blocks * block_dim, units, dropout=dropout, batch_norm=batch_norm)
        self.num_outputs = self.mlp.num_outputs

    def forward(self, input_BD: Features, normalised_BD: Tensor) -> Tensor:
        """Return hidden_BH of the perceptron."""
        masks_KBD = self.masks(input_BD)
        blocks_KBH = self.activation(self.norm(self.hidden(masks_KBD * normalised_BD)))
        hidden_BH: Tensor = self.mlp(blocks_KBH.transpose(0, 1).flatten(1))
        return hidden_BH


def _aggregation(width: int, reduction_ratio: float) -> int:
    """Width of a mask's hidden layer, the ratio times the width of the mask."""
    return max(1, int(width * reduction_ratio))


class MaskNet(nn.Module):
    """Predict clicks by instance-guided masks.

    Args:
        inputs: the dataset's features.
        variant: ``serial``: blocks of ``hidden_units`` in a row; ``parallel``: ``num_blocks``
            blocks of ``block_dim`` side by side, then a perceptron of ``hidden_units``.
        embedding_dim: width of each field's vector.
        hidden_units: widths of the blocks in a row, or of the perceptron behind parallel blocks.
        num_blocks: parallel blocks (``parallel`` only).
        block_dim: width of a parallel block (``parallel`` only).
        reduction_ratio: width of a mask's hidden layer over the width of the mask, above 0.
        numericals: one projected field (``project``) or one direction each (``embed``).
        dropout: share of hidden values dropped while training.
        batch_norm: normalise hidden layers over the global batch, behind their layer norm.

    Raises:
        ValueError: a setting out of its range.
    """

    num_heads: ClassVar[int] = 1

    def __init__(
        self,
        inputs: Inputs,
        *,
        variant: Variant = "serial",
        embedding_dim: int = 40,
        hidden_units: tuple[int, ...] = (400, 400, 400),
        num_blocks: int = 3,
        block_dim: int = 64,
        reduction_ratio: float = 1.0,
        numericals: Numericals = "project",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_option("variant", variant, get_args(Variant))
        check_units("hidden_units", hidden_units)
        check_at_least("num_blocks", num_blocks, 1)
        check_at_least("block_dim", block_dim, 1)
        if not 0.0 < reduction_ratio < float("inf"):
            raise ValueError(f"reduction_ratio must be above 0 and finite, got {reduction_ratio}")
        check_dropout(dropout)
        self.embedding = FeatureEmbedding(inputs, embedding_dim, numericals)
        self.variant = variant
        self.norm = ChannelNorm((self.embedding.num_fields, embedding_dim))
        num_inputs = self.embedding.num_outputs
        self.blocks: SerialBlocks | ParallelBlocks
        if variant == "serial":
            self.blocks = SerialBlocks(
                num_inputs, hidden_units, reduction_ratio, dropout=dropout, batch_norm=batch_norm
            )
        else:
            self.blocks = ParallelBlocks(
                num_inputs,
                num_blocks,
                block_dim,
                hidden_units,
                reduction_ratio,
                dropout=dropout,
                batch_norm=batch_norm,
            )
        self.head = Head(self.blocks.num_outputs)

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return logits_B1: p(click)."""
        vectors_BGE = self.embedding(ids_BF, numericals_BN)
        input_BD = self.embedding.concatenate(ids_BF, numericals_BN, vectors_BGE)
        hidden_BH = self.blocks(input_BD, self.norm(vectors_BGE).flatten(1))
        logits_B1: Tensor = self.head(hidden_BH)
        return logits_B1
