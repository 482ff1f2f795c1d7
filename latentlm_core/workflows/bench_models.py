"""Networks to be timed: the sizes of a recipe with fresh weights, for images of classes."""

import math

from torch import nn

from latentlm_core.artifacts import build_generator
from latentlm_core.errors import ConfigError
from latentlm_core.models.dit import DiT, DiTConfig, DiTSize
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig, LatentLMSize
from latentlm_core.models.transfusion import TransfusionSize
from latentlm_core.recipes.sizes import PUBLISHED_SIZES
from latentlm_core.runtime import seeded_init

PUBLISHED_LATENTS, SMALL_LATENTS = 256, 16
"""T of a size that is published, and of any other."""
CHANNELS, CLASSES = 16, 1000
"""Of a model that is built for its speed alone."""


def sized_model(
    size: LatentLMSize | TransfusionSize | DiTSize, num_latents: int
) -> LatentLMConfig | DiTConfig:
    """The class-conditional model of a size.

    Args:
        size: of a recipe of images of classes.
        num_latents: T, a square number.

    Raises:
        ConfigError: T is not square.
    """
    assert not isinstance(size, TransfusionSize), "it is of other data"
    side = math.isqrt(num_latents)
    if side * side != num_latents or not num_latents:
        raise ConfigError(
            f"--latents is the number of a square grid, such as 16 or 256, not {num_latents}."
        )
    return size.complete((side, side), CHANNELS, CLASSES + 1)


def default_latents(name: str) -> int:
    """T of a size where nobody says it."""
    return PUBLISHED_LATENTS if name in PUBLISHED_SIZES else SMALL_LATENTS


def fresh_model(config: LatentLMConfig | DiTConfig) -> LatentLM | DiT:
    """A network with random weights, none of them all zero: those would hide a difference."""
    with seeded_init("bench"):
        model = build_generator(config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    assert isinstance(model, LatentLM | DiT)
    return model
