"""From hidden vectors to logits: the towers of multi-task models, the head of single-task ones.

The last layer is computed in float32 whatever autocast says: a bfloat16 logit near -4 has steps of
0.03, so that impressions of different scores would tie in the ranking loss and in the AUC.

Shape suffixes: B batch, H hidden, T tasks.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.models.mlp import MLP, ParallelLinear
from trainables.models.settings import check_option

Ctcvr = Literal["direct", "product"]


def product_logit(first_logit: Tensor, second_logit: Tensor) -> Tensor:
    """Return the logit of the product of two probabilities given by their logits.

    log p1 p2 - log(1 - p1 p2), with 1 - p1 p2 = (1 - p1) + p1 (1 - p2): every part a log of a
    sigmoid, so that it is exact where the probabilities themselves have rounded to 0 or 1. NaN
    stays NaN.

    Args:
        first_logit: logit of p1, any shape.
        second_logit: logit of p2, the same shape.

    Returns:
        logit of p1 * p2, the same shape.
    """
    log_first = functional.logsigmoid(first_logit)
    log_product = log_first + functional.logsigmoid(second_logit)
    log_complement = torch.logaddexp(
        functional.logsigmoid(-first_logit), log_first + functional.logsigmoid(-second_logit)
    )
    return log_product - log_complement


class Head(nn.Module):
    """One linear layer to the logit of p(click), in float32."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.output = nn.Linear(num_inputs, 1)

    def forward(self, hidden_BH: Tensor) -> Tensor:
        """Return logits_B1."""
        with torch.autocast(hidden_BH.device.type, enabled=False):
            logits_B1: Tensor = self.output(hidden_BH.to(self.output.weight.dtype))
        return logits_B1


class Towers(nn.Module):
    """Two towers, clicks and conversions, and the logits of p(click) and p(conversion).

    Args:
        num_inputs: width of the towers' input.
        units: hidden layers of each tower; empty for a plain linear one.
        ctcvr: ``direct``: the second tower predicts conversion over all impressions; ``product``:
            it predicts conversion given a click, and its probability is multiplied by p(click).
        dropout: share of hidden values dropped while training.
        batch_norm: normalise the hidden layers.

    Raises:
        ValueError: ``ctcvr`` is no option.
    """

    def __init__(
        self,
        num_inputs: int,
        units: tuple[int, ...],
        *,
        ctcvr: Ctcvr,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        check_option("ctcvr", ctcvr, get_args(Ctcvr))
        self.ctcvr = ctcvr
        self.hidden = MLP(num_inputs, units, copies=2, dropout=dropout, batch_norm=batch_norm)
        self.output = ParallelLinear(2, self.hidden.num_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits_BT (click, conversion over all impressions) from x_BH or x_TBH."""
        hidden = self.hidden(x)
        with torch.autocast(hidden.device.type, enabled=False):
            weight_T1H, bias_T1 = self.output.weight_KHD, self.output.bias_KH
            # A product and a sum also spread hidden_BH, which towers without layers share.
            logits_TB = (hidden.to(weight_T1H.dtype) * weight_T1H).sum(-1) + bias_T1
            click_B, second_B = logits_TB.unbind(0)
            if self.ctcvr == "product":
                second_B = product_logit(click_B, second_B)
            return torch.stack([click_B, second_B], dim=1)
