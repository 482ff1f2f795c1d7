"""Norms, gated feed-forward, rotary positions, timestep embedding and adaptive modulation.

Linears carry no bias, as in the published model; norms have no weight unless they are asked to.

Axes: ``...`` is any shape, D hidden, H head dim, L positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x), over the last axis.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        affine: whether a weight (D,) multiplies the result.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, affine: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) => (..., D)."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) => (..., D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class TimestepEmbedding(nn.Module):
    """Sinusoids of an integer timestep, then two Linears.

    [cos(t w), sin(t w)] with w_i = 10000^(-i / 128), 256 wide, kept in float32 until the Linears.
    """

    frequency_size = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first = nn.Linear(self.frequency_size, hidden_size, bias=False)
        second = nn.Linear(hidden_size, hidden_size, bias=False)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        """(...) timesteps => (..., D)."""
        half = self.frequency_size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angle = t.float().unsqueeze(-1) * torch.exp(-math.log(10_000.0) * exponent)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        weight = next(self.mlp.parameters())
        return self.mlp(waves.to(weight.dtype))  # type: ignore[no-any-return]


def rotary_table(
    position: Tensor, head_dim: int, theta: float, end_inclusive: bool
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding (Su et al. 2021), in float32.

    Args:
        position: (..., L) positions.
        head_dim: H, even.
        theta: base wavelength.
        end_inclusive: the published model spaces the H / 2 exponents over [0, 1] with both ends;
            otherwise they are 2 i / H, as in Llama.

    Returns:
        cos and sin, (..., L, H / 2) each.
    """
    pairs = head_dim // 2
    exponent = torch.arange(pairs, dtype=torch.float32, device=position.device)
    exponent = exponent / (max(pairs - 1, 1) if end_inclusive else pairs)
    angle = position.unsqueeze(-1).float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of x (B, N, L, H) by angles (B or 1, 1, L, H / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift: adaptive layer norm (Peebles & Xie 2022)."""
    return torch.addcmul(shift, x, 1.0 + scale)


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Zero a Linear, so that what follows it starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
