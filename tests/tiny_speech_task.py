"""A small speech tokenizer, the task that trains it, and recordings for both."""

import math
from typing import Any

import torch
from torch import Tensor

from latentlm_core.data.stream import MediaBatch
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.spectral import SpectralConfig
from latentlm_core.tokenizers.speech_critics import SpeechCriticConfig
from latentlm_core.training.speech_task import SpeechLossConfig, SpeechVAETask

RATE = 8_000
SMALL_CRITIC = SpeechCriticConfig(
    periods=(2, 3),
    period_channels=4,
    max_channels=16,
    stft_windows=(256, 128),
    stft_channels=4,
    band_edges=(0.0, 0.25, 1.0),
)
NETWORK = SpectralConfig(
    sample_rate=RATE,
    frame_length=160,
    frame_hop=80,
    frames_per_latent=4,
    width=64,
    frame_blocks=1,
    latent_blocks=1,
)


def sine(hertz: float, num_samples: int = 1_600, sample_rate: int = RATE) -> Tensor:
    """(1, 1, S)."""
    time = torch.arange(num_samples, dtype=torch.float64) / sample_rate
    return (0.5 * torch.sin(2 * math.pi * hertz * time)).float()[None, None]


def chirp(first: float, last: float, num_samples: int = 1_600) -> Tensor:
    """(1, 1, S): a tone that glides from ``first`` to ``last`` Hz."""
    hertz = torch.linspace(first, last, num_samples, dtype=torch.float64)
    return (0.3 * torch.sin(2 * math.pi * (hertz / RATE).cumsum(0))).float()[None, None]


def recordings(media: Tensor) -> MediaBatch:
    labels = torch.full((len(media),), -1)
    return MediaBatch(media, labels, tuple(map(str, range(len(media)))))


def noises(count: int = 4, num_samples: int = 1_280) -> MediaBatch:
    return recordings(0.2 * torch.randn((count, 1, num_samples), generator=generator("media")))


def task(kind: PosteriorKind = PosteriorKind.GAUSSIAN, **loss: Any) -> SpeechVAETask:
    config = SigmaVAEConfig(
        latent_channels=8, posterior=LatentPosteriorConfig(kind=kind), network=NETWORK
    )
    return SpeechVAETask(build_tokenizer(config), SpeechLossConfig(critic=SMALL_CRITIC, **loss))
