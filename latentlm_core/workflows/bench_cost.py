"""What sampling and training must compute and read, counted from the sizes.

A product of (n, a) and (a, b) is 2 n a b operations; norms, activations and look-ups are left out.
A causal position attends to itself and to those before it, whatever a kernel does. Weights are read
once each time that a product needs them: nothing is assumed to stay in a cache.

Axes: T latent positions, C latent channels, D hidden, R noise repeats, S solver steps.
"""

from dataclasses import dataclass

from latentlm_core.models.dit import DiTConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.nn.layers import TimestepEmbedding
from latentlm_core.workflows.bench import Ceilings

PASSES = 3
"""Forward, and backward to the inputs and to the weights."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of drawing a batch.

    Attributes:
        flops: operations.
        weights: numbers that are read of the weights.
    """

    flops: int
    weights: int

    def bound_seconds(self, ceilings: Ceilings, weight_bytes: int) -> dict[str, float]:
        """What arithmetic and weight traffic take at the ceilings.

        Args:
            ceilings: of the device.
            weight_bytes: of one weight.
        """
        return {
            "arithmetic": self.flops / ceilings.flops,
            "weight_traffic": self.weights * weight_bytes / ceilings.bytes,
        }


def sampling_cost(
    config: LatentLMConfig | DiTConfig, batch: int, num_latents: int, steps: int, is_guided: bool
) -> Cost:
    """Draw T latents of each request of a batch.

    Args:
        config: of the model.
        batch: requests.
        num_latents: T.
        steps: S.
        is_guided: whether each request has an unconditional row as well.
    """
    rows = batch * (2 if is_guided else 1)
    if isinstance(config, DiTConfig):
        return _dit_sampling(config, rows, num_latents, steps)
    backbone, head = config.backbone, config.head
    hidden, channels = backbone.hidden_size, config.latent_channels
    fed = 3 * hidden * head.intermediate_size * head.num_layers
    modulations = (3 * head.num_layers + 2) * hidden**2
    embedding = channels * hidden
    per_position = backbone.num_layers * _block_weights(backbone) + hidden**2
    per_step = fed + embedding
    weights = num_latents * (
        per_position + modulations + embedding + steps * (per_step + embedding)
    )
    products = rows * (per_position + steps * (modulations + per_step))
    products += batch * (steps + 1) * embedding
    seen = num_latents * (num_latents + 1) // 2
    attention = rows * backbone.num_layers * _attended(backbone, seen)
    return Cost(2 * num_latents * products + attention, weights)


def training_flops(config: LatentLMConfig | DiTConfig, batch: int, num_latents: int) -> int:
    """Operations of one step: forward and backward of a batch of class-conditional sequences.

    Args:
        config: of the model.
        batch: sequences.
        num_latents: T.
    """
    return PASSES * forward_flops(config, batch, num_latents)


def forward_flops(config: LatentLMConfig | DiTConfig, batch: int, num_latents: int) -> int:
    """Operations of the loss alone, see ``training_flops``."""
    if isinstance(config, DiTConfig):
        return _dit_sampling(config, batch, num_latents, 1).flops
    backbone, head = config.backbone, config.head
    hidden, embedding = backbone.hidden_size, config.latent_channels * backbone.hidden_size
    denoised = (
        head.num_layers * (3 * hidden * head.intermediate_size + 3 * hidden**2)
        + 2 * hidden**2
        + 2 * embedding
        + _timestep_weights(hidden)
    )
    products = backbone.num_layers * _block_weights(backbone) + hidden**2 + embedding
    products += head.noise_repeats * denoised
    seen = num_latents * (num_latents + 1) // 2
    attention = backbone.num_layers * _attended(backbone, seen)
    return batch * (2 * num_latents * products + attention)


def _dit_sampling(config: DiTConfig, rows: int, num_latents: int, steps: int) -> Cost:
    hidden = config.hidden_size
    per_position = config.num_layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    per_position += 2 * config.latent_channels * hidden
    per_row = (6 * config.num_layers + 2) * hidden**2
    attention = config.num_layers * 4 * hidden * num_latents**2
    flops = rows * (2 * (num_latents * per_position + per_row) + attention)
    times = _timestep_weights(hidden)
    return Cost(steps * (flops + 2 * times), steps * (per_position + per_row) + times)


def _block_weights(config: TransformerConfig) -> int:
    """Weights of the products of a block."""
    hidden, size = config.hidden_size, config.head_dim
    heads = 2 * config.num_heads + 2 * config.kv_heads
    return heads * size * hidden + 3 * hidden * config.intermediate_size


def _attended(config: TransformerConfig, pairs: int) -> int:
    """Operations of a layer for pairs of positions where one sees the other."""
    return 4 * config.num_heads * config.head_dim * pairs


def _timestep_weights(hidden: int) -> int:
    return TimestepEmbedding.frequency_size * hidden + hidden**2
