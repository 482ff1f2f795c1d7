"""What a training step takes of the hardware: bfloat16, compiled blocks, blocks computed twice."""

import ctypes
import platform
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from latentlm_core.errors import ConfigError
from latentlm_core.runtime import has_bfloat16, missing_compiler

Precision = Literal["auto", "float32", "bfloat16"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's ``mallopt``: free bytes at the heap's end, and bytes of a block outside of it."""
KEPT_BYTES, MAX_MMAP_THRESHOLD = 1 << 30, 1 << 25
"""What they are set to; the second is the greatest that glibc takes."""


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype in which matrices are multiplied: ``auto`` is bfloat16 where it is built in.

    That is on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX, where it trains about twice
    as fast. Weights, optimizer and average stay float32 in any case.
    """
    if precision != "auto":
        return getattr(torch, precision)  # type: ignore[no-any-return]
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which losses are computed in ``dtype``; float32 is no autocast."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def require_compiler() -> None:
    """Make sure that ``torch.compile`` finds the C++ compiler that it takes by default.

    Raises:
        ConfigError: there is none.
    """
    command = missing_compiler()
    if command is not None:
        raise ConfigError(
            f"trainer.compile needs a C++ compiler, and {command} is not on this machine.",
            hint="Install one and name it in CXX, or train with --set trainer.compile=false.",
        )


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let the process keep memory that is freed, up to 1 GiB, for what comes next.

    The activations of a step are as large as those of the step before. By default glibc gives much
    of such memory back, and each of its pages is then zeroed anew: a sixth of a step of the demo's
    model. Other C libraries are left as they are.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        allocator.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def compile_blocks(module: nn.Module) -> None:
    """Compile the blocks of a network in place; parameter names stay as they are.

    Equal blocks share one compilation, so this costs seconds where the whole network costs minutes.
    """
    for block in blocks_of(module):
        block.compile()


def recompute_blocks(module: nn.Module) -> None:
    """Let each block of a network keep its inputs alone for the backward pass, and compute again.

    Nothing in a block draws random numbers, so none are put back for the second time.
    """
    for block in blocks_of(module):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts: outermost ``nn.Sequential``s, and the items of ``nn.ModuleList``s."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif isinstance(child, nn.Sequential):
            yield child
        else:
            yield from blocks_of(child)
