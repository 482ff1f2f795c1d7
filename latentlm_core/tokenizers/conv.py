"""Convolutional image networks for small images, made to train on a CPU.

Notable choices:
    residual blocks of GroupNorm, SiLU and 3x3 convolutions, no attention;
    a patch stem of 1, 2 or 4 pixels keeps the work at full resolution low: the first level runs
    on a grid that is ``stem_patch_size`` times coarser, the last layer shuffles pixels back;
    strided convolutions go down, nearest neighbour and a convolution go up (no checkerboard);
    the last convolution of a block starts at zero, so every block starts as the identity;
    feature maps are channels-last, the layout that CPU and GPU convolutions prefer.
Fully convolutional: any image whose sides are multiples of ``downsampling`` fits.

Axes: B images, T latent positions, C latent channels, H W image, h w latent grid.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import torch.nn.functional as F
from annotated_types import Len
from pydantic import model_validator
from torch import Tensor, channels_last, nn

from latentlm_core.config import Config, Depth, Width
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.tokenizers.base import Grid

NORM_GROUPS = 8


class ConvConfig(Config):
    """A pair of convolutional networks; the defaults make 4x4 latents of a 32x32 image."""

    modality: ClassVar[Literal["image"]] = "image"
    kind: Literal["conv"] = "conv"
    """Convolutional residual network."""
    image_size: Width = 32
    """Height and width of the training images, in pixels."""
    channels: Annotated[tuple[Width, ...], Len(1, 16)] = (64, 128, 256)
    """Width of each level, multiples of 8; each level after the first halves the grid."""
    num_blocks: Depth = 1
    """Residual blocks of each level, on each side."""
    stem_patch_size: Width = 2
    """Pixels that the first layer folds into one position, along each side."""
    latent_patch_size: Width = 1
    """Positions of the last level that are folded into one latent, along each side: fewer latents
    of more channels out of the same network."""

    @property
    def downsampling(self) -> int:
        """Pixels behind one latent position, along each side."""
        return (self.stem_patch_size << (len(self.channels) - 1)) * self.latent_patch_size

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.downsampling} "
                "(stem_patch_size times latent_patch_size times two for each level after the first)"
            )
        if any(width % NORM_GROUPS for width in self.channels):
            raise ValueError(f"channels {self.channels} are not all multiples of {NORM_GROUPS}")
        return self

    def grid(self, media_shape: Sequence[int]) -> Grid:
        """(height, width) in latent positions of images (..., H, W).

        Raises:
            DataError: a side is not a positive multiple of ``downsampling``.
        """
        height, width = media_shape[-2:]
        factor = self.downsampling
        if height % factor or width % factor or not height * width:
            raise DataError(
                f"This tokenizer takes images whose sides are multiples of {factor} pixels, "
                f"not {width}x{height}."
            )
        return height // factor, width // factor


class ConvEncoder(nn.Module):
    """Images (B, 3, H, W) => (B, T, outputs)."""

    def __init__(self, config: ConvConfig, outputs: int) -> None:
        super().__init__()
        widths = config.channels
        self.stem = _stem(config.stem_patch_size, widths[0])
        layers: list[nn.Module] = _blocks(widths[0], config.num_blocks)
        for narrow, wide in pairwise(widths):
            layers.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
            layers.extend(_blocks(wide, config.num_blocks))
        self.layers = nn.Sequential(*layers)
        self.patch_size = config.latent_patch_size
        self.head = _Head(widths[-1], _folded(outputs, self.patch_size))
        self.to(memory_format=channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Posterior parameters of each latent position."""
        stem = self.stem(images.contiguous(memory_format=channels_last))
        features: Tensor = self.head(self.layers(stem))
        return F.pixel_unshuffle(features, self.patch_size).flatten(2).mT


class ConvDecoder(nn.Module):
    """Raw latents (B, T, C) => images (B, 3, H, W)."""

    def __init__(self, config: ConvConfig, latent_channels: int) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.latent_patch_size = config.latent_patch_size
        folded = _folded(latent_channels, self.latent_patch_size)
        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)
        layers: list[nn.Module] = _blocks(widths[0], config.num_blocks)
        for wide, narrow in pairwise(widths):
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(wide, narrow, 3, padding=1))
            layers.extend(_blocks(narrow, config.num_blocks))
        self.layers = nn.Sequential(*layers)
        self.head = _Head(widths[-1], 3 * config.stem_patch_size**2)
        self.patch_size = config.stem_patch_size
        self.to(memory_format=channels_last)

    @property
    def last_weight(self) -> Tensor:
        """The weight nearest to the pixels, where the adaptive GAN weight compares gradients."""
        return self.head.conv.weight

    def forward(self, latents: Tensor, grid: Grid) -> Tensor:
        """Pixels in about [-1, 1]."""
        folded = latents.mT.reshape(len(latents), -1, *grid)
        maps = F.pixel_shuffle(folded, self.latent_patch_size)
        maps = self.stem(maps.contiguous(memory_format=channels_last))
        patches = self.head(self.layers(maps))
        return F.pixel_shuffle(patches, self.patch_size)


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(NORM_GROUPS, width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.GroupNorm(NORM_GROUPS, width)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.conv_in(F.silu(self.norm_in(maps)))
        residual: Tensor = self.conv_out(F.silu(self.norm_out(inner)))
        return maps + residual


class _Head(nn.Module):
    """Norm, SiLU and the convolution that leaves the network."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, width)
        self.conv = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.conv(F.silu(self.norm(maps)))
        return out


def _folded(channels: int, patch_size: int) -> int:
    """Channels of each position of a latent of ``patch_size`` by ``patch_size``."""
    if channels % patch_size**2:
        raise ConfigError(
            f"Latents of {channels} channels do not part into {patch_size}x{patch_size} positions "
            "(tokenizer.network.latent_patch_size)."
        )
    return channels // patch_size**2


def _blocks(width: int, count: int) -> list[nn.Module]:
    return [_Block(width) for _ in range(count)]


def _stem(patch_size: int, width: int) -> nn.Conv2d:
    """A patch convolution; an ordinary 3x3 one where a patch is a single pixel."""
    if patch_size == 1:
        return nn.Conv2d(3, width, 3, padding=1)
    return nn.Conv2d(3, width, patch_size, stride=patch_size)
