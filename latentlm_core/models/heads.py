"""The diffusion head: a small network that draws the next latent from a state.

It has no attention: every latent is denoised on its own, given the backbone's state. The head owns
its noise law, its loss and its draw; the backbone's output is computed once and reused for every
noise repeat of training and for every solver step of sampling.

One class holds the published image head and, by its configuration, VibeVoice's (affine norms, no
norm before the condition's projection, no bias on the latent's embedding).

Axes: N latents, C latent channels, D hidden, R noise repeats.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from latentlm_core.config import Config, Depth, Width
from latentlm_core.diffusion import DiffusionConfig, NoiseSchedule, SolverGrid
from latentlm_core.draws import Draws
from latentlm_core.nn.layers import RMSNorm, SwiGLU, TimestepEmbedding, modulate, zero_init

GuidedOutput = Callable[[Tensor, Sequence[Tensor], float | Tensor], Tensor]
"""``DiffusionHead.guided_output`` or the same compiled."""

MAX_MODULATIONS = 1 << 20
"""Numbers that ``sample`` holds at once of what timesteps and states do to the layers: so few that
a processor's cache holds them."""
MAX_MODULATIONS_CUDA = 1 << 27
"""The same on a GPU, where it is launches that cost."""


class DiffusionHeadConfig(Config):
    """Size, flavour and noise law of a diffusion head."""

    num_layers: Depth
    """Number of modulated feed-forward blocks."""
    intermediate_size: Width
    """Width of the gated feed-forward."""
    noise_repeats: int = Field(default=4, ge=1, le=1000)
    """Timesteps and noises drawn per state in training: the backbone's output is reused."""
    norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    norm_affine: bool = False
    """Whether the blocks' norms carry a weight (VibeVoice: true)."""
    condition_norm: bool = True
    """Whether the state is normalised before its projection (VibeVoice: false)."""
    latent_bias: bool = True
    """Whether the embedding of the noisy latent has a bias (VibeVoice: false)."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The noise law."""


class HeadBlock(nn.Module):
    """x + gate * SwiGLU(norm(x) * (1 + scale) + shift), gates zero at the start."""

    def __init__(self, hidden_size: int, config: DiffusionHeadConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, config.norm_eps, config.norm_affine)
        self.feed_forward = SwiGLU(hidden_size, config.intermediate_size)
        self.modulation = zero_init(nn.Linear(hidden_size, 3 * hidden_size, bias=False))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(..., D) and the activated condition (..., D) => (..., D)."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.feed_forward(modulate(self.norm(x), shift, scale)))

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``forward`` with the modulation (..., 3 D) at hand: shift, 1 + scale, gate."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        fed = self.feed_forward(torch.addcmul(shift, self.norm(x), scale))
        return torch.addcmul(x, gate, fed)


