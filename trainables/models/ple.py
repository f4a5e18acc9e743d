"""PLE: experts of each task beside shared ones, level by level (Tang et al. 2020).

Source: doi:10.1145/3383313.3412236, equations 4 to 8. Shape suffixes: B batch, F fields, N
numericals, D input, P experts of one task, S shared experts, K all experts (T * P task experts,
then S shared ones), H hidden, T tasks.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from trainables.models.embedding import FeatureEmbedding, Numericals
from trainables.models.folded_input import Features
from trainables.models.gates import Gates, mix
from trainables.models.heads import Ctcvr, Towers
from trainables.models.inputs import Inputs
from trainables.models.mlp import MLP
from trainables.models.settings import check_at_least, check_dropout, check_units


class ExtractionLevel(nn.Module):
    """One level: all experts, a gate per task over its own and the shared experts.

    Every level but the last also has a shared gate over all experts, the next level's shared input.
    """

    def __init__(
        self,
        num_inputs: int,
        expert_units: tuple[int, ...],
        gate_units: tuple[int, ...],
        *,
        num_tasks: int,
        num_task_experts: int,
        num_shared_experts: int,
        is_last: bool,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_task_experts = num_task_experts
        self.num_shared_experts = num_shared_experts
        num_experts = num_tasks * num_task_experts + num_shared_experts
        self.experts = MLP(
            num_inputs, expert_units, copies=num_experts, dropout=dropout, batch_norm=batch_norm
        )
        self.task_gates = Gates(
            num_tasks,
            num_inputs,
            num_task_experts + num_shared_experts,
            gate_units,
            dropout=dropout,
            batch_norm=batch_norm,
        )
        self.shared_gate: Gates | None = None
        if not is_last:
            self.shared_gate = Gates(
                1, num_inputs, num_experts, gate_units, dropout=dropout, batch_norm=batch_norm
            )

    def forward(self, tasks: Features, shared_BD: Features) -> tuple[Tensor, Features]:
        """Extract one level further.

        Args:
            tasks: tasks_TBD, each task's input; on the first level, where all read the same,
                shared_BD itself.
            shared_BD: input of the shared experts and the shared gate.

        Returns:
            mixed_TBH per task, and mixed_BH of the shared gate (after the last level: shared_BD).
        """
        experts_KBH = self.experts(self._expert_inputs(tasks, shared_BD))
        own_KBH, common_SBH = experts_KBH.split(
            [self.num_tasks * self.num_task_experts, self.num_shared_experts]
        )
        own_TPBH = own_KBH.unflatten(0, (self.num_tasks, self.num_task_experts))
        weights_TBP, weights_TBS = self.task_gates(tasks).split(
            [self.num_task_experts, self.num_shared_experts], dim=-1
        )
        own_TBH = torch.einsum("tbp,tpbh->tbh", weights_TBP, own_TPBH)
        mixed_TBH = own_TBH + mix(weights_TBS, common_SBH)
        if self.shared_gate is None:
            return mixed_TBH, shared_BD
        return mixed_TBH, mix(self.shared_gate(shared_BD), experts_KBH).squeeze(0)

    def _expert_inputs(self, tasks: Features, shared_BD: Features) -> Features:
        if not isinstance(tasks, Tensor) or not isinstance(shared_BD, Tensor) or tasks.dim() == 2:
            return shared_BD
        tasks_KBD = tasks.repeat_interleave(self.num_task_experts, dim=0)
        return torch.cat([tasks_KBD, shared_BD.expand(self.num_shared_experts, -1, -1)])


class PLE(nn.Module):
    """Predict clicks and conversions by progressive layered extraction.

    Args:
        inputs: the dataset's features.
        embedding_dim: width of each field's vector.
        num_levels: extraction levels; 1 is the paper's CGC.
        num_experts: shared experts per level.
        num_task_experts: experts of each task per level.
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
        num_levels: int = 1,
        num_experts: int = 8,
        num_task_experts: int = 1,
        expert_units: tuple[int, ...] = (512, 256, 128),
        gate_units: tuple[int, ...] = (128, 64),
        tower_units: tuple[int, ...] = (128, 64),
        ctcvr: Ctcvr = "direct",
        numericals: Numericals = "project",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("num_levels", num_levels, 1)
        check_at_least("num_experts", num_experts, 1)
        check_at_least("num_task_experts", num_task_experts, 1)
        check_units("expert_units", expert_units)
        check_units("gate_units", gate_units, may_be_empty=True)
        check_units("tower_units", tower_units, may_be_empty=True)
        check_dropout(dropout)
        self.embedding = FeatureEmbedding(inputs, embedding_dim, numericals)
        self.levels = nn.ModuleList(
            ExtractionLevel(
                self.embedding.num_outputs if level == 0 else expert_units[-1],
                expert_units,
                gate_units,
                num_tasks=self.num_heads,
                num_task_experts=num_task_experts,
                num_shared_experts=num_experts,
                is_last=level == num_levels - 1,
                dropout=dropout,
                batch_norm=batch_norm,
            )
            for level in range(num_levels)
        )
        self.towers = Towers(
            expert_units[-1], tower_units, ctcvr=ctcvr, dropout=dropout, batch_norm=batch_norm
        )

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return logits_BT: p(click) and p(conversion), both over all impressions."""
        shared = self.embedding.concatenate(ids_BF, numericals_BN)
        tasks = shared
        for level in self.levels:
            tasks, shared = level(tasks, shared)
        logits_BT: Tensor = self.towers(tasks)
        return logits_BT
