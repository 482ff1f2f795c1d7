"""Small speech tokenizers of both kinds, 40 samples a latent, and noise for them."""

import pytest
import torch
from torch import Tensor

from latentlm_core.runtime import generator
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig, SpeechNetwork
from latentlm_core.tokenizers.spectral import SpectralConfig
from latentlm_core.tokenizers.speech import CausalConvConfig

HOP = 40
CHANNELS = 6
CAUSAL = CausalConvConfig(
    base_channels=4, strides=(2, 4, 5), num_blocks=(1, 1, 1, 2), layer_scale=0.5
)
SPECTRAL = SpectralConfig(
    frame_length=32,
    frame_hop=8,
    frames_per_latent=5,
    width=16,
    frame_blocks=1,
    latent_blocks=1,
    layer_scale=0.5,
)
NETWORKS = pytest.mark.parametrize("network", [CAUSAL, SPECTRAL], ids=["causal-conv", "spectral"])


def speech_vae(network: SpeechNetwork) -> SigmaVAE:
    return build_tokenizer(SigmaVAEConfig(latent_channels=CHANNELS, network=network)).eval()


def noise(num_samples: int, rows: int = 1, name: str = "noise") -> Tensor:
    """(B, 1, S)."""
    return 0.3 * torch.randn((rows, 1, num_samples), generator=generator(name))


def raw_latents(num_positions: int, rows: int = 1, name: str = "latents") -> Tensor:
    """(B, T, C)."""
    return torch.randn((rows, num_positions, CHANNELS), generator=generator(name))
