"""Next-token diffusion of latents until the model says that they end: speech.

A state predicts the next latent and, through the softmax head, whether there is one: the mark
"latents go on" against the mark "end of data". Rows have prompts of different lengths, made of
tokens and latents; they are padded on the left, so that all of them write at one place of the
cache. A row that has ended leaves the batch.

Guidance holds for latents alone: whether they end is what the conditional row says. Conditional
and unconditional rows go through one batch, one cache and one head call per solver step.

Axes: B requests, P prompt positions, T latent positions, C latent channels, S solver steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.nn.attention import KVCache
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import BOUND, END, LatentSampler, SamplerConfig
from latentlm_core.sampling.prompts import Prompt, read_prompts


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """One span of latents to draw.

    Attributes:
        prompt: what conditions it.
        unconditional: what stands in its place in the guidance branch.
        num_latents: largest number of latents; the span ends there whatever the model says.
        seed: decides its noise.
    """

    prompt: Prompt
    unconditional: Prompt
    num_latents: int
    seed: int


@dataclass(frozen=True, slots=True)
class Span:
    """What was drawn for a request.

    Attributes:
        latents: (T, C) float32 normalised latents, at least one.
        ended_by: ``end``, ``bound``, or what the listener said.
    """

    latents: Tensor
    ended_by: str


Listener = Callable[[int, Tensor], str | None]
"""(index of the request, its newest latent (C,)) => why it ends here, None if it may go on."""


class SpanEngine:
    """Draws spans with a LatentLM that predicts text.

    Args:
        model: the LatentLM.
        config: how latents are drawn.
        go_on: id of the mark for "latents go on".
        end: id of the mark for "end of data".

    Raises:
        ConfigError: the guidance schedule needs to know the last latent.
    """

    def __init__(self, model: LatentLM, config: SamplerConfig, go_on: int, end: int) -> None:
        config.require_constant_guidance(
            "Nobody knows beforehand which latent of speech is the last"
        )
        self.model = model
        self.config = config
        self._sampler = LatentSampler(model, config)
        self.grid = self._sampler.grid
        self._marks = [go_on, end]

    def draw(self, requests: Sequence[SpanRequest], listener: Listener | None = None) -> list[Span]:
        """Draw every span.

        Args:
            requests: of any lengths.
            listener: hears each latent as it is drawn, and may end its span.

        Returns:
            a span for each request, on the host.
        """
        noise = self._sampler.noise(requests)
        drawn: list[list[Tensor]] = [[] for _ in requests]
        reasons: dict[int, str] = {}
        live = list(range(len(requests)))
        with evaluating(self.model):
            state, cache = self._read_prompts(requests)
            for position in range(noise.start.shape[1]):
                fresh = None if noise.fresh is None else noise.fresh[:, live, position]
                latents = self._sampler.draw(
                    state, noise.start[live, position], fresh, self.config.guidance_scale
                )
                state = self._feed(latents, cache)
                ends = self._ends(state[: len(live)])
                for index, latent, is_end in zip(live, latents.cpu(), ends, strict=True):
                    drawn[index].append(latent)
                    heard = listener(index, latent) if listener else None
                    is_bound = position + 1 == requests[index].num_latents
                    if reason := END if is_end else heard or (BOUND if is_bound else None):
                        reasons[index] = reason
                going = [row for row, index in enumerate(live) if index not in reasons]
                if not going:
                    break
                if len(going) < len(live):
                    state = self._keep_rows(state, cache, going, len(live))
                    live = [live[row] for row in going]
        return [Span(torch.stack(drawn[i]), reasons[i]) for i in range(len(requests))]

    def _read_prompts(self, requests: Sequence[SpanRequest]) -> tuple[Tensor, KVCache]:
        """The last state of every prompt, (B or 2 B, D), and the cache behind it."""
        prompts = [request.prompt for request in requests]
        if self.config.is_guided:
            prompts += [request.unconditional for request in requests]
        return read_prompts(self.model, prompts, max(one.num_latents for one in requests))

    def _feed(self, latents: Tensor, cache: KVCache) -> Tensor:
        """Latents (B, C) => the states after them, (B or 2 B, D)."""
        rows = self._sampler.embed(latents)
        return self.model.step(rows.repeat(2 if self.config.is_guided else 1, 1, 1), cache)

    def _ends(self, state: Tensor) -> list[bool]:
        """Whether the latents end after each conditional state (B, D)."""
        go_on, end = self.model.logits(state)[:, self._marks].unbind(1)
        return (end > go_on).tolist()

    def _keep_rows(self, state: Tensor, cache: KVCache, going: list[int], num_live: int) -> Tensor:
        """Drop what has ended from the cache and from the states."""
        unconditional = [row + num_live for row in going] if self.config.is_guided else []
        rows = torch.tensor(going + unconditional, device=self._sampler.device)
        cache.keep(rows)
        return state[rows]
