"""A small tokenizer, the task that trains it, and a batch for both."""

from typing import Any

import torch

from latentlm_core.data.stream import MediaBatch
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.critics import CriticConfig
from latentlm_core.tokenizers.lpips import LPIPS
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.training.vae_task import VAELossConfig, VAETask

SMALL_CRITIC = CriticConfig(base_channels=8, num_layers=1)


def batch(count: int = 4, size: int = 16) -> MediaBatch:
    media = torch.rand((count, 3, size, size), generator=generator("media")) * 2 - 1
    labels = torch.full((count,), -1)
    return MediaBatch(media=media, labels=labels, keys=tuple(map(str, range(count))))


def task(
    kind: PosteriorKind = PosteriorKind.GAUSSIAN, perceptual: LPIPS | None = None, **loss: Any
) -> VAETask:
    network = ConvConfig(image_size=16, channels=(8, 16), stem_patch_size=2)
    posterior = LatentPosteriorConfig(kind=kind)
    vae = build_tokenizer(SigmaVAEConfig(latent_channels=4, posterior=posterior, network=network))
    return VAETask(vae, VAELossConfig(critic=SMALL_CRITIC, **loss), perceptual)