class FinalLayer(nn.Module):
    """Modulated norm and projection to latent channels; both start at zero."""

    def __init__(self, hidden_size: int, latent_channels: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.modulation = zero_init(nn.Linear(hidden_size, 2 * hidden_size, bias=False))
        self.projection = zero_init(nn.Linear(hidden_size, latent_channels, bias=False))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(..., D) and the activated condition (..., D) => (..., C)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.projection(modulate(self.norm(x), shift, scale))  # type: ignore[no-any-return]

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``forward`` with the modulation (..., 2 D) at hand: shift, 1 + scale."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.projection(torch.addcmul(shift, self.norm(x), scale))  # type: ignore[no-any-return]


class DiffusionHead(nn.Module):
    """Draws latents given states.

    Args:
        config: of the head.
        hidden_size: D of the backbone.
        latent_channels: C.
    """

    def __init__(self, config: DiffusionHeadConfig, hidden_size: int, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = latent_channels
        self.schedule = NoiseSchedule(config.diffusion)
        self.latent_embedding = nn.Linear(latent_channels, hidden_size, bias=config.latent_bias)
        self.timestep_embedding = TimestepEmbedding(hidden_size)
        self.condition_norm = (
            RMSNorm(hidden_size, config.norm_eps) if config.condition_norm else nn.Identity()
        )
        self.condition_projection = nn.Linear(hidden_size, hidden_size, bias=False)
        self.blocks = nn.ModuleList(
            HeadBlock(hidden_size, config) for _ in range(config.num_layers)
        )
        self.final = FinalLayer(hidden_size, latent_channels, config.norm_eps)

    def embed_times(self, grid: SolverGrid) -> Tensor:
        """What the head is told about each step of a solver, (S, D)."""
        device = self.latent_embedding.weight.device
        return self.timestep_embedding(torch.tensor(grid.timesteps, device=device))  # type: ignore[no-any-return]

    def condition(self, states: Tensor) -> Tensor:
        """Backbone states (..., D) => condition (..., D), computed once per state."""
        return self.condition_projection(self.condition_norm(states))  # type: ignore[no-any-return]

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict the target of the noise law.

        Args:
            x_t: (..., C) noisy latents.
            t: (...) timesteps.
            condition: (..., D) from ``condition``.

        Returns:
            (..., C) the network's output (v, epsilon or x0).
        """
        return self.denoise(x_t, self.timestep_embedding(t), condition)

    def denoise(self, x_t: Tensor, t_embedding: Tensor, condition: Tensor) -> Tensor:
        """``forward`` with the timestep embedded already, (..., D) or (D,)."""
        activated = F.silu(condition + t_embedding)
        x = self.latent_embedding(x_t)
        for block in self.blocks:
            x = block(x, activated)
        return self.final(x, activated)  # type: ignore[no-any-return]

    def loss(self, x0: Tensor, condition: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Squared error of the prediction (Eq. 3), each state with R noises of its own.

        Args:
            x0: (N, C) clean latents.
            condition: (N, D).
            draws: on the device of ``x0``, a row for each latent.

        Returns:
            squared error (R, N) float32, summed over channels, and timesteps (R, N).
        """
        repeats = (self.config.noise_repeats, x0.shape[0])
        steps = self.config.diffusion.num_train_timesteps
        t = draws.integers(steps, repeats, dim=1)
        noise = draws.normal((*repeats, x0.shape[1]), dim=1)
        x_t = self.schedule.add_noise(x0, noise, t)
        output = self(x_t, t, condition.expand(repeats[0], -1, -1))
        error = output.float() - self.schedule.target(x0, noise, t)
        return error.square().sum(dim=-1), t

    def modulations(self, condition: Tensor, t_embeddings: Tensor) -> tuple[Tensor, ...]:
        """What conditions (N, D) and embedded timesteps (S, D) do to every layer.

        All are known before the first solver step, so each layer multiplies once.

        Returns:
            of each block (S, N, 3 D): shift, 1 + scale, gate; of the last layer (S, N, 2 D).
        """
        activated = F.silu(condition + t_embeddings.unsqueeze(1))
        width = condition.shape[-1]
        made = [layer.modulation(activated) for layer in (*self.blocks, self.final)]
        for modulation in made:
            modulation[..., width : 2 * width] += 1.0
        return tuple(made)

    def modulated(self, x_t: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """``denoise`` with the modulations of one timestep at hand.

        Args:
            x_t: (N, C), or (N / 2, C) for guidance: both halves of the rows see the same.
            modulations: of N rows, as ``modulations`` has them for each step.

        Returns:
            (N, C).
        """
        x = self.latent_embedding(x_t)
        *of_blocks, of_final = modulations
        if of_final.shape[0] != x.shape[0]:
            x = torch.cat([x, x])
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            x = block.modulated(x, modulation)  # type: ignore[operator]
        return self.final.modulated(x, of_final)

    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        grid: SolverGrid,
        t_embeddings: Tensor,
        guidance_scale: float | Tensor = 1.0,
        fresh_noise: Tensor | None = None,
        guided_steps: range | None = None,
        guided_output: GuidedOutput | None = None,
    ) -> Tensor:
        """Draw latents.

        Args:
            condition: (N, D), or (2 N, D) for guidance: conditional rows, then unconditional.
            noise: (N, C) float32 standard normal.
            grid: coefficients of the solver.
            t_embeddings: (S, D), ``timestep_embedding`` of the grid's timesteps.
            guidance_scale: s in u + s (c - u) on the network's output; used with 2 N rows.
            fresh_noise: (S, N, C) for a stochastic solver.
            guided_steps: where guidance acts; elsewhere the conditional rows alone are computed.
                None: everywhere.
            guided_output: the method of this name, compiled perhaps.

        Returns:
            (N, C) float32 latents.
        """
        compute = guided_output or self.guided_output
        x = before = noise
        for steps, num_rows in self.solver_segments(condition, noise, grid, guided_steps):
            modulations = self.modulations(
                condition[:num_rows], t_embeddings[steps.start : steps.stop]
            )
            for place, i in enumerate(steps):
                output = compute(x, [each[place] for each in modulations], guidance_scale)
                fresh = None if fresh_noise is None else fresh_noise[i]
                x, before = grid.step(i, x, before, output, fresh)
        return x

    def guided_output(
        self, x: Tensor, modulations: Sequence[Tensor], guidance_scale: float | Tensor
    ) -> Tensor:
        """The output (N, C) float32 for states x (N, C), mixed where modulations have 2 N rows."""
        output = self.modulated(x.to(modulations[0].dtype), modulations).float()
        if output.shape[0] == x.shape[0]:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def solver_segments(
        self, condition: Tensor, noise: Tensor, grid: SolverGrid, guided_steps: range | None
    ) -> Iterator[tuple[range, int]]:
        """Solver steps whose modulations are computed at once, and the rows that they are for."""
        both, alone = condition.shape[0], noise.shape[0]
        acts = range(len(grid)) if guided_steps is None else guided_steps
        width = (3 * len(self.blocks) + 2) * condition.shape[1]
        limit = MAX_MODULATIONS_CUDA if condition.is_cuda else MAX_MODULATIONS
        for start, stop, num_rows in (
            (0, acts.start, alone),
            (acts.start, acts.stop, both),
            (acts.stop, len(grid), alone),
        ):
            size = max(1, limit // (num_rows * width))
            for first in range(start, stop, size):
                yield range(first, min(first + size, stop)), num_rows
