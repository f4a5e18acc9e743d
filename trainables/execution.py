"""How a trial is computed, by measured rules: folding, precision, CUDA graphs, memory.

Nothing here changes what is computed but for rounding. The measurements behind each rule are in
docs/performance.md.
"""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from trainables.models import MODELS
from trainables.models.embedding import FeatureEmbedding
from trainables.optimizers import Optimizers
from trainables.workers import Workers

__all__ = [
    "CudaGraph",
    "Folding",
    "Precision",
    "captures_steps",
    "check_can_compile",
    "compute_dtype",
    "fits_in_memory",
    "fold_embeddings",
    "keep_freed_memory",
    "memory_limits",
]

Folding = Literal["auto", "on", "off"]
Precision = Literal["auto", "float32", "bfloat16"]
CudaGraph = Literal["auto", "on", "off"]

GATHER_OPERATIONS = 64
"""What gathering a row costs, there and back, per output, in a product's operations."""
FOLD_SLACK = 1.15
"""A folded block may cost this much more operations than a plain one: it has no lookup."""
FOLD_MIN_SAVING = 0.3
"""Share of the first layer's operations that folding must save to pay for its many small ones."""

MEMORY_SHARE = 0.5
"""Of the memory that a dataset may take before it is streamed."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def fold_embeddings(model: nn.Module, folding: Folding, rows_per_step: int) -> None:
    """Fold a model's embeddings into the layers that read them, where that is quicker.

    Args:
        model: any model; one that has no FeatureEmbedding stays as it is.
        folding: ``auto`` by the rule of `_blocks_to_fold`, ``on`` every block, ``off`` none.
        rows_per_step: impressions per step of this worker.
    """
    for module in model.modules():
        if isinstance(module, FeatureEmbedding):
            blocks = list(range(len(module.block_widths)))
            if folding == "off":
                blocks = []
            elif folding == "auto":
                blocks = _blocks_to_fold(module, rows_per_step)
            module.fold(blocks)


def _blocks_to_fold(embedding: FeatureEmbedding, rows_per_step: int) -> list[int]:
    """Choose by operations per output of the first layer, forward and backward.

    A plain block of width S takes three products of rows_per_step x S. A folded one of R indicators
    takes three of R x E for the folding (E the embedding's width), and to read them: two products
    of rows_per_step x R (numericals), or the gathering of a row per id. On a GPU, where products
    are cheap and every operation costs a launch, nothing is folded.
    """
    if embedding.offsets_F.is_cuda:
        return []
    plain = [6 * rows_per_step * width for width in embedding.block_widths]
    reading = [GATHER_OPERATIONS * rows_per_step * length for length in embedding.bag_lengths]
    reading += [4 * rows_per_step * count for count in embedding.block_indicators[len(reading) :]]
    folded = [
        6 * embedding.embedding_dim * count + cost
        for count, cost in zip(embedding.block_indicators, reading, strict=True)
    ]
    blocks = [block for block, cost in enumerate(folded) if cost <= FOLD_SLACK * plain[block]]
    saved = sum(plain[block] - folded[block] for block in blocks)
    return blocks if saved >= FOLD_MIN_SAVING * sum(plain) else []


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type of the matrix products: ``auto`` is bfloat16 where the device has it.

    Of no size of model measured was it slower there by more than noise, small ones included.
    """
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def captures_steps(
    cuda_graph: CudaGraph, model_name: str, optimizers: Optimizers, workers: Workers
) -> bool:
    """Whether a training step is captured as a CUDA graph (see `trainables.captured_step`).

    It can be on one GPU with dense Adam: sparse gradients wait for the device, and steps of several
    workers wait for each other. ``auto`` leaves out a model of the user's own, which may wait too.

    Raises:
        ValueError: ``on`` where it cannot be.
    """
    is_one_gpu = workers.device.type == "cuda" and workers.size == 1
    possible = is_one_gpu and not optimizers.has_sparse
    if cuda_graph == "on" and not possible:
        raise ValueError(
            "training.cuda_graph: on needs a GPU, one worker per lane and dense Adam; "
            "set it to auto"
        )
    return possible and (cuda_graph == "on" or (cuda_graph == "auto" and model_name in MODELS))


def check_can_compile(device: torch.device, num_workers: int) -> None:
    """Check that a model can be compiled on this device for a lane of so many workers.

    Raises:
        ValueError: it cannot be.
    """
    if num_workers > 1:
        raise ValueError("training.compile: true needs one worker per lane; set it to false")
    if device.type == "cpu" and not _has_cpp_compiler():
        raise ValueError(
            "training.compile: true needs a C++ compiler on the lane's node, g++ or the one that "
            "CXX names; install it there, or set it to false"
        )


def _has_cpp_compiler() -> bool:
    # Not above: they load torch's compiler.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def fits_in_memory(size_bytes: int, limits: Iterable[int]) -> bool:
    """Whether a dataset is held in memory rather than streamed, where the job leaves it open.

    Args:
        size_bytes: of what is to be held at once.
        limits: in bytes, of every memory that has to hold it: it may take half of each.
    """
    return size_bytes <= MEMORY_SHARE * min(limits, default=math.inf)


def memory_limits(device: torch.device, gpu_share: float = 1.0) -> list[int]:
    """List what this process may use, in bytes.

    The node's memory, or less where a container has a limit; on a GPU its share of the GPU's, too.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limits.append(int(CGROUP_LIMIT.read_text()))
    if device.type == "cuda":
        limits.append(int(gpu_share * torch.cuda.get_device_properties(device).total_memory))
    return limits


@cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory that a step frees, for the next step.

    glibc gives every freed block above 32 MB back to the system and takes it anew, page fault by
    page fault: a paper-size step's large tensors cost 8 times their own work that way. The process
    keeps its peak until it ends. Other C libraries are left alone. In a thread that is not the
    first, blocks above 64 MB are kept only if the process was started with MALLOC_ARENA_MAX=1.

    Returns:
        Whether it is so.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = [mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_M_MMAP_MAX, 0)]
    return all(kept)
