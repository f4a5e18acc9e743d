"""Softmax gates and the mixture of experts that they weigh.

Shape suffixes: B batch, D input, G gates, K experts, H hidden.
"""

import torch
from torch import Tensor, nn

from trainables.models.folded_input import Features
from trainables.models.mlp import MLP, ParallelLinear

NARROW = 32
"""Width of experts up to which a product and a sum is quicker than batched products (float32)."""


class Gates(nn.Module):
    """G gates, each a distribution over K experts per impression.

    Args:
        copies: G.
        num_inputs: D.
        num_experts: K.
        units: hidden layers of each gate; empty for a plain linear gate.
        dropout: share of hidden values dropped while training.
        batch_norm: normalise the hidden layers.
    """

    def __init__(
        self,
        copies: int,
        num_inputs: int,
        num_experts: int,
        units: tuple[int, ...],
        *,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.hidden = MLP(num_inputs, units, copies=copies, dropout=dropout, batch_norm=batch_norm)
        self.output = ParallelLinear(copies, self.hidden.num_outputs, num_experts)

    def forward(self, x: Features) -> Tensor:
        """Return weights_GBK, which sum to 1 over K, from x_BD (all gates) or x_GBD (one each)."""
        # Over a last dimension of few values torch's softmax takes 10 times as long.
        logits_GKB = self.output(self.hidden(x)).transpose(1, 2).contiguous()
        return torch.softmax(logits_GKB, dim=1).transpose(1, 2)


def mix(weights_GBK: Tensor, experts_KBH: Tensor) -> Tensor:
    """Weigh the experts by each gate: mixed_GBH."""
    if experts_KBH.dtype == torch.float32 and experts_KBH.shape[2] <= NARROW:
        return (weights_GBK.transpose(1, 2).unsqueeze(3) * experts_KBH).sum(1)
    # Contiguous: torch takes strided small matrices one by one, 4 times as long.
    return torch.einsum("gbk,kbh->gbh", weights_GBK.contiguous(), experts_KBH)
