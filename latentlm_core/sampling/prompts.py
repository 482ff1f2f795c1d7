"""Prompts of tokens and latents, of different lengths, read in one go.

They are padded on the left, so that all rows write at one place of the cache from then on.

Axes: B rows, P prompt positions, C latent channels, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.nn.attention import KVCache
from latentlm_core.nn.matmul import fast_linear


class Prompt(NamedTuple):
    """What stands before the latents to draw.

    Attributes:
        ids: (P,) token ids, anything valid where there is a latent.
        latents: (P, C) normalised latents, anything finite where there is a token.
        kind: (P,) which of the two stands there.
        position: (P,) rotary position of each; the latents to draw follow after the last one's.
    """

    ids: Tensor
    latents: Tensor
    kind: Tensor
    position: Tensor


def token_prompt(ids: Sequence[int], latent_channels: int) -> Prompt:
    """A prompt of tokens alone."""
    tokens = torch.tensor(ids)
    return Prompt(
        tokens,
        torch.zeros(len(ids), latent_channels),
        torch.full_like(tokens, int(Kind.TEXT)),
        torch.arange(len(ids), dtype=torch.float32),
    )


def read_prompts(
    model: LatentLM, prompts: Sequence[Prompt], num_more: int, least: int = 0
) -> tuple[Tensor, KVCache]:
    """The last state of every prompt, (B, D), and the cache behind it.

    Args:
        model: reads them.
        prompts: B.
        num_more: positions that are to follow.
        least: positions that they take together with their padding, at least.
    """
    device = model.token_embedding.weight.device
    longest = max(least, *(len(prompt.ids) for prompt in prompts))
    padding = torch.tensor([longest - len(prompt.ids) for prompt in prompts])
    ids, latents, kind, position = (
        torch.stack([_padded(part, longest) for part in parts]).to(device)
        for parts in zip(*prompts, strict=True)
    )
    cache = model.backbone.new_cache(len(prompts), longest + num_more)
    if padding.any():
        cache.padding = padding.to(device)
    with fast_linear(model.token_embedding.weight, ids.numel()):
        state = model.step(model.embed(ids, latents, kind), cache, position)
    cache.shift = position[:, -1] + 1 - cache.length
    return state, cache


def _padded(part: Tensor, length: int) -> Tensor:
    """(P, ...) => (length, ...) with zeros in front."""
    return torch.cat([part.new_zeros(length - len(part), *part.shape[1:]), part])
