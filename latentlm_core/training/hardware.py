"""What the hardware offers a training step: bfloat16 and compiled blocks."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bfloat16"]


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype in which matrices are multiplied: ``auto`` is bfloat16 where it is built in.

    That is on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX, where it trains about twice
    as fast. Weights, optimizer and average stay float32 in any case.
    """
    if precision != "auto":
        return getattr(torch, precision)  # type: ignore[no-any-return]
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated parts of a network in place; parameter names stay as they are.

    A part is an item of an outermost ``nn.ModuleList`` or an outermost ``nn.Sequential``. Equal
    blocks share one compilation, so this costs seconds where the whole network costs minutes.
    """
    for block in _blocks(module):
        block.compile()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif isinstance(child, nn.Sequential):
            yield child
        else:
            yield from _blocks(child)
