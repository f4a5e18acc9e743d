"""Linear layers on a GPU: products that write the gradients in the weights' own type.

Under autocast, autograd computes the gradients of weights and biases in bfloat16 and converts them
afterwards, by a kernel for each and much memory traffic for the large ones. A product can write
float32 itself: it adds up in float32 anyway, so that nothing is rounded in between.

Shape suffixes: B batch, K layers side by side, D input, H hidden, O = K * H.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from trainables.models.folded_input import cast_as_read, linear_side_by_side


def linears(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply one linear layer, or K of one shape, as `torch.nn.functional.linear` each.

    Args:
        x: x_BD, read by all layers, or, with weight_KHD alone, x_KBD, layer k reading ``x[k]``.
        weight: weight_HD or weight_KHD.
        bias: bias_H or bias_KH; None for none.

    Returns:
        hidden_BH or hidden_KBH, contiguous; in autocast's type, where it is on. Differentiable
        once.
    """
    hidden: Tensor = _Linears.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return hidden


def linear_each(x_KBD: Tensor, weight_KHD: Tensor, bias_KH: Tensor | None) -> Tensor:
    """Return hidden_KBH of K layers, each of an input of its own: one batched product."""
    weight_KDH = weight_KHD.transpose(1, 2)
    if bias_KH is None:
        return torch.bmm(x_KBD, weight_KDH)
    return torch.baddbmm(bias_KH.unsqueeze(1), x_KBD, weight_KDH)


class _LinearsContext(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]
    needs_input_grad: tuple[bool, bool, bool]
    types: tuple[torch.dtype, torch.dtype]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _LinearsContext, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.types = x.dtype, weight.dtype
        x, weight = cast_as_read(x), cast_as_read(weight)
        bias = None if bias is None else cast_as_read(bias)
        ctx.save_for_backward(x, weight)
        if x.dim() == 3:
            return linear_each(x, weight, bias)
        if weight.dim() == 2:
            return functional.linear(x, weight, bias)
        # Not contiguous(), which is a view where K or B is 1: torch 2.11 compiles that one wrong.
        hidden_KBH = linear_side_by_side(x, weight, bias)
        return hidden_KBH.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearsContext, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_type, weight_type = ctx.types
        of_x, _, of_bias = ctx.needs_input_grad
        shape, x_shape = weight.shape, x.shape
        if x.dim() == 2:  # as one wide layer
            grad_BO = grad if grad.dim() == 2 else grad.transpose(0, 1).flatten(1)
            grad = grad_BO.unsqueeze(0)
            x, weight = x.unsqueeze(0), weight.flatten(0, -2).unsqueeze(0)
        grad_x = torch.bmm(grad, weight).to(x_type).view(x_shape) if of_x else None
        grad_weight = _product(grad.transpose(1, 2), x, weight_type).view(shape)
        grad_bias = None
        if of_bias:
            # On a GPU quicker than the sum.
            ones_K1B = grad.new_ones(1, 1, grad.shape[1]).expand(len(grad), -1, -1)
            grad_bias = _product(ones_K1B, grad, weight_type).view(shape[:-1])
        return grad_x, grad_weight, grad_bias


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the batched product in a type at least as wide as the factors'.

    On a CPU, where tests compute it, it is rounded to the factors' type first.
    """
    if left.dtype == dtype or not left.is_cuda:
        return torch.bmm(left, right).to(dtype)
    return torch.bmm(left, right, out_dtype=dtype)
