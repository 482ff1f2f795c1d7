"""The reference of ``latentlm bench sample``: a plain eager loop, as the published code has it.

Its cache grows by concatenation, its scheduler is built anew for every token, and its timesteps are
embedded at every solver step. It draws the latents that the engines draw.

Axes: B requests, L new positions, T latent positions, C latent channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentlm_core.diffusion import NoiseSchedule, Predict, guided, solve, solver_grid
from latentlm_core.layout import AttentionMask
from latentlm_core.models.dit import DiT
from latentlm_core.models.few_step import FewStepHead, step_ends
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import evaluating
from latentlm_core.sampling import Request, SamplerConfig, draw_noise


class GrowingCache:
    """Keys and values that are copied at every token."""

    def __init__(self, device: torch.device) -> None:
        self.length = 0
        self._device = device
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones at the end."""
        if layer in self._stored:
            old_key, old_value = self._stored[layer]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        self._stored[layer] = (key, value)
        return key, value

    def advance(self, num_positions: int) -> None:
        """Count the positions that every layer has stored."""
        self.length += num_positions

    def positions(self, num_new: int) -> Tensor:
        """Rotary positions (1, L) of the next inputs."""
        end = self.length + num_new
        return torch.arange(self.length, end, device=self._device).unsqueeze(0)

    def mask(self, num_new: int) -> AttentionMask:
        """All that is stored is seen."""
        return AttentionMask(is_causal=num_new > 1)


def plain_sampling(
    model: LatentLM | DiT, requests: Sequence[Request], config: SamplerConfig
) -> Tensor:
    """The loop that the engines replace; a deterministic solver is expected.

    Returns:
        normalised latents (B, T, C) float32, on the host.
    """
    noise = draw_noise(requests, model.config.latent_channels, 0).start
    device = model.latent_embedding.weight.device
    prompts = [request.prompt for request in requests]
    if config.is_guided:
        prompts += [request.unconditional for request in requests]
    ids = torch.tensor(prompts, device=device)
    with evaluating(model):
        if isinstance(model, DiT):
            return _images(model, ids[:, 0], noise.to(device), config).cpu()
        return _tokens(model, ids, noise.to(device), config).cpu()


def _tokens(model: LatentLM, ids: Tensor, noise: Tensor, config: SamplerConfig) -> Tensor:
    cache: Any = GrowingCache(noise.device)
    x, drawn = model.token_embedding(ids), []
    dtype = model.latent_embedding.weight.dtype
    for i in range(noise.shape[1]):
        condition = model.head.condition(model.step(x, cache))

        def output(x_t: Tensor, t: Tensor, end: int, condition: Tensor = condition) -> Tensor:
            head = model.head
            told = head.timestep_embedding(t)
            if isinstance(head, FewStepHead):
                told = told + head.end_embedding(torch.full_like(t, end))
            return head.denoise(x_t.to(dtype), told, condition).float()

        latent = _solve(output, noise[:, i], model.schedule, config)
        drawn.append(latent)
        x = model.latent_embedding(latent.to(dtype).repeat(len(ids) // len(noise), 1)).unsqueeze(1)
    return torch.stack(drawn, 1)


def _images(model: DiT, labels: Tensor, noise: Tensor, config: SamplerConfig) -> Tensor:
    dtype = model.latent_embedding.weight.dtype

    def output(x_t: Tensor, t: Tensor, end: int) -> Tensor:
        return model(x_t.to(dtype), t, labels).float()  # type: ignore[no-any-return]

    return _solve(output, noise, model.schedule, config)


def _solve(output: Any, noise: Tensor, schedule: NoiseSchedule, config: SamplerConfig) -> Tensor:
    """Run a solver whose scheduler is built for this one call."""
    fresh = NoiseSchedule(schedule.config)
    grid = solver_grid(fresh, config.num_inference_steps, config.solver)
    ends = step_ends(grid.timesteps)

    def predict(x_t: Tensor, step: int) -> Tensor:
        t = torch.full((len(x_t),), grid.timesteps[step], device=x_t.device)
        return output(x_t, t, ends[step])  # type: ignore[no-any-return]

    mixed: Predict = guided(predict, config.guidance_scale) if config.is_guided else predict
    return solve(mixed, noise, grid)
