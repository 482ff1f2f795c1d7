"""The sampling engines: requests in, latents out. They know no files, no media and no tokenizer.

latent_lm    a known number of latents, one after the other
spans        latents until the model says that they end
dit          all latents of an image at once
"""

from latentlm_core.errors import ConfigError
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.sampling.base import Engine, Noise, Request, SamplerConfig, draw_noise
from latentlm_core.sampling.dit import DiTEngine
from latentlm_core.sampling.latent_lm import LatentLMEngine
from latentlm_core.sampling.spans import Prompt, Span, SpanEngine, SpanRequest

__all__ = [
    "DiTEngine",
    "Engine",
    "LatentLMEngine",
    "Noise",
    "Prompt",
    "Request",
    "SamplerConfig",
    "Span",
    "SpanEngine",
    "SpanRequest",
    "draw_noise",
    "make_engine",
]


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
