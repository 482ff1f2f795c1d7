"""The discriminator that sharpens a tokenizer, and its hinge losses.

Notable choices: a PatchGAN (a logit for each patch, Isola et al. 2017) with GroupNorm, whose
statistics are an example's own, so a logit does not depend on the batch or on how it is split;
hinge losses are sums, for the trainer divides by the count of the whole batch.

Axes: B images, H W image, h w grid of logits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.errors import ConfigError
from latentlm_core.processes import ALONE, Processes

KERNEL = 4
NORM_GROUPS = 8


class CriticConfig(Config):
    """Size of the discriminator."""

    base_channels: int = Field(default=64, ge=NORM_GROUPS, multiple_of=NORM_GROUPS)
    """Width of the first layer; it doubles with each layer, up to eight times as wide."""
    num_layers: PositiveInt = 3
    """Strided layers: 3 judges patches of 70x70 pixels, 2 of 34x34, 1 of 16x16."""


class PatchCritic(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] => logits (B, 1, h, w), high where a patch looks real."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.base_channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], KERNEL, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(config.num_layers):
            stride = 2 if i < config.num_layers - 1 else 1
            layers.append(nn.Conv2d(widths[i], widths[i + 1], KERNEL, stride, 1, bias=False))
            layers.append(nn.GroupNorm(NORM_GROUPS, widths[i + 1]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, KERNEL, 1, 1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def num_logits(self, media_shape: Sequence[int]) -> int:
        """Number of logits, h * w, of an image (..., H, W).

        Raises:
            ConfigError: the images are too small for this many strided layers.
        """
        num_layers = self.config.num_layers
        height, width = media_shape[-2:]
        if min(height, width) < (smallest := 3 << num_layers):
            raise ConfigError(
                f"A critic of num_layers = {num_layers} needs images of at least "
                f"{smallest}x{smallest} pixels, not {width}x{height}."
            )
        return ((height >> num_layers) - 2) * ((width >> num_layers) - 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Raises:
            ConfigError: the images are too small for this many strided layers.
        """
        self.num_logits(images.shape)
        logits: Tensor = self.layers(images)
        return logits


def hinge_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Sum of (max(0, 1 - real) + max(0, 1 + fake)) / 2 over logits of one shape, a scalar."""
    return 0.5 * (F.relu(1.0 - real).sum() + F.relu(1.0 + fake).sum())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Sum of -fake over the logits of reconstructions, a scalar."""
    return -fake.sum()


def adaptive_gan_weight(
    images: Tensor,
    likeness_gradient: Tensor,
    gan_gradient: Tensor,
    last_weight: Tensor,
    sharers: Processes = ALONE,
) -> Tensor:
    """How much the GAN may pull at the decoder's last layer (Esser et al. 2021, Eq. 7).

    Args:
        images: (B, 3, H, W) reconstructions, in the graph of ``last_weight``.
        likeness_gradient: (B, 3, H, W) gradient with respect to ``images`` of everything that
            compares them with the originals.
        gan_gradient: (B, 3, H, W) gradient of the generator's GAN loss.
        last_weight: the decoder's last weight.
        sharers: the processes that share the batch; each has some of its images.

    Returns:
        The ratio of the two gradients' norms at ``last_weight``, a scalar in [0, 1e4], detached.
    """
    likeness, gan = (
        sharers.sum(torch.autograd.grad(images, last_weight, gradient, retain_graph=True)[0]).norm()
        for gradient in (likeness_gradient, gan_gradient)
    )
    ratio: Tensor = likeness / (gan + 1e-4)
    return ratio.clamp(0.0, 1e4)
