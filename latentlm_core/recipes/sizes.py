"""The published sizes, under the names of the official code.

``latentlm-l`` is the paper's 479M model, ``latentlm-l-code`` what the code calls L: the two differ
in the depth of the head and the width of the feed-forward.
"""

from collections.abc import Mapping

from latentlm_core.models.dit import DiTSize
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.models.transformer import TransformerConfig


def feed_forward_width(hidden_size: int, mlp_ratio: int) -> int:
    """The gated feed-forward of the official code: 2/3 mlp_ratio D, rounded down to 64ths."""
    return int(hidden_size * mlp_ratio * 2 / 3 / 64) * 64


def latent_lm_size(
    hidden_size: int, num_layers: int, num_heads: int, mlp_ratio: int, head_layers: int
) -> LatentLMSize:
    """A size as the official code writes it."""
    width = feed_forward_width(hidden_size, mlp_ratio)
    return LatentLMSize(
        backbone=TransformerConfig(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            intermediate_size=width,
        ),
        head=DiffusionHeadConfig(num_layers=head_layers, intermediate_size=width),
    )


def dit_size(hidden_size: int, num_layers: int, num_heads: int) -> DiTSize:
    """The DiT that the paper sets against a LatentLM of that depth and width (mlp_ratio 4)."""
    return DiTSize(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=feed_forward_width(hidden_size, 4),
    )


PAPER_L = LatentLMSize(
    backbone=TransformerConfig(
        hidden_size=1024, num_layers=32, num_heads=16, intermediate_size=2730
    ),
    head=DiffusionHeadConfig(num_layers=6, intermediate_size=2730),
)
"""LatentLM-L of Table 1: 479M."""

PUBLISHED_SIZES: Mapping[str, LatentLMSize | DiTSize] = {
    "latentlm-base": latent_lm_size(768, 12, 12, 6, 3),
    "latentlm-medium": latent_lm_size(1024, 24, 16, 6, 3),
    "latentlm-large": latent_lm_size(1536, 24, 12, 6, 3),
    "latentlm-xl": latent_lm_size(2048, 24, 16, 6, 3),
    "latentlm-3b": latent_lm_size(2560, 32, 20, 6, 3),
    "latentlm-7b": latent_lm_size(4096, 32, 32, 6, 3),
    "latentlm-13b": latent_lm_size(5120, 40, 40, 6, 3),
    "latentlm-b": latent_lm_size(768, 24, 12, 4, 6),
    "latentlm-l": PAPER_L,
    "latentlm-l-code": latent_lm_size(1024, 32, 16, 4, 8),
    "latentlm-h": latent_lm_size(1280, 40, 20, 4, 12),
    "dit-medium": dit_size(1024, 24, 16),
    "dit-large": dit_size(1536, 24, 12),
    "dit-xl": dit_size(2048, 24, 16),
    "dit-3b": dit_size(2560, 32, 20),
}
