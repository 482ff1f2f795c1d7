"""The sigma-VAE: an encoder, a decoder and a rule by which a latent is drawn around its mean.

One class for every modality: the network configuration chooses the pair of networks
(``tokenizers.build`` assembles it), the posterior rule chooses between the paper's sigma-VAE and
its ablations. Posterior parameters are float32 even under autocast, for the noise and the
regulariser are computed from them.

Axes: B examples, T latent positions, C latent channels.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import Field
from torch import Tensor, nn

from latentlm_core.config import Config, Width
from latentlm_core.errors import ArtifactError, DataError
from latentlm_core.tokenizers.base import (
    Grid,
    LatentPosterior,
    LatentPosteriorConfig,
    PosteriorKind,
)
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.spectral import SpectralConfig
from latentlm_core.tokenizers.speech import CausalConvConfig
from latentlm_core.tokenizers.vit import ViTConfig

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Clamp of a learned log-variance: exp() of it stays finite in float32."""


SpeechNetwork = CausalConvConfig | SpectralConfig
"""Networks of audio."""


class SigmaVAEConfig(Config):
    """Everything that decides a sigma-VAE; ``build_tokenizer`` makes one of it."""

    latent_channels: Width = 16
    """C: channels of each latent position."""
    posterior: LatentPosteriorConfig = LatentPosteriorConfig()
    """How a latent is drawn around its mean."""
    network: ViTConfig | ConvConfig | CausalConvConfig | SpectralConfig = Field(
        default=ViTConfig(), discriminator="kind"
    )
    """The pair of networks: `vit` or `conv` for images, `causal-conv` or `spectral` for speech."""

    @property
    def encoder_outputs(self) -> int:
        """C, or 2 C where the encoder predicts a log-variance beside the mean."""
        learned = self.posterior.kind is PosteriorKind.LEARNED
        return self.latent_channels * (2 if learned else 1)


class Encoder(Protocol):
    """Media => (B, T, encoder_outputs)."""

    def __call__(self, media: Tensor, /) -> Tensor:
        """Posterior parameters."""


class Decoder(Protocol):
    """Raw latents (B, T, C) => media."""

    @property
    def last_weight(self) -> Tensor:
        """The weight nearest to the media."""

    def __call__(self, latents: Tensor, grid: Grid, /) -> Tensor:
        """Media of the shape that ``grid`` stands for."""


class SigmaVAE(nn.Module):
    """A tokenizer with z = mean + sigma * epsilon (paper, section on sigma-VAE, Eq. 6).

    Args:
        config: what the networks were made of.
        encoder: media => posterior parameters.
        decoder: raw latents => media.
    """

    def __init__(self, config: SigmaVAEConfig, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder

    @property
    def modality(self) -> Literal["image", "speech"]:
        """What it encodes."""
        return self.config.network.modality

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.config.latent_channels

    @property
    def image_size(self) -> int:
        """Height and width of the images that it was made for, in pixels.

        Raises:
            ArtifactError: it is a tokenizer of speech.
        """
        if isinstance(self.config.network, SpeechNetwork):
            raise ArtifactError("This is a tokenizer of speech, where one of images is wanted.")
        return self.config.network.image_size

    @property
    def speech(self) -> SpeechNetwork:
        """The configuration of its networks, which knows sample rate and hop length.

        Raises:
            ArtifactError: it is a tokenizer of images.
        """
        if not isinstance(self.config.network, SpeechNetwork):
            raise ArtifactError("This is a tokenizer of images, where one of speech is wanted.")
        return self.config.network

    def encode(self, media: Tensor) -> LatentPosterior:
        """Media in [-1, 1] => posterior over raw latents (B, T, C), float32.

        Images are (B, 3, H, W), audio is (B, 1, S).

        Raises:
            DataError: the network cannot take media of this size.
        """
        self.grid(media.shape)
        return self.posterior(self.encoder(media))

    def posterior(self, parameters: Tensor) -> LatentPosterior:
        """What the encoder's outputs (B, T, encoder_outputs) stand for."""
        parameters = parameters.float()
        if self.config.posterior.kind is not PosteriorKind.LEARNED:
            return LatentPosterior(parameters, None, self.config.posterior)
        mean, log_variance = parameters.chunk(2, dim=-1)
        return LatentPosterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE), self.config.posterior)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Raw latents (B, T, C) => media in about [-1, 1], not clamped; shapes as in ``encode``.

        Raises:
            DataError: T or C does not fit the grid or the tokenizer.
        """
        expected = (math.prod(grid), self.latent_channels)
        if latents.shape[1:] != expected:
            raise DataError(
                f"The latents of a grid of {'x'.join(map(str, grid))} positions must have the "
                f"shape (B, {expected[0]}, {expected[1]}), not {tuple(latents.shape)}."
            )
        return self.decoder(latents, grid)

    def grid(self, media_shape: Sequence[int]) -> Grid:
        """How the T latent positions of media (..., H, W) or (..., S) fold back.

        Raises:
            DataError: the network cannot take media of this size.
        """
        return self.config.network.grid(media_shape)
