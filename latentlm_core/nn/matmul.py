"""Products of matrices by oneDNN where the default is slower: float32 on a CPU.

Notable: PyTorch multiplies float32 with MKL, which uses AVX-512 on Intel's processors alone; on
others oneDNN, which comes with PyTorch too, is about twice as fast from 16 rows on (measured on an
AMD EPYC: 109 us for 230 us). Results differ in the last digits, so this is for sampling alone, and
for as long as the mode is entered.
"""

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


class OneDNNLinear(TorchFunctionMode):
    """``F.linear`` by oneDNN for as long as this is entered."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take over what is an ``F.linear``."""
        if func is F.linear and not kwargs:
            return torch.ops.latentlm.linear(*args)
        return func(*args, **(kwargs or {}))


def fast_linear(weight: Tensor, num_rows: int) -> AbstractContextManager[Any]:
    """A context in which products of so many rows with weights like this one are fast."""
    is_suited = weight.device.type == "cpu" and weight.dtype == torch.float32
    if is_suited and num_rows >= MIN_ROWS and HAS_ONEDNN:
        return OneDNNLinear()
    return nullcontext()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# An operator of our own, because the compiler takes oneDNN's with weights of its own layout alone.
_library = torch.library.Library("latentlm", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
_library.impl("linear", _shape_of_linear, "Meta")  # type: ignore[no-untyped-call]
