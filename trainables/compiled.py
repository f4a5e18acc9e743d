"""What torch's compiler makes of a step, and whether it still computes the same.

The compiler of torch 2.13 has made another gradient of the same loss (docs/performance.md,
"Compiling on a CPU"), and nothing else tells: training goes on, to a worse model.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["compiled", "deviation"]

MAX_COMPILED = 1_000
"""Shapes of a model that a lane compiles; torch's 8 would leave the others as they are, unsaid."""

INDUCTOR_OPTIONS = {
    "inplace_buffers": False,  # torch 2.13 overwrites on a CPU what the gradient of PLE still reads
    "fallback_random": True,  # dropout draws the masks that it draws uncompiled
}

TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.3}
"""Of a weight's gradient, by the type of the products: far beyond rounding (1e-6 and 0.1)."""
NEGLIGIBLE = 0.01
"""Of the gradient of all weights: one as small may be rounding itself, as before a batch norm."""

_Computed = TypeVar("_Computed", bound=Callable[..., Any])


def compiled(computed: _Computed, backend: Callable[..., object] | None = None) -> _Computed:
    """Compile for batches of one size; another model of the same shapes finds it compiled.

    Args:
        computed: a model or a function, whose code is shared by all trials of a lane, whatever
            their shapes are.
        backend: of torch.compile; None for its own, inductor.
    """
    torch._dynamo.config.recompile_limit = MAX_COMPILED
    torch._dynamo.config.accumulated_recompile_limit = MAX_COMPILED
    chosen: dict[str, Any] = {"backend": backend} if backend else {"options": INDUCTOR_OPTIONS}
    found: _Computed = torch.compile(computed, dynamic=False, **chosen)  # type: ignore[assignment]
    return found


def deviation(
    model: nn.Module,
    loss: Callable[[], Tensor],
    compiled_loss: Callable[[], Tensor],
    dtype: torch.dtype,
) -> tuple[str, float] | None:
    """Find the weight whose gradient becomes another one when the loss is compiled.

    Args:
        model: whose weights they are, on a CPU. It is left without gradients, its buffers and
            torch's random state as they were; what else its `forward` changes is changed twice.
        loss: computes the loss of a batch, a 0-dim tensor.
        compiled_loss: the same, compiled.
        dtype: of the matrix products.

    Returns:
        The name of the weight whose gradients are furthest apart, and how far, as a share of their
        norm, infinite where the compiled one is not finite; None where that is rounding, and where
        the model's own are not finite, which the training tells.
    """
    own, found = (_gradients(model, one) for one in (loss, compiled_loss))
    norms = {name: _norm(gradient) for name, gradient in own.items()}
    negligible = max(NEGLIGIBLE * math.hypot(*norms.values()), sys.float_info.min)
    if not math.isfinite(negligible):
        return None
    apart = {
        name: _norm(_difference(own.get(name), found.get(name)))
        / max(norms.get(name, 0.0), negligible)
        for name in own | found
    }
    name = max(apart, key=apart.__getitem__)
    return (name, apart[name]) if apart[name] > TOLERANCE[dtype] else None


def _gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with torch.random.fork_rng(devices=()):
        model.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    for module, name, buffer, value in buffers:
        setattr(module, name, buffer.copy_(value))  # which `forward` may have put another for
    return gradients


def _difference(own: Tensor | None, found: Tensor | None) -> Tensor:
    if own is not None and found is not None:
        return found - own
    only = found if own is None else own
    assert only is not None
    return only


def _norm(gradient: Tensor) -> float:
    """Return the norm, infinite where there is no number."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return math.inf if math.isnan(norm) else norm
