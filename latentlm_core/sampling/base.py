"""What engines share: settings, requests, and the noise that a request's seed decides.

Every request brings its own seed, and its noise is drawn on the host from that seed alone, so a
sample is the same alone, in any batch and on any device (up to the rounding of its kernels).

Axes: B requests, T latent positions, C latent channels, S solver steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentlm_core.config import Config
from latentlm_core.diffusion import Solver
from latentlm_core.runtime import generator


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
