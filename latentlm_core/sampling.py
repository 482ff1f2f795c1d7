"""The sampling engine: requests in, latents out.

It knows no files, no media and no tokenizer. Every request brings its own seed, and its noise is
drawn on the host from that seed alone, so a sample is the same alone, in any batch and on any
device (up to the rounding of the device's kernels).

Guidance runs the conditional and the unconditional rows in one batch, through one cache and one
head call per solver step. Timestep embeddings and solver coefficients are computed once.

Axes: B requests, P prompt tokens, T latent positions, C latent channels, S solver steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.diffusion import Solver, solver_grid
from latentlm_core.errors import ConfigError
from latentlm_core.layout import Kind
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import evaluating, generator


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


def make_engine(model: LatentLM | DiT, config: SamplerConfig) -> Engine:
    """The engine that fits a model.

    Raises:
        ConfigError: the settings do not fit it.
    """
    if isinstance(model, LatentLM):
        return LatentLMEngine(model, config)
    if config.guidance_schedule != "constant":
        raise ConfigError(
            "A DiT draws all positions together, so its guidance schedule must be constant."
        )
    return DiTEngine(model, config)


class LatentLMEngine:
    """Next-token diffusion with a static key-value cache."""

    def __init__(self, model: LatentLM, config: SamplerConfig) -> None:
        self.model = model
        self.config = config
        head = model.head
        self.grid = solver_grid(head.schedule, config.num_inference_steps, config.solver)
        self._device = head.latent_embedding.weight.device
        with evaluating(model):
            times = torch.tensor(self.grid.timesteps, device=self._device)
            self._t_embeddings = head.timestep_embedding(times)

    def generate(
        self, requests: Sequence[Request], on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """See ``Engine``."""
        noise = draw_noise(requests, self.model.config.latent_channels, self.grid_noise_steps)
        prompts = [request.prompt for request in requests]
        if self.is_guided:
            prompts += [request.unconditional for request in requests]
        ids = torch.tensor(prompts, device=self._device)
        return self.decode(ids, noise, on_position)

    @property
    def is_guided(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.config.guidance_scale != 1.0

    @property
    def grid_noise_steps(self) -> int:
        """Solver steps that draw fresh noise."""
        return len(self.grid) if self.grid.is_stochastic else 0

    def decode(
        self, ids: Tensor, noise: Noise, on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """Draw every latent in turn.

        Args:
            ids: (B, P), or (2 B, P) for guidance: conditional rows, then unconditional.
            noise: of the B requests.
            on_position: called after each latent.

        Returns:
            (B, T, C) float32, on the host.
        """
        model, start = self.model, noise.start.to(self._device)
        fresh = None if noise.fresh is None else noise.fresh.to(self._device)
        num_latents = start.shape[1]
        drawn = torch.empty_like(start)
        with evaluating(model):
            cache = model.backbone.new_cache(ids.shape[0], ids.shape[1] + num_latents - 1)
            x = model.embed(ids, *_no_latents(ids, model.config.latent_channels))
            for i in range(num_latents):
                condition = model.head.condition(model.step(x, cache))
                drawn[:, i] = model.head.sample(
                    condition,
                    start[:, i],
                    self.grid,
                    self._t_embeddings,
                    self._guidance_scale(i, num_latents),
                    None if fresh is None else fresh[:, :, i],
                )
                rows = drawn[:, i : i + 1].repeat(ids.shape[0] // start.shape[0], 1, 1)
                x = model.latent_embedding(rows.to(condition.dtype))
                if on_position is not None:
                    on_position()
        return drawn.cpu()

    def _guidance_scale(self, position: int, num_latents: int) -> float:
        scale = self.config.guidance_scale
        if self.config.guidance_schedule == "constant":
            return scale
        return 1.0 + (scale - 1.0) * position / max(num_latents - 1, 1)


class DiTEngine:
    """All latents of an image at once."""

    def __init__(self, model: DiT, config: SamplerConfig) -> None:
        self.model = model
        self.config = config
        self.grid = solver_grid(model.schedule, config.num_inference_steps, config.solver)
        self._device = model.latent_embedding.weight.device

    def generate(
        self, requests: Sequence[Request], on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """See ``Engine``."""
        num_steps = len(self.grid) if self.grid.is_stochastic else 0
        noise = draw_noise(requests, self.model.config.latent_channels, num_steps)
        labels = [request.prompt[0] for request in requests]
        if self.config.guidance_scale != 1.0:
            labels += [request.unconditional[0] for request in requests]
        with evaluating(self.model):
            drawn = self.model.sample(
                torch.tensor(labels, device=self._device),
                noise.start.to(self._device),
                self.grid,
                self.config.guidance_scale,
                None if noise.fresh is None else noise.fresh.to(self._device),
            )
        if on_position is not None:
            on_position()
        return drawn.cpu()


def draw_noise(requests: Sequence[Request], latent_channels: int, num_fresh_steps: int) -> Noise:
    """The noise of each request, from its own seed alone."""
    starts, fresh = [], []
    for request in requests:
        shape = (request.num_latents, latent_channels)
        source = generator(request.seed, "latents")
        starts.append(torch.randn(shape, generator=source))
        if num_fresh_steps:
            fresh.append(torch.randn(num_fresh_steps, *shape, generator=source))
    return Noise(torch.stack(starts), torch.stack(fresh, dim=1) if fresh else None)


def _no_latents(ids: Tensor, latent_channels: int) -> tuple[Tensor, Tensor]:
    latents = torch.zeros(*ids.shape, latent_channels, device=ids.device)
    return latents, torch.full_like(ids, int(Kind.TEXT))
