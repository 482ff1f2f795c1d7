"""What engines share: settings, requests, the draw of a latent, and the noise that a seed decides.

Every request brings its own seed, and its noise is drawn on the host from that seed alone, so a
sample is the same alone, in any batch and on any device (up to the rounding of its kernels).

Axes: B requests, T latent positions, C latent channels, D hidden, S solver steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentlm_core.config import Config
from latentlm_core.diffusion import Solver, solver_grid
from latentlm_core.errors import ConfigError
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import evaluating, generator

BOUND = "bound"
"""What is said of a sample that reached its bound."""
END = "end"
"""What is said of a sample that the model ended."""


class SamplerConfig(Config):
    """How latents are drawn."""

    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    """S: solver steps per latent."""
    guidance_scale: float = Field(default=1.0, ge=0.0, le=1000.0)
    """s in u + s (c - u); 1 is off."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """constant, or rising linearly from 1 at the first position to the scale at the last."""
    solver: Solver = "dpmsolver++"
    """dpmsolver++ (2M, deterministic) or ddpm (ancestral)."""

    @property
    def is_guided(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.guidance_scale != 1.0

    def require_constant_guidance(self, reason: str) -> None:
        """Refuse a guidance that rises over the positions.

        Args:
            reason: why there can be none, the beginning of the message.

        Raises:
            ConfigError: the schedule is another one.
        """
        if self.guidance_schedule != "constant":
            raise ConfigError(f"{reason}, so its guidance schedule must be constant.")


@dataclass(frozen=True, slots=True)
class Request:
    """One sample.

    Attributes:
        prompt: token ids that condition it; a class id, for a class-conditional model.
        unconditional: what stands in their place in the guidance branch, equally long.
        num_latents: T, how many latents to draw.
        seed: decides its noise.
    """

    prompt: tuple[int, ...]
    unconditional: tuple[int, ...]
    num_latents: int
    seed: int


class Seeded(Protocol):
    """What decides the noise of a request."""

    @property
    def num_latents(self) -> int:
        """T: how many latents are drawn, at most."""

    @property
    def seed(self) -> int:
        """Decides them."""


@dataclass(frozen=True, slots=True)
class Draws:
    """A ``Seeded`` of its own: of a request that says in other words how much it draws."""

    num_latents: int
    seed: int


@dataclass(frozen=True, slots=True)
class Noise:
    """All the randomness of B requests.

    Attributes:
        start: (B, T, C) where the solver starts.
        fresh: (S, B, T, C) of a stochastic solver, else None.
    """

    start: Tensor
    fresh: Tensor | None = None


class Engine(Protocol):
    """Draws the latents of requests that have equal lengths."""

    def generate(
        self, requests: Sequence[Request], on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """Normalised latents (B, T, C), float32.

        Args:
            requests: of one prompt length and one number of latents.
            on_position: called after each latent position (or once, if all come together).
        """


class LatentSampler:
    """Draws the next latent of every row with the head of a LatentLM.

    Coefficients of the solver and embeddings of its timesteps are computed once.

    Args:
        model: whose head it is.
        config: how latents are drawn.
    """

    def __init__(self, model: LatentLM, config: SamplerConfig) -> None:
        self.model = model
        self.config = config
        self.grid = solver_grid(model.schedule, config.num_inference_steps, config.solver)
        self.device = model.head.latent_embedding.weight.device
        with evaluating(model):
            times = torch.tensor(self.grid.timesteps, device=self.device)
            self._t_embeddings = model.head.timestep_embedding(times)

    def noise(self, requests: Sequence[Seeded]) -> Noise:
        """All the randomness of some requests."""
        return draw_noise(requests, self.model.config.latent_channels, self.grid.num_fresh)

    def draw(
        self, states: Tensor, noise: Tensor, fresh: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """The next latents (B, C) float32 after states (B, D).

        Args:
            states: (B, D), or (2 B, D) for guidance: conditional rows, then unconditional.
            noise: (B, C) where the solver starts.
            fresh: (S, B, C) of a stochastic solver, else None.
            guidance_scale: s in u + s (c - u).
        """
        head = self.model.head
        return head.sample(
            head.condition(states),
            noise.to(self.device),
            self.grid,
            self._t_embeddings,
            guidance_scale,
            None if fresh is None else fresh.to(self.device),
        )

    def embed(self, latents: Tensor) -> Tensor:
        """Latents (B, C) => what is fed in for them, (B, 1, D)."""
        embedding = self.model.latent_embedding
        return embedding(latents.to(embedding.weight.dtype)).unsqueeze(1)  # type: ignore[no-any-return]


def draw_noise(requests: Sequence[Seeded], latent_channels: int, num_fresh_steps: int) -> Noise:
    """The noise of each request, from its own seed alone.

    T is that of the longest request; what others do not need is zero.
    """
    starts, fresh = [], []
    for request in requests:
        shape = (request.num_latents, latent_channels)
        source = generator(request.seed, "latents")
        starts.append(torch.randn(shape, generator=source))
        if num_fresh_steps:
            fresh.append(torch.randn(num_fresh_steps, *shape, generator=source))
    start = pad_sequence(starts, batch_first=True)
    if not fresh:
        return Noise(start)
    by_latent = pad_sequence([each.transpose(0, 1) for each in fresh], batch_first=True)
    return Noise(start, by_latent.permute(2, 0, 1, 3))
