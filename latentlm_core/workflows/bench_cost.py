"""What sampling must compute and read, counted from the sizes as ``models.cost`` counts training.

Weights are read once each time that a product needs them: nothing is assumed to stay in a cache.

Axes: T latent positions, C latent channels, D hidden, S solver steps.
"""

from dataclasses import dataclass

from latentlm_core.models.cost import attention_flops, block_weights, dit_flops, timestep_weights
from latentlm_core.models.dit import DiTConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.workflows.bench import Ceilings


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
    per_position = backbone.num_layers * block_weights(backbone) + hidden**2
    per_step = fed + embedding
    weights = num_latents * (
        per_position + modulations + embedding + steps * (per_step + embedding)
    )
    products = rows * (per_position + steps * (modulations + per_step))
    products += batch * (steps + 1) * embedding
    seen = num_latents * (num_latents + 1) // 2
    attention = rows * backbone.num_layers * attention_flops(backbone, seen)
    return Cost(2 * num_latents * products + attention, weights)


def _dit_sampling(config: DiTConfig, rows: int, num_latents: int, steps: int) -> Cost:
    hidden = config.hidden_size
    per_position = config.num_layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    per_position += 2 * config.latent_channels * hidden
    per_row = (6 * config.num_layers + 2) * hidden**2
    times = timestep_weights(hidden)
    flops = steps * (rows * dit_flops(config, num_latents) + 2 * times)
    return Cost(flops, steps * (per_position + per_row) + times)
