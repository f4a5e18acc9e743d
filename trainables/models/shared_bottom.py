"""Shared-Bottom: one perceptron for both tasks, a tower for each.

Source: Caruana 1997, Multitask Learning, doi:10.1023/A:1007379606734. Shape suffixes: B batch,
F fields, N numericals, D input, H hidden, T tasks.
"""

from typing import ClassVar

from torch import Tensor, nn

from trainables.models.embedding import FeatureEmbedding, Numericals
from trainables.models.heads import Ctcvr, Towers
from trainables.models.inputs import Inputs
from trainables.models.mlp import MLP
from trainables.models.settings import check_dropout, check_units


class SharedBottom(nn.Module):
    """Predict clicks and conversions from one shared representation.

    Args:
        inputs: the dataset's features.
        embedding_dim: width of each field's vector.
        bottom_units: layers of the shared bottom.
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
        bottom_units: tuple[int, ...] = (512, 256, 128),
        tower_units: tuple[int, ...] = (128, 64),
        ctcvr: Ctcvr = "direct",
        numericals: Numericals = "project",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_units("bottom_units", bottom_units)
        check_units("tower_units", tower_units, may_be_empty=True)
        check_dropout(dropout)
        self.embedding = FeatureEmbedding(inputs, embedding_dim, numericals)
        self.bottom = MLP(
            self.embedding.num_outputs, bottom_units, dropout=dropout, batch_norm=batch_norm
        )
        self.towers = Towers(
            self.bottom.num_outputs,
            tower_units,
            ctcvr=ctcvr,
            dropout=dropout,
            batch_norm=batch_norm,
        )

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return logits_BT: p(click) and p(conversion), both over all impressions."""
        input_BD = self.embedding.concatenate(ids_BF, numericals_BN)
        logits_BT: Tensor = self.towers(self.bottom(input_BD))
        return logits_BT
