"""Next-token diffusion of a known number of latents: images.

Guidance runs the conditional and the unconditional rows in one batch, through one cache and one
head call per solver step. Timestep embeddings and solver coefficients are computed once. All
requests of a batch have as many latents, so a batch is full until it ends.

Axes: B requests, P prompt tokens, T latent positions, C latent channels, S solver steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import LatentSampler, Noise, Request, SamplerConfig
from latentlm_core.sampling.decoding import DecodeStep, DecodeSteps, Mode


class LatentLMEngine:
    """Next-token diffusion with a static key-value cache.

    Args:
        model: the LatentLM.
        config: how latents are drawn.
        mode: how the decode step runs.
        num_steps: decode steps that are expected in all: what ``auto`` goes by on a CPU.
        progress: hears why a mode cannot be had.
    """

    def __init__(
        self,
        model: LatentLM,
        config: SamplerConfig,
        mode: Mode = "auto",
        num_steps: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        self.model = model
        self.config = config
        self._sampler = LatentSampler(model, config)
        self.grid = self._sampler.grid
        self._steps = DecodeSteps(self._sampler, mode, num_steps, progress)

    @property
    def mode(self) -> Mode:
        """See ``DecodeSteps``."""
        return self._steps.mode

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
        device = self._sampler.device
        start = noise.start.to(device)
        fresh = None if noise.fresh is None else noise.fresh.to(device)
        num_requests, num_latents = start.shape[:2]
        drawn = torch.empty_like(start)
        with evaluating(self.model):
            step = self._steps.get(
                ids.shape[0] // num_requests, num_requests, ids.shape[1] + num_latents
            )
            rows = torch.arange(step.num_requests, device=device) % num_requests
            branches = ids.view(-1, num_requests, ids.shape[1])[:, rows].flatten(0, 1)
            self._read(branches, step)
            for i in range(num_latents):
                latents = step(
                    start[rows, i],
                    None if fresh is None else fresh[:, rows, i],
                    self._guidance_scale(i, num_latents),
                )
                drawn[:, i] = latents[:num_requests]
                if on_position is not None:
                    on_position()
        return drawn.cpu()

    def _read(self, ids: Tensor, step: DecodeStep) -> None:
        """Read the prompts (R, P) into a step that forgets all else."""
        x = self.model.embed(ids, *_no_latents(ids, self.model.config.latent_channels))
        step.cache.reset()
        step.state.copy_(self.model.step(x, step.cache))
        step.pin()

    def _guidance_scale(self, position: int, num_latents: int) -> float:
        scale = self.config.guidance_scale
        if self.config.guidance_schedule == "constant":
            return scale
        return 1.0 + (scale - 1.0) * position / max(num_latents - 1, 1)


def _no_latents(ids: Tensor, latent_channels: int) -> tuple[Tensor, Tensor]:
    latents = torch.zeros(*ids.shape, latent_channels, device=ids.device)
    return latents, torch.full_like(ids, int(Kind.TEXT))
