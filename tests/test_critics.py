"""The critic of a tokenizer: what it sees, its losses and the weight of its pull."""

import pytest
import torch
from torch import nn

from latentlm_core.errors import ConfigError
from latentlm_core.tokenizers.build import build_critic
from latentlm_core.tokenizers.critics import (
    CriticConfig,
    adaptive_gan_weight,
    hinge_critic_loss,
    hinge_generator_loss,
)
from latentlm_core.training.vae_task import VAELossConfig, VAETask
from tests.tiny_vae_task import SMALL_CRITIC, batch, task


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_judges_a_patch_of_the_stated_size(num_layers: int, patch: int) -> None:
    critic = build_critic(CriticConfig(base_channels=8, num_layers=num_layers))
    for module in critic.modules():  # the norms see the whole image
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    image = torch.zeros(1, 3, 96, 96, requires_grad=True)
    logits = critic(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1)) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (patch, patch)


def test_a_logit_does_not_depend_on_the_batch() -> None:
    critic = build_critic(SMALL_CRITIC)
    media = batch(4).media
    torch.testing.assert_close(critic(media)[1:3], critic(media[1:3]))


def test_images_too_small_for_the_critic_are_refused() -> None:
    critic = build_critic(CriticConfig(base_channels=8, num_layers=3))
    assert critic(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 2, 2)
    with pytest.raises(ConfigError, match=r"num_layers = 3 needs .* 24x24 pixels, not 16x16"):
        critic(torch.zeros(1, 3, 16, 16))
    vae = task().vae
    with pytest.raises(ConfigError, match="num_layers = 3 needs"):  # and not at its start step
        VAETask(vae, VAELossConfig(gan_weight=0.5))


@pytest.mark.parametrize(("num_layers", "height", "width"), [(1, 9, 6), (2, 12, 31), (3, 32, 45)])
def test_the_number_of_logits_is_arithmetic(num_layers: int, height: int, width: int) -> None:
    critic = build_critic(CriticConfig(base_channels=8, num_layers=num_layers))
    images = torch.zeros(1, 3, height, width)
    assert critic(images).numel() == critic.num_logits(images.shape)


def test_hinge_closed_forms() -> None:
    real, fake = torch.tensor([2.0, 0.25, -1.0]), torch.tensor([-3.0, -0.5, 1.0])
    assert hinge_critic_loss(real, fake).item() == 0.5 * (0 + 0.75 + 2) + 0.5 * (0 + 0.5 + 2)
    assert hinge_generator_loss(fake).item() == 2.5


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    images, ones = 5 * weight, torch.ones(2)
    ratio = adaptive_gan_weight(images, 6 * ones, 2 * ones, weight)
    assert ratio.item() == pytest.approx(3.0, rel=1e-3)
    assert not ratio.requires_grad
    assert adaptive_gan_weight(images, 1e3 * ones, 0 * ones, weight).item() == 1e4
