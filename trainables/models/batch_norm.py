"""Batch normalisation over the global batch of all ranks, on any device and backend.

torch.nn.SyncBatchNorm runs on GPUs alone; this one also runs on CPU ranks (gloo), and on many
layers side by side. Shape suffixes: B batch, K layers side by side, H hidden, W ranks.
"""

import torch
from torch import Tensor, distributed, nn


class _GatherRanks(torch.autograd.Function):
    """Stack a tensor of every rank; backward returns to each rank all that the ranks owe it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        num_ranks = distributed.get_world_size()
        ranks = local.new_empty((num_ranks * local.shape[0], *local.shape[1:]))
        distributed.all_gather_single(ranks, local.contiguous())
        return ranks.view(num_ranks, *local.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)
        return grad[distributed.get_rank()]


class BatchNorm(nn.Module):
    """Normalise each channel by the mean and variance of the global batch.

    The batch is the second-last dimension: x_BH with ``channels=(H,)``, or x_KBH with
    ``channels=(K, H)``. While training with a default process group of W > 1 ranks, the statistics
    are those of all ranks' batches together, with gradients through them: W ranks at batch B/W give
    what one rank gives at B. Ranks must hold equally many impressions. In eval mode the running
    averages normalise, as in torch.nn.BatchNorm1d (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Args:
        channels: shape of the channels.
        momentum: share of the newest batch in the running averages.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: tuple[int, ...], *, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x_BH or x_KBH; statistics in float32 or wider, result in x's type."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self._batch_statistics(wide)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift.unsqueeze(-2), wide, scale.unsqueeze(-2)).to(x.dtype)

    def _batch_statistics(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the global batch; moves the running averages."""
        count = wide.shape[-2]
        var, mean = torch.var_mean(wide, dim=-2, correction=0)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            local = torch.stack([mean, var])
            ranks: Tensor = _GatherRanks.apply(local)  # type: ignore[no-untyped-call]
            means_W, vars_W = ranks.unbind(1)
            # Within ranks plus between ranks: no difference of large squares.
            mean = means_W.mean(0)
            var = vars_W.mean(0) + (means_W - mean).square().mean(0)
            count *= distributed.get_world_size()
        with torch.no_grad():
            unbiased = var * (count / max(count - 1, 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var
