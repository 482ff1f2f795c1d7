"""The DiT baseline (Peebles & Xie 2022) in the flavour that the paper compares with.

All latents of an image are denoised together: free attention, fixed sine-cosine positions, SwiGLU,
RMSNorm without weights, adaLN-zero from the sum of timestep and class embedding. It shares the
noise law, the solver, the trainer and the latent sets with LatentLM.

Axes: B images, T latent positions (height * width), C latent channels, D hidden.
"""

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentlm_core.config import Config, Depth, Width
from latentlm_core.diffusion import DiffusionConfig, NoiseSchedule, SolverGrid, guided, solve
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.layout import AttentionMask
from latentlm_core.models.heads import FinalLayer
from latentlm_core.nn.attention import Attention
from latentlm_core.nn.layers import RMSNorm, SwiGLU, TimestepEmbedding, modulate, zero_init

Side = Annotated[int, Field(ge=1, le=256)]
"""Latents along one side of an image."""


class DiTSize(Config):
    """A DiT before its latents and classes are known."""

    kind: Literal["dit"] = "dit"
    """Which network this configures."""
    hidden_size: Width = Field(ge=4, multiple_of=4)
    """D, a multiple of 4 (positions) and of num_heads."""
    num_layers: Depth
    """Number of blocks."""
    num_heads: Width
    """Attention heads; must divide hidden_size."""
    intermediate_size: Width
    """Width of the gated feed-forward."""
    norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The noise law."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must divide hidden_size {self.hidden_size}"
            )
        return self

    def complete(self, grid: tuple[int, ...], channels: int, vocab_size: int) -> "DiTConfig":
        """The model for latents of a grid (height, width) and C channels.

        Raises:
            ConfigError: the latents are no image's.
        """
        if len(grid) != 2:
            raise ConfigError("A DiT takes images, whose latents have a height and a width.")
        return DiTConfig(
            **dict(self), grid=(grid[0], grid[1]), latent_channels=channels, vocab_size=vocab_size
        )


class DiTConfig(DiTSize):
    """A DiT over a grid of latents."""

    grid: tuple[Side, Side]
    """Height and width of the latents."""
    latent_channels: Width
    """C."""
    vocab_size: Width
    """Classes and one null class."""


class DiTBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition."""

    def __init__(self, config: DiTSize) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = RMSNorm(hidden, config.norm_eps)
        self.attention = Attention(hidden, config.num_heads, config.num_heads)
        self.feed_forward_norm = RMSNorm(hidden, config.norm_eps)
        self.feed_forward = SwiGLU(hidden, config.intermediate_size)
        self.modulation = zero_init(nn.Linear(hidden, 6 * hidden, bias=False))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, T, D) and the activated condition (B, 1, D) => (B, T, D)."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition).chunk(
            6, dim=-1
        )
        attended = modulate(self.attention_norm(x), shift_a, scale_a)
        x = x + gate_a * self.attention(attended, AttentionMask())
        fed = modulate(self.feed_forward_norm(x), shift_f, scale_f)
        return x + gate_f * self.feed_forward(fed)  # type: ignore[no-any-return]


class DiT(nn.Module):
    """Denoises whole images of latents, given a class."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.schedule = NoiseSchedule(config.diffusion)
        self.latent_embedding = nn.Linear(config.latent_channels, hidden)
        self.token_embedding = nn.Embedding(config.vocab_size, hidden)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.timestep_embedding = TimestepEmbedding(hidden)
        self.register_buffer("position", sine_cosine_positions(config.grid, hidden), False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.final = FinalLayer(hidden, config.latent_channels, config.norm_eps)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the target of the noise law.

        Args:
            x_t: (B, T, C) noisy latents in raster order.
            t: (B,) timesteps.
            labels: (B,) class ids, the last of the vocabulary for none.

        Returns:
            (B, T, C).
        """
        condition = self.timestep_embedding(t) + self.token_embedding(labels)
        return self.denoise(x_t, condition)

    def denoise(self, x_t: Tensor, condition: Tensor) -> Tensor:
        """``forward`` with the summed condition (B, D) at hand."""
        activated = F.silu(condition).unsqueeze(1)
        x = self.latent_embedding(x_t)
        x = x + self.position.to(x.dtype)
        for block in self.blocks:
            x = block(x, activated)
        return self.final(x, activated)  # type: ignore[no-any-return]

    def loss(self, x0: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Squared error (B, T) summed over channels, and the timesteps (B,) it was taken at.

        One timestep for a whole image, as DiT is trained; ``draws`` has a row for each image.
        """
        t = draws.integers(self.config.diffusion.num_train_timesteps, x0.shape[:1])
        noise = draws.normal(x0.shape)
        per_position = t.unsqueeze(1).expand(x0.shape[:2])
        x_t = self.schedule.add_noise(x0, noise, per_position)
        error = self(x_t, t, labels).float() - self.schedule.target(x0, noise, per_position)
        return error.square().sum(dim=-1), t

    def sample(
        self,
        labels: Tensor,
        noise: Tensor,
        grid: SolverGrid,
        guidance_scale: float = 1.0,
        fresh_noise: Tensor | None = None,
    ) -> Tensor:
        """Draw images of latents.

        Args:
            labels: (B,), or (2 B,) for guidance: conditional rows, then unconditional.
            noise: (B, T, C) float32 standard normal.
            grid: coefficients of the solver.
            guidance_scale: s in u + s (c - u); used with 2 B rows.
            fresh_noise: (S, B, T, C) for a stochastic solver.

        Returns:
            (B, T, C) float32 latents.
        """
        classes = self.token_embedding(labels)
        times = self.timestep_embedding(torch.tensor(grid.timesteps, device=labels.device))

        def predict(x_t: Tensor, i: int) -> Tensor:
            return self.denoise(x_t.to(classes.dtype), times[i] + classes).float()

        draw = None if fresh_noise is None else fresh_noise.__getitem__
        if labels.shape[0] == 2 * noise.shape[0]:
            return solve(guided(predict, guidance_scale), noise, grid, draw)
        return solve(predict, noise, grid, draw)


def sine_cosine_positions(grid: tuple[int, int], hidden_size: int) -> Tensor:
    """Fixed two-dimensional positions (T, D): the column's waves, then the row's.

    Half of D for each axis: sines, then cosines, of position * 10000^(-i / (D / 4)).
    """
    quarter = hidden_size // 4
    frequency = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    waves = [
        wave
        for axis in (columns, rows)
        for angle in [axis.reshape(-1, 1) * frequency]
        for wave in (angle.sin(), angle.cos())
    ]
    return torch.cat(waves, dim=1).float()
