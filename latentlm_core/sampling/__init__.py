"""The sampling engines: requests in, latents out. They know no files, no media and no tokenizer.

latent_lm    a known number of latents, one after the other
spans        latents until the model says that they end
interleaved  words, and images where the model or the prompt lets one begin
transfusion  words, and all latents of an image at once
dit          all latents of an image at once
"""

from latentlm_core.errors import ConfigError
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.progress import SILENT, Progress
from latentlm_core.sampling.base import Engine, Noise, Request, SamplerConfig, draw_noise
from latentlm_core.sampling.continuation import (
    Continuation,
    ContinuationListener,
    ContinuationRequest,
)
from latentlm_core.sampling.decoding import Mode
from latentlm_core.sampling.dit import DiTEngine
from latentlm_core.sampling.interleaved import InterleavedEngine
from latentlm_core.sampling.latent_lm import LatentLMEngine
from latentlm_core.sampling.prompts import Prompt
from latentlm_core.sampling.spans import Span, SpanEngine, SpanRequest
from latentlm_core.sampling.transfusion import TransfusionEngine
from latentlm_core.sampling.words import TextSamplerConfig

__all__ = [
    "Continuation",
    "ContinuationListener",
    "ContinuationRequest",
    "DiTEngine",
    "Engine",
    "InterleavedEngine",
    "LatentLMEngine",
    "Mode",
    "Noise",
    "Prompt",
    "Request",
    "SamplerConfig",
    "Span",
    "SpanEngine",
    "SpanRequest",
    "TextSamplerConfig",
    "TransfusionEngine",
    "draw_noise",
    "make_engine",
]


def make_engine(
    model: LatentLM | Transfusion | DiT,
    config: SamplerConfig,
    mode: Mode = "auto",
    num_steps: int = 0,
    progress: Progress = SILENT,
) -> Engine:
    """The engine of images of classes that fits a model.

    Args:
        model: the generator.
        config: how latents are drawn.
        mode: how the decode step of a LatentLM runs.
        num_steps: decode steps that are expected in all.
        progress: hears why a mode cannot be had.

    Raises:
        ConfigError: the settings do not fit it, or it is a model of text and images.
    """
    if isinstance(model, Transfusion):
        raise ConfigError("A Transfusion takes prompts of text and images, not classes.")
    if isinstance(model, LatentLM):
        return LatentLMEngine(model, config, mode, num_steps, progress)
    config.require_constant_guidance("A DiT draws all positions together")
    config.require_guidance_throughout("A DiT")
    return DiTEngine(model, config)
