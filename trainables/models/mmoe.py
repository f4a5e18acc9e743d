"""MMoE: experts shared by all tasks, a gate per task (Ma et al. 2018, doi:10.1145/3219819.3220007).

Shape suffixes: B batch, F fields, N numericals, D input, K experts, H hidden, T tasks.
"""

from typing import ClassVar

from torch import Tensor, nn

from trainables.models.embedding import FeatureEmbedding, Numericals
from trainables.models.gates import Gates, mix
from trainables.models.heads import Ctcvr, Towers
from trainables.models.inputs import Inputs
from trainables.models.mlp import MLP
from trainables.models.settings import check_at_least, check_dropout, check_units


class MMoE(nn.Module):
    """Predict clicks and conversions, each from its own mixture of the same experts.

    Args:
        inputs: the dataset's features.
        embedding_dim: width of each field's vector.
        num_experts: number of experts.
        expert_units: layers of each expert.
        gate_units: hidden layers of each gate; empty for the paper's plain linear gate.
        tower_units: hidden layers of each tower; empty for a plain linear one.
        ctcvr: conversion tower over all impressions (``direct``) or times p(click) (``product``).
        numericals: one projected field (``project``) or one direction each (``embed``).
        dropout: share of hidden values dropped while training.
        batch_norm: normalise hidden layers over the global batch.

    Raises:
        ValueError: a setting out of its range.
    """

    num_heads: ClassVar[int] = 2

    def __init__(
        self,
        inputs: Inputs,
        *,
        embedding_dim: int = 128,
        num_experts: int = 8,
        expert_units: tuple[int, ...] = (512, 256, 128),
        gate_units: tuple[int, ...] = (128, 64),
        tower_units: tuple[int, ...] = (128, 64),
        ctcvr: Ctcvr = "direct",
        numericals: Numericals = "project",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("num_experts", num_experts, 1)
        check_units("expert_units", expert_units)
        check_units("gate_units", gate_units, may_be_empty=True)
        check_units("tower_units", tower_units, may_be_empty=True)
        check_dropout(dropout)
        self.embedding = FeatureEmbedding(inputs, embedding_dim, numericals)
        num_inputs = self.embedding.num_outputs
        self.experts = MLP(
            num_inputs, expert_units, copies=num_experts, dropout=dropout, batch_norm=batch_norm
        )
        self.gates = Gates(
            self.num_heads,
            num_inputs,
            num_experts,
            gate_units,
            dropout=dropout,
            batch_norm=batch_norm,
        )
        self.towers = Towers(
            self.experts.num_outputs,
            tower_units,
            ctcvr=ctcvr,
            dropout=dropout,
            batch_norm=batch_norm,
        )

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return logits_BT: p(click) and p(conversion), both over all impressions."""
        input_BD = self.embedding.concatenate(ids_BF, numericals_BN)
        experts_KBH = self.experts(input_BD)
        mixed_TBH = mix(self.gates(input_BD), experts_KBH)
        logits_BT: Tensor = self.towers(mixed_TBH)
        return logits_BT
