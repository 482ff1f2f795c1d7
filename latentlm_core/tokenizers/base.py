"""What every tokenizer of continuous media promises, and how its latents are normalised.

Arrows of the contract: media => raw latents (B, T, C) => latents z = (raw - shift) * scale.
Raw latents are what is stored; normalisation happens where a batch is made.

Axes: B examples, T latent positions, C latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Len
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.draws import Draws

Grid = tuple[int, ...]
"""How T latent positions fold back: (height, width) for images, (frames,) for audio."""

SIGMA_DIVISOR = 0.8
"""The published code divides C_sigma by 0.8: E|N(0, 1)| = sqrt(2 / pi) = 0.798, so that ``std``
is the mean absolute noise scale (tokenizer_models/modeling_sigma_vae.py:49)."""


class PosteriorKind(StrEnum):
    """How the noise scale of z = mean + sigma * epsilon is chosen (paper, section on sigma-VAE)."""

    GAUSSIAN = "gaussian"
    """One sigma per example, sigma ~ N(0, (std / 0.8)^2): the paper's sigma-VAE."""
    FIXED = "fixed"
    """sigma = std everywhere."""
    NONE = "none"
    """No noise: z is the mean."""
    LEARNED = "learned"
    """An ordinary KL-VAE: the encoder predicts sigma for every element."""


class LatentPosteriorConfig(Config):
    """The rule by which a latent is drawn around its mean."""

    kind: PosteriorKind = PosteriorKind.GAUSSIAN
    """gaussian (the paper), fixed, none, or learned (an ordinary KL-VAE)."""
    std: Annotated[float, Field(ge=0, lt=1e6)] = 0.75
    """C_sigma: the mean |sigma| of `gaussian`, the sigma of `fixed`; unused otherwise."""

    def draw(self, mean: Tensor, log_variance: Tensor | None, draws: Draws) -> Tensor:
        """Draw raw latents z = mean + sigma * epsilon.

        Args:
            mean: (B, ...) posterior means.
            log_variance: (B, ...) of `learned`, else None.
            draws: the source of randomness, on the device of ``mean``, a row for each example.

        Returns:
            (B, ...) raw latents, of the dtype of ``mean``.
        """
        if self.kind is PosteriorKind.NONE:
            return mean
        noise = draws.normal(mean.shape, dtype=mean.dtype)
        if self.kind is PosteriorKind.LEARNED:
            if log_variance is None:
                raise ValueError("a learned posterior needs its log-variance")
            return mean + torch.exp(0.5 * log_variance) * noise
        if self.kind is PosteriorKind.FIXED:
            return mean + self.std * noise
        per_example = (mean.shape[0], *(1,) * (mean.ndim - 1))
        sigma = draws.normal(per_example, dtype=mean.dtype) * (self.std / SIGMA_DIVISOR)
        return mean + sigma * noise

    def noise_variance(self, log_variance: Tensor | None = None) -> float:
        """E[sigma^2]: what the draw adds to the variance of the means."""
        if self.kind is PosteriorKind.LEARNED:
            if log_variance is None:
                raise ValueError("a learned posterior needs its log-variance")
            return float(log_variance.double().exp().mean())
        scale = {PosteriorKind.GAUSSIAN: self.std / SIGMA_DIVISOR, PosteriorKind.FIXED: self.std}
        return scale.get(self.kind, 0.0) ** 2


@dataclass(frozen=True, slots=True)
class LatentPosterior:
    """The distribution that an encoder returns.

    Attributes:
        mean: (B, T, C) raw latents.
        log_variance: (B, T, C) where the posterior is learned, else None.
        rule: how a latent is drawn.
    """

    mean: Tensor
    log_variance: Tensor | None
    rule: LatentPosteriorConfig

    def sample(self, draws: Draws) -> Tensor:
        """Draw raw latents (B, T, C); ``draws`` has a row for each example."""
        return self.rule.draw(self.mean, self.log_variance, draws)

    def one(self, index: int) -> "LatentPosterior":
        """That of one input, (1, T, C), on the host, where what is drawn is the same everywhere."""
        part = slice(index, index + 1)
        variance = None if self.log_variance is None else self.log_variance[part].cpu()
        return LatentPosterior(self.mean[part].cpu(), variance, self.rule)

    def mode(self) -> Tensor:
        """The centre of the distribution, (B, T, C)."""
        return self.mean

    def kl(self) -> Tensor:
        """Per-element regulariser (B, T, C).

        mu^2 where sigma is not learned (Eq. 6: the KL divergence reduces to the mean's penalty),
        else the KL divergence from N(0, 1).
        """
        if self.log_variance is None:
            return self.mean.square()
        variance = self.log_variance.exp()
        return 0.5 * (self.mean.square() + variance - 1.0 - self.log_variance)


class LatentStats(Config):
    """Normalisation of latents, kept with every latent set and every model."""

    shift: Annotated[tuple[float, ...], Len(1)]
    """Subtracted from raw latents: one number, or one a channel."""
    scale: Annotated[tuple[float, ...], Len(1)]
    """Multiplied afterwards: 1 / std of the drawn raw latents; one number, or one a channel."""

    def normalise(self, raw: Tensor) -> Tensor:
        """(..., C) raw latents => (..., C) latents of about unit variance."""
        return (raw - raw.new_tensor(self.shift)) * raw.new_tensor(self.scale)

    def denormalise(self, latents: Tensor) -> Tensor:
        """(..., C) latents => (..., C) raw latents, as the decoder wants them."""
        return latents / latents.new_tensor(self.scale) + latents.new_tensor(self.shift)


class Tokenizer(Protocol):
    """A codec between media and sequences of continuous latents."""

    @property
    def modality(self) -> Literal["image", "speech"]:
        """What it encodes."""

    @property
    def latent_channels(self) -> int:
        """C."""

    def encode(self, media: Tensor) -> LatentPosterior:
        """Media in [-1, 1], images (B, 3, H, W) or audio (B, 1, S), => posterior (B, T, C)."""

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Raw latents (B, T, C) => media (B, ...)."""

    def grid(self, media_shape: Sequence[int]) -> Grid:
        """How the T positions of media of this shape fold back; T is its product."""
