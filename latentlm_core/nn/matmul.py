"""Products of matrices where the default is slower: float32 on a CPU.

Notable: PyTorch multiplies float32 with MKL, which uses AVX-512 on Intel's processors alone; on
others oneDNN, which comes with PyTorch too, is about twice as fast from 16 rows on (measured on an
AMD EPYC: 109 us for 230 us). Of one or two rows MKL reads the weights once for each, on one core; a
compiler that is given a product and a sum instead shares them among the cores. Results differ in
the last digits, so this is for sampling alone, and for as long as a mode is entered.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
"""Whether this PyTorch was built with it."""
MIN_ROWS = 16
"""Fewer rows are a matter of reading the weights, where MKL is the faster one."""
FEW_ROWS = 2
"""So many rows are multiplied and summed one by one; with 4, MKL is twice as fast as that."""


class FastLinear(TorchFunctionMode):
    """``F.linear`` by the way that is fastest for its number of rows, while this is entered.

    Args:
        few_rows: up to so many are multiplied and summed one by one.
    """

    def __init__(self, few_rows: int = 0) -> None:
        super().__init__()
        self._few_rows = few_rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take over what is an ``F.linear`` of many rows, or of few."""
        if func is F.linear and not kwargs:
            num_rows = math.prod(args[0].shape[:-1])
            if num_rows >= MIN_ROWS and HAS_ONEDNN:
                return torch.ops.latentlm.linear(*args)
            if 0 < num_rows <= self._few_rows:
                return _row_by_row(*args)
        return func(*args, **(kwargs or {}))


def fast_linear(weight: Tensor, num_rows: int) -> AbstractContextManager[Any]:
    """A context in which products of so many rows with weights like this one are fast."""
    is_many = num_rows >= MIN_ROWS and HAS_ONEDNN
    return FastLinear() if is_many and _is_suited(weight) else nullcontext()


def compiled_linear(weight: Tensor) -> AbstractContextManager[Any]:
    """The same in code that is compiled, where each product may have rows of its own number."""
    return FastLinear(FEW_ROWS) if _is_suited(weight) else nullcontext()


def _is_suited(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = [(weight * row).sum(-1) for row in x.flatten(0, -2)]
    product = torch.stack(rows).view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# An operator of our own, because the compiler takes oneDNN's with weights of its own layout alone.
_library = torch.library.Library("latentlm", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
_library.impl("linear", _shape_of_linear, "Meta")  # type: ignore[no-untyped-call]
