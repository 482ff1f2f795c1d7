"""The published speech networks: fully causal convolutions on samples, down to latents and back.

ConvNeXt-style blocks with RMSNorm and layer scale, strided convolutions of twice their stride
between the levels (VibeVoice's acoustic tokenizer, modular_vibevoice_tokenizer.py:699-963; the
paper describes the same family). Weights under the published names load through
``latentlm_core.published``.

Axes: B clips, S audio samples, T latent positions, C latent channels.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Len
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentlm_core.config import Config, Width
from latentlm_core.errors import DataError
from latentlm_core.tokenizers.base import Grid
from latentlm_core.tokenizers.causal import (
    CausalBlock,
    CausalConv,
    CausalConvTranspose,
    CausalStack,
    StreamState,
)

END_KERNEL = 7
"""Kernel of the first and the last convolution."""


class CausalConvConfig(Config):
    """A pair of causal networks; the defaults are VibeVoice's, 3,200 samples a latent."""

    modality: ClassVar[Literal["speech"]] = "speech"
    kind: Literal["causal-conv"] = "causal-conv"
    """Causal convolutions on samples, as published."""
    sample_rate: Width = 24_000
    """Of the audio, in Hz."""
    base_channels: Annotated[int, Field(ge=1, le=2**12)] = 32
    """Width of the level nearest to the samples; it doubles with each stride."""
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Len(1, 12)] = (
        *(2, 2, 4),
        *(5, 5, 8),
    )
    """Strides of the encoder, from the samples on; the decoder has them in reverse."""
    num_blocks: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = (3, 3, 3, 3, 3, 3, 8)
    """Blocks of each level of the encoder, one level more than strides; the decoder mirrors it."""
    layer_scale: float = 1e-6
    """Where the residuals' factors start."""
    norm_eps: float = 1e-5
    """Added to the mean square in each norm."""

    @property
    def hop_length(self) -> int:
        """Audio samples behind one latent position."""
        return math.prod(self.strides)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the samples on."""
        return [self.base_channels << level for level in range(len(self.num_blocks))]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.num_blocks) != len(self.strides) + 1:
            raise ValueError(
                f"num_blocks {self.num_blocks} must be one longer than strides {self.strides}"
            )
        return self

    def grid(self, media_shape: Sequence[int]) -> Grid:
        """(T,) of audio (..., S)."""
        return frames_of(media_shape, self.hop_length)


class CausalConvEncoder(nn.Module):
    """Audio (B, 1, S) => (B, T, outputs)."""

    def __init__(self, config: CausalConvConfig, outputs: int) -> None:
        super().__init__()
        widths = config.widths
        self.stem = CausalConv(1, widths[0], END_KERNEL)
        self.levels = nn.ModuleList(
            _level(config, width, count)
            for width, count in zip(widths, config.num_blocks, strict=True)
        )
        self.downsamples = nn.ModuleList(
            CausalConv(narrow, wide, 2 * stride, stride)
            for (narrow, wide), stride in zip(pairwise(widths), config.strides, strict=True)
        )
        self.head = CausalConv(widths[-1], outputs, END_KERNEL)

    def forward(self, audio: Tensor, state: StreamState | None = None) -> Tensor:
        """Posterior parameters of each latent position that the audio completes."""
        x = self.levels[0](self.stem(audio.transpose(1, 2), state), state)
        for downsample, level in zip(self.downsamples, self.levels[1:], strict=True):
            x = level(downsample(x, state), state)
        return self.head(x, state)  # type: ignore[no-any-return]


class CausalConvDecoder(nn.Module):
    """Raw latents (B, T, C) => audio (B, 1, T * hop_length)."""

    def __init__(self, config: CausalConvConfig, latent_channels: int) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.stem = CausalConv(latent_channels, widths[0], END_KERNEL)
        self.levels = nn.ModuleList(
            _level(config, width, count)
            for width, count in zip(widths, config.num_blocks[::-1], strict=True)
        )
        self.upsamples = nn.ModuleList(
            CausalConvTranspose(wide, narrow, stride)
            for (wide, narrow), stride in zip(pairwise(widths), config.strides[::-1], strict=True)
        )
        self.head = CausalConv(widths[-1], 1, END_KERNEL)

    @property
    def last_weight(self) -> Tensor:
        """The weight nearest to the samples."""
        return self.head.weight

    def forward(self, latents: Tensor, grid: Grid, state: StreamState | None = None) -> Tensor:
        """Samples in about [-1, 1]."""
        x = self.levels[0](self.stem(latents, state), state)
        for upsample, level in zip(self.upsamples, self.levels[1:], strict=True):
            x = level(upsample(x, state), state)
        return self.head(x, state).transpose(1, 2)  # type: ignore[no-any-return]


def frames_of(media_shape: Sequence[int], hop_length: int) -> Grid:
    """(T,) of audio (..., S): the last latent may stand for less than ``hop_length`` samples.

    Raises:
        DataError: there are no samples.
    """
    if not media_shape[-1]:
        raise DataError("There is no audio to encode: it has no samples.")
    return (-(-media_shape[-1] // hop_length),)


def _level(config: CausalConvConfig, width: int, count: int) -> CausalStack:
    return CausalStack(
        *(CausalBlock(width, config.layer_scale, config.norm_eps) for _ in range(count))
    )
