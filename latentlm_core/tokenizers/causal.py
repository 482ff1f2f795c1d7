"""Bricks of causal networks on sequences: convolutions and blocks that can also run in pieces.

Notable choices:
    a layer run without a ``StreamState`` sees a whole sequence; with one it sees the next piece and
    keeps what later pieces need. Both take the same path through the same code, so a stream is
    the whole by construction, whatever its pieces are;
    an input that does not fill the last stride is completed with zeros, layer by layer, as the
    published code does it (VibeVoice, modular_vibevoice_tokenizer.py:257-430);
    sequences are (B, T, C): for PyTorch these are channels-last images of height 1, whose
    convolutions are several times faster on CPUs than its one-dimensional ones.

Axes: B rows, T positions, C channels, k kernel size, s stride.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentlm_core.nn.layers import RMSNorm


class StreamState:
    """What the layers of one network keep between the pieces of a stream.

    Attributes:
        is_final: the piece that is being run is the last one; layers complete what they hold.
    """

    def __init__(self) -> None:
        self.is_final = False
        self._kept: dict[nn.Module, Any] = {}

    def exchange(self, layer: nn.Module, kept: Any) -> None:
        """Keep something for ``layer`` until its next piece."""
        self._kept[layer] = kept

    def kept(self, layer: nn.Module) -> Any:
        """What ``layer`` kept, None at its first piece."""
        return self._kept.get(layer)


def sliding_input(
    layer: nn.Module, x: Tensor, kernel_size: int, stride: int, state: StreamState | None
) -> tuple[Tensor, int]:
    """The input of a sliding window that ends with, or before, the newest sample.

    Args:
        layer: whose window it is.
        x: (B, T, C) a whole sequence, or its next piece.
        kernel_size: k, at least ``stride``.
        stride: s.
        state: of the stream; None for a whole sequence.

    Returns:
        the past, x and what completes the last stride, (B, (N - 1) s + k, C), and N, the number of
        windows; with N = 0 the tensor is of no use.
    """
    past = kernel_size - stride
    before = None if state is None else state.kept(layer)
    x = F.pad(x, (0, 0, past, 0)) if before is None else torch.cat([before, x], dim=1)
    ends = state is None or state.is_final
    if ends and (rest := (x.shape[1] - past) % stride):
        x = F.pad(x, (0, 0, 0, stride - rest))
    num_windows = max((x.shape[1] - past) // stride, 0)
    if state is not None:
        state.exchange(layer, x[:, num_windows * stride :])
    return x[:, : num_windows * stride + past], num_windows


class CausalConv(nn.Module):
    """A convolution whose output i has seen inputs up to (i + 1) s - 1 and none after.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel_size: k, at least ``stride``.
        stride: s.
        groups: ``inputs`` for a depthwise convolution.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        shape = nn.Conv1d(inputs, outputs, kernel_size, stride, groups=groups)
        self.weight, self.bias = shape.weight, shape.bias
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, T, inputs) => (B, ceil(T / s), outputs); a piece gives what it completes."""
        x, num_windows = sliding_input(self, x, self.kernel_size, self.stride, state)
        if not num_windows:
            return x.new_empty(x.shape[0], 0, self.weight.shape[0])
        maps = F.conv2d(
            _as_maps(x), self.weight.unsqueeze(2), self.bias, (1, self.stride), groups=self.groups
        )
        return _as_sequence(maps)


class CausalConvTranspose(nn.Module):
    """An upsampling convolution: input i writes outputs from i s on, and only those.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: s; the kernel is 2 s long, so each output has seen two inputs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        shape = nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride)
        self.weight, self.bias = shape.weight, shape.bias
        self.stride = stride

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, T, inputs) => (B, T s, outputs)."""
        if not x.shape[1]:
            return x.new_empty(x.shape[0], 0, self.weight.shape[1])
        before = None if state is None else state.kept(self)
        start = 0 if before is None else self.stride
        if state is not None:
            state.exchange(self, x[:, -1:])
        whole = x if before is None else torch.cat([before, x], dim=1)
        weight = self.weight.unsqueeze(2)
        maps = F.conv_transpose2d(_as_maps(whole), weight, self.bias, (1, self.stride))
        return _as_sequence(maps)[:, start : start + x.shape[1] * self.stride]


class CausalBlock(nn.Module):
    """x + gamma conv(norm(x)), then x + gamma mlp(norm(x)) (ConvNeXt, Liu et al. 2022).

    The convolution is depthwise over 7 positions; gamma, a factor for each channel, is small at
    the start.

    Args:
        width: C.
        layer_scale: where gamma starts.
        norm_eps: of the norms.
    """

    kernel_size = 7

    def __init__(self, width: int, layer_scale: float, norm_eps: float) -> None:
        super().__init__()
        self.conv_norm = RMSNorm(width, norm_eps, affine=True)
        self.conv = CausalConv(width, width, self.kernel_size, groups=width)
        self.conv_gamma = nn.Parameter(torch.full((width,), layer_scale))
        self.mlp_norm = RMSNorm(width, norm_eps, affine=True)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.mlp_gamma = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, T, C) => (B, T, C)."""
        x = x + self.conv_gamma * self.conv(self.conv_norm(x), state)
        widened: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + self.mlp_gamma * widened


class CausalStack(nn.Sequential):
    """Causal layers one after the other."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, T, C) => (B, T', C')."""
        for layer in self:
            x = layer(x, state)
        return x


def _as_maps(x: Tensor) -> Tensor:
    """(B, T, C) => (B, C, 1, T), a view with channels last."""
    return x.unsqueeze(1).permute(0, 3, 1, 2)


def _as_sequence(maps: Tensor) -> Tensor:
    """(B, C, 1, T) => (B, T, C)."""
    return maps.squeeze(2).transpose(1, 2)
