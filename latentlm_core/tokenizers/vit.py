"""The paper's image networks: a Vision Transformer on each side of the latents.

Notable choices, as published (tokenizer_models/modeling_sigma_vae.py, modeling_common.py):
    a patch convolution, a class token in front and learned absolute positions;
    pre-norm blocks, LayerNorm eps 1e-6, exact GELU, a bias on queries and values but not on keys;
    the class token takes part in attention and is dropped at the end;
    the decoder reads the latent grid as patches of one position.
Positions are learned, so a ViT takes images of exactly one size.

Axes: B images, T latent positions, C latent channels, D hidden, H W image.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from latentlm_core.config import Config, Depth, Width
from latentlm_core.errors import DataError
from latentlm_core.layout import AttentionMask
from latentlm_core.nn.attend import attend
from latentlm_core.tokenizers.base import Grid

NORM_EPSILON = 1e-6
INIT_STD = 0.02


class ViTConfig(Config):
    """A pair of Vision Transformers; the defaults are the paper's 172M configuration."""

    modality: ClassVar[Literal["image"]] = "image"
    kind: Literal["vit"] = "vit"
    """Vision Transformer."""
    image_size: Width = 256
    """Height and width of the images, in pixels."""
    patch_size: Width = 16
    """Height and width of the pixels behind one latent position."""
    hidden_size: Width = 768
    """D of both towers; the MLPs are four times as wide."""
    num_layers: Depth = 12
    """Blocks of each tower."""
    num_heads: Width = 12
    """Attention heads of each block."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        return self

    def grid(self, media_shape: Sequence[int]) -> Grid:
        """(height, width) in latent positions of images (..., H, W).

        Raises:
            DataError: the images have another size than ``image_size``.
        """
        height, width = media_shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise DataError(
                f"This ViT tokenizer takes images of {self.image_size}x{self.image_size} pixels, "
                f"not {width}x{height}."
            )
        side = self.image_size // self.patch_size
        return side, side


class ViTEncoder(nn.Module):
    """Images (B, 3, H, W) => (B, T, outputs)."""

    def __init__(self, config: ViTConfig, outputs: int) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.tower = _Tower(config, 3, config.patch_size, num_patches)
        self.head = nn.Linear(config.hidden_size, outputs)
        _initialise(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Posterior parameters of each latent position."""
        features: Tensor = self.head(self.tower(images))
        return features


class ViTDecoder(nn.Module):
    """Raw latents (B, T, C) => images (B, 3, H, W)."""

    def __init__(self, config: ViTConfig, latent_channels: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.tower = _Tower(config, latent_channels, 1, num_patches)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 3 * config.patch_size**2)
        _initialise(self.hidden)
        _initialise(self.head)

    @property
    def last_weight(self) -> Tensor:
        """The weight nearest to the pixels, where the adaptive GAN weight compares gradients."""
        return self.head.weight

    def forward(self, latents: Tensor, grid: Grid) -> Tensor:
        """Pixels in about [-1, 1]."""
        features = self.tower(_fold(latents, grid))
        patches: Tensor = self.head(torch.tanh(self.hidden(features)))
        return F.pixel_shuffle(_fold(patches, grid), self.patch_size)


class _Tower(nn.Module):
    """Image-like (B, in_channels, H, W) => normalised features (B, T, D)."""

    def __init__(
        self, config: ViTConfig, in_channels: int, patch_size: int, num_patches: int
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        self.blocks = nn.ModuleList(
            _Block(width, config.num_heads, layer) for layer in range(1, config.num_layers + 1)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        _initialise(self.patch_embed)
        nn.init.trunc_normal_(self.class_token, std=INIT_STD)
        nn.init.trunc_normal_(self.positions, std=INIT_STD)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).mT
        hidden = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        hidden = hidden + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        normalised: Tensor = self.norm(hidden)
        return normalised[:, 1:]


class _Block(nn.Module):
    """Pre-norm attention and MLP; ``layer`` counts from 1 and scales the residual init."""

    def __init__(self, width: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = _Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        _initialise(self.mlp_in)
        for residual in (self.attention.out, self.mlp_out):
            _initialise(residual, INIT_STD / math.sqrt(2 * layer))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))
        return hidden + mlp


class _Attention(nn.Module):
    """Attention of all positions to all; keys have no bias, for softmax would cancel it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        _initialise(self.qkv)

    def forward(self, hidden: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(hidden, self.qkv.weight, bias)
        heads = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, AttentionMask())
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def _fold(sequence: Tensor, grid: Grid) -> Tensor:
    """(B, T, channels) => (B, channels, h, w)."""
    return sequence.mT.reshape(len(sequence), -1, *grid)


def _initialise(layer: nn.Linear | nn.Conv2d, std: float = INIT_STD) -> None:
    nn.init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
