"""Next-token diffusion of a known number of latents: images.

Guidance runs the conditional and the unconditional rows in one batch, through one cache and one
head call per solver step. Timestep embeddings and solver coefficients are computed once.

Axes: B requests, P prompt tokens, T latent positions, C latent channels, S solver steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import LatentSampler, Noise, Request, SamplerConfig


class LatentLMEngine:
    """Next-token diffusion with a static key-value cache."""

    def __init__(self, model: LatentLM, config: SamplerConfig) -> None:
        self.model = model
        self.config = config
        self._sampler = LatentSampler(model, config)
        self.grid = self._sampler.grid

    def generate(
        self, requests: Sequence[Request], on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """See ``Engine``."""
        prompts = [request.prompt for request in requests]
        if self.config.is_guided:
            prompts += [request.unconditional for request in requests]
        ids = torch.tensor(prompts, device=self._sampler.device)
        return self.decode(ids, self._sampler.noise(requests), on_position)

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
        model, sampler = self.model, self._sampler
        start = noise.start.to(sampler.device)
        fresh = None if noise.fresh is None else noise.fresh.to(sampler.device)
        num_latents = start.shape[1]
        drawn = torch.empty_like(start)
        with evaluating(model):
            cache = model.backbone.new_cache(ids.shape[0], ids.shape[1] + num_latents - 1)
            x = model.embed(ids, *_no_latents(ids, model.config.latent_channels))
            for i in range(num_latents):
                drawn[:, i] = sampler.draw(
                    model.step(x, cache),
                    start[:, i],
                    None if fresh is None else fresh[:, :, i],
                    self._guidance_scale(i, num_latents),
                )
                x = sampler.embed(drawn[:, i].repeat(ids.shape[0] // start.shape[0], 1))
                if on_position is not None:
                    on_position()
        return drawn.cpu()

    def _guidance_scale(self, position: int, num_latents: int) -> float:
        scale = self.config.guidance_scale
        if self.config.guidance_schedule == "constant":
            return scale
        return 1.0 + (scale - 1.0) * position / max(num_latents - 1, 1)


def _no_latents(ids: Tensor, latent_channels: int) -> tuple[Tensor, Tensor]:
    latents = torch.zeros(*ids.shape, latent_channels, device=ids.device)
    return latents, torch.full_like(ids, int(Kind.TEXT))
