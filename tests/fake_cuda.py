"""Tensors of a GPU without data: what mixes devices, or waits for a value, fails as on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latentlm_core.diffusion import SolverGrid

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_cuda(monkeypatch: Any, grid: SolverGrid) -> Iterator[FakeTensorMode]:
    """Inside the block tensors have no data; the solver's coefficients were computed before."""
    for module in ("sampling.base", "sampling.dit", "workflows.bench_plain"):
        monkeypatch.setattr(f"latentlm_core.{module}.solver_grid", lambda *given: grid)
    with FakeTensorMode() as mode:
        yield mode


def move(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype = torch.float32) -> None:
    """Move a network to the GPU (``nn.Module.to`` cannot leave data behind)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(
                module, name, nn.Parameter(mode.from_tensor(parameter).detach().to(CUDA, dtype))
            )
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer).to(CUDA))


class CudaDraws:
    """``Draws`` of a GPU's generator, which there is none of without a GPU."""

    def __init__(self, *given: Any) -> None:
        pass

    def normal(self, shape: Any, dim: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """See ``Draws``."""
        return torch.randn(tuple(shape), dtype=dtype, device=CUDA)

    def integers(self, high: int, shape: Any, dim: int = 0) -> Tensor:
        """See ``Draws``."""
        return torch.randint(high, tuple(shape), device=CUDA)
