"""The critics of a speech tokenizer: what they see, their losses and how these count."""

import pytest
import torch
from torch import Tensor

from latentlm_core.errors import ConfigError
from latentlm_core.runtime import generator, seeded_init
from latentlm_core.tokenizers.speech_critics import (
    SpeechCritic,
    SpeechCriticConfig,
    Verdict,
    critic_loss,
    feature_distance,
    generator_loss,
    mean_logit,
)
from tests.tiny_speech_task import SMALL_CRITIC, noises, sine

KINDS = ("least_squares", "hinge")


def small(**changes: object) -> SpeechCritic:
    with seeded_init("critic", 0):
        return SpeechCritic(SpeechCriticConfig(**(SMALL_CRITIC.model_dump() | changes)))


def test_the_default_is_the_published_one_for_24_khz() -> None:
    critic = SpeechCritic(SpeechCriticConfig())
    verdicts = critic(torch.zeros(1, 1, 2_400))
    shapes = [tuple(feature.shape[1:]) for feature in verdicts[0].features]
    assert shapes == [(2, 32, 400), (2, 128, 134), (2, 512, 45), (2, 1024, 15), (2, 1024, 15)]
    assert len(verdicts) == 5 + 3
    assert [len(verdict.features) for verdict in verdicts] == [5] * 5 + [5 * 5] * 3
    assert [feature.shape[1:] for feature in verdicts[5].features[:2]] == [
        (32, 5, 102),
        (32, 5, 51),
    ]
    assert 41e6 < sum(weight.numel() for weight in critic.parameters()) < 43e6


def test_a_logit_does_not_depend_on_the_batch() -> None:
    critic, media = small(), noises(4).media
    for whole, part in zip(critic(media), critic(media[1:3]), strict=True):
        torch.testing.assert_close(whole.logits[1:3], part.logits)
        for one, other in zip(whole.features, part.features, strict=True):
            torch.testing.assert_close(one[1:3], other)


def test_a_period_is_judged_row_by_row() -> None:
    """Of the samples at a distance that is no multiple of the period, none reaches a logit."""
    (critic,) = small(periods=(3,), stft_windows=()).critics
    media = noises(1).media.requires_grad_()
    logits = critic(media).logits.reshape(3, -1)
    logits[1, logits.shape[1] // 2].backward()
    assert media.grad is not None
    heard = torch.nonzero(media.grad[0, 0])[:, 0] % 3
    assert heard.unique().tolist() == [1]


def test_white_noise_keeps_its_level_in_the_spectrum() -> None:
    (critic,) = small(periods=(), stft_windows=(256,)).critics
    noise = torch.randn(1, 1, 80_000, generator=generator("noise"))
    parts = critic._spectrum(noise)
    assert parts.shape == (1, 2, 80_000 // 64 + 1, 129)
    assert parts.square().sum(1).mean().item() == pytest.approx(1.0, rel=0.03)


def test_recordings_too_short_and_sizes_that_cannot_be_are_refused() -> None:
    critic = small()
    assert critic.config.min_samples == 256
    assert len(critic(torch.zeros(1, 1, 256))) == 4
    with pytest.raises(ConfigError, match=r"at least 256 samples.* not 255"):
        critic(torch.zeros(1, 1, 255))
    for changes, problem in (
        ({"periods": (), "stft_windows": ()}, "there is no critic"),
        ({"band_edges": (0.0, 0.5)}, r"from 0\.0 to 1\.0"),
        ({"band_edges": (0.0, 0.001, 1.0)}, "a band without bins of a window of 256"),
    ):
        with pytest.raises(ValueError, match=problem):
            small(**changes)


# Losses


def verdicts(*logits: list[list[float]]) -> list[Verdict]:
    return [Verdict(torch.tensor(rows), []) for rows in logits]


def test_loss_closed_forms() -> None:
    """Two critics of one and of two logits, on two recordings; each critic counts the same."""
    real = verdicts([[2.0], [0.5]], [[1.0, 0.0], [1.0, 1.0]])
    fake = verdicts([[0.0], [0.5]], [[-2.0, 0.0], [0.0, 0.0]])
    squares = (1 + 0.25) + (0.5 + 0), (0 + 0.25) + (2 + 0)
    assert critic_loss("least_squares", real, fake).item() == sum(squares)
    assert generator_loss("least_squares", fake).item() == (1 + 0.25) + (5 + 1)
    hinge = (0 + 0.5) + (0.5 + 0), (1 + 1.5) + (0.5 + 1)
    assert critic_loss("hinge", real, fake).item() == sum(hinge)
    assert generator_loss("hinge", fake).item() == -0.5 + 1.0
    assert mean_logit(real).item() == ((2 + 0.5) + (0.5 + 1)) / 2


def test_feature_distance_averages_a_layer_and_sums_layers() -> None:
    def features(scale: float) -> list[Verdict]:
        layers = [torch.full((2, 3), scale), torch.full((2, 4, 5), 3 * scale)]
        return [Verdict(torch.zeros(2, 1), layers), Verdict(torch.zeros(2, 1), layers[:1])]

    distance = feature_distance(features(1.0), features(1.5))
    assert distance.item() == 2 * (0.5 + 1.5 + 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_sums_over_examples(kind: str) -> None:
    critic, real, fake = small(), noises(4).media, noises(8).media[4:]

    def losses(rows: slice) -> Tensor:
        one, other = critic(real[rows]), critic(fake[rows])
        return torch.stack(
            [
                critic_loss(kind, one, other),
                generator_loss(kind, other),
                feature_distance(one, other),
            ]
        )

    torch.testing.assert_close(
        losses(slice(0, 4)), losses(slice(0, 1)) + losses(slice(1, 4)), rtol=1e-4, atol=1e-6
    )


def test_feature_distance_leaves_the_real_side_alone() -> None:
    critic = small()
    real, fake = (noises(1).media.requires_grad_() for _ in range(2))
    distance = feature_distance(critic(real), critic(fake + 0.1))
    assert torch.autograd.grad(distance, real, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(distance, fake)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alone", [{"stft_windows": ()}, {"periods": ()}])
def test_each_critic_learns_to_tell_tones_from_noise(kind: str, alone: dict[str, tuple]) -> None:
    critic = small(**alone)
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-2, betas=(0.8, 0.99))
    history = []
    for step in range(60):
        real, fake = tones_and_noises(step)
        optimizer.zero_grad()
        loss = critic_loss(kind, critic(real), critic(fake))
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.3 * sum(history[:5])
    real, fake = tones_and_noises(1_000)
    assert (mean_logit(critic(real)) - mean_logit(critic(fake))).item() / len(real) > 0.7


def tones_and_noises(seed: int) -> tuple[Tensor, Tensor]:
    random = generator("tones", seed)
    hertz = 200 + 800 * torch.rand(4, generator=random)
    tones = torch.cat([sine(float(one), 1_280) for one in hertz])
    return tones, tones.std() * torch.randn(tones.shape, generator=random)
