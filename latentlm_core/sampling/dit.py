"""Diffusion of all latents of an image at once: the DiT baseline.

Axes: B requests, T latent positions, C latent channels, S solver steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentlm_core.diffusion import solver_grid
from latentlm_core.models.dit import DiT
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import Request, SamplerConfig, draw_noise, require_fitting


class DiTEngine:
    """All latents of an image at once."""

    def __init__(self, model: DiT, config: SamplerConfig) -> None:
        self.model = model
        self.config = config
        require_fitting(config, None)
        self.grid = solver_grid(model.schedule, config.num_inference_steps, config.solver)
        self._device = model.latent_embedding.weight.device

    def generate(
        self, requests: Sequence[Request], on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """See ``Engine``."""
        channels = self.model.config.latent_channels
        noise = draw_noise(requests, channels, self.grid.num_fresh)
        labels = [request.prompt[0] for request in requests]
        if self.config.is_guided:
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
