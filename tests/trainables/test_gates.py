"""Mixtures of experts equal the sums that they stand for."""

import pytest
import torch

from trainables.models.gates import NARROW, mix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [NARROW, NARROW + 1])
def test_a_mixture_is_the_weighted_sum_of_its_experts(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_GKB = torch.randn(2, 3, 5, dtype=dtype)
    experts_KBH = torch.randn(3, 5, width, dtype=dtype)
    weights_GBK = torch.softmax(logits_GKB, dim=1).transpose(1, 2)
    wanted = torch.stack(
        [
            sum(weights_BK[:, k, None] * experts_KBH[k] for k in range(3))
            for weights_BK in weights_GBK
        ]
    )
    torch.testing.assert_close(mix(weights_GBK, experts_KBH), wanted)
