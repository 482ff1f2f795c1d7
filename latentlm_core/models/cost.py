"""What a loss must compute, counted from the sizes of a model and of what it learns from.

A product of (n, a) and (a, b) is 2 n a b operations; norms, activations and look-ups are left out.
A position attends to those that it sees, whatever a kernel does with the others; padding costs
nothing, and neither does what is computed twice to save memory.

Axes: T latent positions of an image, C latent channels, D hidden, R noise repeats.
"""

from latentlm_core.layout import SequenceLayout
from latentlm_core.models.dit import DiTConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.models.transfusion import TransfusionConfig
from latentlm_core.nn.layers import TimestepEmbedding

PASSES = 3
"""Forward, and backward to the inputs and to the weights."""

ModelConfig = LatentLMConfig | TransfusionConfig | DiTConfig


def training_flops(config: ModelConfig, layout: SequenceLayout) -> int:
    """Operations of one step: forward and backward of a batch.

    Args:
        config: of the model.
        layout: of the batch; of a DiT, that of class-conditional images.
    """
    return PASSES * forward_flops(config, layout)


def forward_flops(config: ModelConfig, layout: SequenceLayout) -> int:
    """Operations of the loss alone, see ``training_flops``."""
    latents, rows = layout.latent_targets.numel(), layout.kind.shape[0]
    if isinstance(config, DiTConfig):
        return rows * (
            dit_flops(config, latents // rows) + 2 * timestep_weights(config.hidden_size)
        )
    tokens = layout.text_targets.numel()
    if isinstance(config, TransfusionConfig):
        return _transfusion_flops(config, layout, latents, tokens)
    hidden, head = config.backbone.hidden_size, config.head
    embedding = config.latent_channels * hidden
    denoised = (
        head.num_layers * (3 * hidden * head.intermediate_size + 3 * hidden**2)
        + 2 * hidden**2
        + 2 * embedding
        + timestep_weights(hidden)
    )
    predicted = latents * (hidden**2 + head.noise_repeats * denoised)
    if config.predicts_text:
        predicted += tokens * hidden * config.vocab_size
    pairs = layout.extent.causal_pairs
    return _backbone_flops(config, layout.extent.positions, pairs) + 2 * predicted


def dit_flops(config: DiTConfig, num_latents: int) -> int:
    """Operations of a DiT for an image of T latents, its timestep embedded already."""
    hidden = config.hidden_size
    return 2 * num_latents * config.latent_channels * hidden + _denoised_image(
        hidden, config.num_layers, config.intermediate_size, config.latent_channels, num_latents
    )


def block_weights(config: TransformerConfig) -> int:
    """Weights of the products of a block."""
    hidden, size = config.hidden_size, config.head_dim
    heads = 2 * config.num_heads + 2 * config.kv_heads
    return heads * size * hidden + 3 * hidden * config.intermediate_size


def attention_flops(config: TransformerConfig, pairs: int) -> int:
    """Operations of a layer for pairs of positions where one sees the other."""
    return 4 * config.num_heads * config.head_dim * pairs


def timestep_weights(hidden: int) -> int:
    """Weights of what embeds a timestep."""
    return TimestepEmbedding.frequency_size * hidden + hidden**2


def _backbone_flops(config: LatentLMConfig | TransfusionConfig, positions: int, pairs: int) -> int:
    """Of embedding all positions as latents, and of every block."""
    backbone = config.backbone
    embedding = config.latent_channels * backbone.hidden_size
    products = positions * (backbone.num_layers * block_weights(backbone) + embedding)
    return 2 * products + backbone.num_layers * attention_flops(backbone, pairs)


def _transfusion_flops(
    config: TransfusionConfig, layout: SequenceLayout, latents: int, tokens: int
) -> int:
    backbone, extent = config.backbone, layout.extent
    images = latents // config.num_latents
    image = 2 * timestep_weights(backbone.hidden_size) + _denoised_image(
        backbone.hidden_size,
        config.head_layers,
        backbone.intermediate_size,
        config.latent_channels,
        config.num_latents,
    )
    pairs = extent.causal_pairs + extent.ahead_pairs
    words = 2 * tokens * backbone.hidden_size * config.vocab_size
    return _backbone_flops(config, extent.positions, pairs) + images * image + words


def _denoised_image(
    hidden: int, num_layers: int, intermediate_size: int, channels: int, num_latents: int
) -> int:
    """Of a DiT's blocks and its last layer."""
    per_position = num_layers * (4 * hidden**2 + 3 * hidden * intermediate_size)
    per_position += channels * hidden
    per_image = (6 * num_layers + 2) * hidden**2
    attention = num_layers * 4 * hidden * num_latents**2
    return 2 * (num_latents * per_position + per_image) + attention
