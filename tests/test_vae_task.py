"""The task that trains a tokenizer against its critics, and the forecast of its memory."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from latentlm_core.data.stream import MediaBatch
from latentlm_core.errors import ConfigError
from latentlm_core.runtime import evaluating, generator
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.lpips import LPIPS
from latentlm_core.training.gan_memory import forecast_gan_memory
from latentlm_core.training.hardware import autocast
from latentlm_core.training.tasks import Terms, Turn
from tests.tiny_vae_task import batch, task

CPU = torch.device("cpu")


def objective(turn: Turn, terms: Terms) -> Tensor:
    parts = [w * terms[name].total / terms[name].count for name, w in turn.weights.items()]
    return torch.stack(parts).sum()


def mean(terms: Terms, name: str) -> float:
    return terms[name].total.item() / terms[name].count


def test_the_critic_joins_exactly_at_its_start_step() -> None:
    vae_task = task(gan_weight=0.5, gan_start_step=7)
    before, after = vae_task.turns(6), vae_task.turns(7)
    assert [turn.name for turn in before] == ["generator"]
    assert [turn.name for turn in after] == ["generator", "critic"]
    assert "gan" not in before[0].loss(batch(), generator("z"))
    assert "gan" in after[0].loss(batch(), generator("z"))
    assert set(vae_task.modules) == {"vae", "critic"}
    assert vae_task.exported is vae_task.vae
    assert [turn.start for turn in after] == [0, 7]
    assert after[0].module is vae_task.vae
    assert after[1].module is vae_task.critic
    without = task(gan_start_step=0)
    assert [turn.name for turn in without.turns(0)] == ["generator"]
    assert set(without.modules) == {"vae"}


@pytest.mark.parametrize(("distance", "power"), [("l1", 1), ("l2", 2)])
def test_terms_are_the_sums_they_say(distance: str, power: int) -> None:
    vae_task = task(PosteriorKind.NONE, reconstruction=distance, beta=0.3)
    data = batch()
    (turn,) = vae_task.turns(0)
    terms = turn.loss(data, generator("z"))
    mu = vae_task.vae.encode(data.media).mean
    error = (vae_task.vae.decode(mu, (4, 4)) - data.media).abs() ** power
    assert (terms["reconstruction"].count, terms["kl"].count) == (4 * 3 * 16 * 16, 4 * 16 * 4)
    torch.testing.assert_close(terms["reconstruction"].total, error.sum())
    torch.testing.assert_close(terms["kl"].total, mu.square().sum())
    torch.testing.assert_close(objective(turn, terms), error.mean() + 0.3 * mu.square().mean())


def test_perceptual_term_counts_images(random_lpips: LPIPS) -> None:
    vae_task = task(PosteriorKind.NONE, random_lpips, perceptual_weight=0.5)
    data = batch(2)
    (turn,) = vae_task.turns(0)
    terms = turn.loss(data, generator("z"))
    reconstruction = vae_task.vae.decode(vae_task.vae.encode(data.media).mean, (4, 4))
    assert terms["perceptual"].count == 2
    torch.testing.assert_close(
        terms["perceptual"].total, random_lpips(reconstruction, data.media).sum()
    )
    assert turn.weights["perceptual"] == 0.5
    with pytest.raises(ConfigError, match=r"perceptual_weight = 0\.5 needs"):
        task(perceptual_weight=0.5)


def test_counts_are_known_before_the_loss(random_lpips: LPIPS) -> None:
    vae_task = task(
        perceptual=random_lpips, perceptual_weight=1.0, gan_weight=0.5, gan_start_step=0
    )
    for turn in vae_task.turns(0):
        assert turn.counts is not None
        counts = turn.counts(batch(3))
        terms = turn.loss(batch(3), generator("z"))
        assert {n: terms[n].count for n in turn.weights} == {n: counts[n] for n in turn.weights}


def test_each_turn_trains_its_own_module_alone() -> None:
    vae_task = task(gan_weight=0.5, gan_start_step=0)
    critic = vae_task.modules["critic"]
    generator_turn, critic_turn = vae_task.turns(0)
    objective(generator_turn, generator_turn.loss(batch(), generator("z"))).backward()
    assert all(weight.grad is not None for weight in vae_task.vae.parameters())
    assert all(weight.grad is None for weight in critic.parameters())
    vae_task.vae.zero_grad()
    objective(critic_turn, critic_turn.loss(batch(), generator("z"))).backward()
    assert all(weight.grad is not None for weight in critic.parameters())
    assert all(weight.grad is None for weight in vae_task.vae.parameters())


def test_the_gradient_is_that_of_the_whole_loss(random_lpips: LPIPS) -> None:
    """The turn differentiates each judge down to the pixels apart; end to end it is the same."""
    vae_task = task(
        PosteriorKind.NONE,
        random_lpips,
        perceptual_weight=0.5,
        gan_weight=0.25,
        gan_start_step=0,
        adaptive_gan_weight=False,
    )
    media = batch(2).media
    turn = vae_task.turns(0)[0]
    weights = tuple(vae_task.vae.parameters())
    value = objective(turn, turn.loss(batch(2), generator("z")))
    mu = vae_task.vae.encode(media).mean
    fake = vae_task.vae.decode(mu, (4, 4))
    whole = (
        (fake - media).square().mean()
        + 0.5 * random_lpips(fake, media).mean()
        - 0.25 * vae_task.modules["critic"](fake).mean()
        + 1e-2 * mu.square().mean()
    )
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(
        torch.autograd.grad(value, weights), torch.autograd.grad(whole, weights)
    )


def test_adaptive_weight_balances_the_gradients() -> None:
    vae_task = task(gan_weight=1.0, gan_start_step=0)
    turn = vae_task.turns(0)[0]
    terms = turn.loss(batch(), generator("z"))
    last = vae_task.vae.decoder.last_weight
    norms = [
        torch.autograd.grad(terms[n].total / terms[n].count, last, retain_graph=True)[0].norm()
        for n in ("reconstruction", "gan")
    ]
    assert 0 < mean(terms, "gan_pull") < 1e4
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)
    plain = task(gan_weight=1.0, gan_start_step=0, adaptive_gan_weight=False)
    raw = plain.turns(0)[0].loss(batch(), generator("z"))
    assert mean(raw, "gan") * mean(terms, "gan_pull") == pytest.approx(mean(terms, "gan"), rel=1e-4)


def test_figures_are_noise_and_spread() -> None:
    vae_task = task()
    mu = vae_task.vae.encode(batch().media).mean
    terms = vae_task.turns(0)[0].loss(batch(), generator("z"))
    std_mean, noise = mu.std(correction=0).item(), 0.75 / 0.8
    assert mean(terms, "std_mean") == pytest.approx(std_mean, rel=1e-4)
    assert mean(terms, "std_latent") == pytest.approx(math.hypot(std_mean, noise), rel=1e-4)
    ratio = noise / math.hypot(std_mean, noise)
    assert mean(terms, "noise_to_signal") == pytest.approx(ratio, rel=1e-4)
    learned = task(PosteriorKind.LEARNED)
    log_variance = learned.vae.encode(batch().media).log_variance
    assert log_variance is not None
    terms = learned.turns(0)[0].loss(batch(), generator("z"))
    spread = mean(terms, "std_latent") ** 2 - mean(terms, "std_mean") ** 2
    assert spread == pytest.approx(log_variance.exp().mean().item(), rel=1e-4)


def test_health_speaks_up_when_mu_is_inflated() -> None:
    vae_task = task(beta=1e-3)
    assert vae_task.health({"noise_to_signal": 0.5}) == []
    assert vae_task.health({"reconstruction": 0.1}) == []
    (warning,) = vae_task.health({"noise_to_signal": 0.05})
    assert "0.050" in warning
    assert "raise loss.beta (now 0.001)" in warning
    assert task(PosteriorKind.NONE).health({"noise_to_signal": 0.0}) == []


def test_losses_are_float32_under_autocast() -> None:
    vae_task = task(gan_weight=0.5, gan_start_step=0)
    for turn in vae_task.turns(0):
        with torch.autocast("cpu", torch.bfloat16):
            terms = turn.loss(batch(), generator("z"))
        assert all(term.total.dtype == torch.float32 for term in terms.values())
        assert objective(turn, terms).isfinite()


def test_validation_reads_the_mean_and_gives_psnr() -> None:
    vae_task = task()
    data = batch()
    with evaluating(vae_task.vae):
        terms = vae_task.validate(data, generator("a"))
        again = vae_task.validate(data, generator("b"))
        clean = vae_task.vae.decode(vae_task.vae.encode(data.media).mean, (4, 4)).clamp(-1, 1)
    assert all(torch.equal(terms[name].total, again[name].total) for name in terms)
    mse = ((clean + 1) / 2 - (data.media + 1) / 2).square().mean((1, 2, 3))
    expected = (-10 * mse.log10()).mean().item()
    assert mean(terms, "psnr") == pytest.approx(expected, rel=1e-4)


def test_a_tiny_vae_overfits_four_images() -> None:
    vae_task = task(beta=1e-4)
    data = MediaBatch(
        media=nn.functional.interpolate(batch(4, 4).media, (16, 16), mode="bilinear"),
        labels=torch.full((4,), -1),
        keys=("a", "b", "c", "d"),
    )
    (turn,) = vae_task.turns(0)
    optimizer = torch.optim.Adam(vae_task.vae.parameters(), 5e-3)
    for step in range(300):
        optimizer.zero_grad()
        objective(turn, turn.loss(data, generator("z", step))).backward()
        optimizer.step()
    with evaluating(vae_task.vae):
        terms = vae_task.validate(data, generator("v"))
    assert mean(terms, "psnr") > 22


# The forecast


def test_forecast_counts_weights_and_scales_with_the_batch() -> None:
    vae_task = task(gan_weight=0.5, gan_start_step=9)
    vae_bytes, critic_bytes = (
        4 * sum(p.nbytes for p in vae_task.modules[n].parameters()) for n in ("vae", "critic")
    )
    small, large = (forecast_gan_memory(vae_task, batch(n), torch.float32) for n in (2, 4))
    assert small.without_gan > vae_bytes
    assert small.with_gan - small.without_gan > critic_bytes
    without, with_gan = small.without_gan - vae_bytes, small.with_gan - vae_bytes - critic_bytes
    assert large.without_gan - vae_bytes == pytest.approx(2 * without, rel=0.02)
    assert large.with_gan - vae_bytes - critic_bytes == pytest.approx(2 * with_gan, rel=0.02)
    assert all(weight.grad is None for weight in vae_task.vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecast_is_what_autograd_keeps_for_the_whole_batch(dtype: torch.dtype) -> None:
    vae_task = task()
    data = batch(8)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with autocast(dtype, CPU), saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = vae_task.turns(0)[0].loss(data, generator("z"))
    assert terms
    for weight in vae_task.vae.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    trained = 4 * sum(weight.nbytes for weight in vae_task.vae.parameters())
    forecast = forecast_gan_memory(vae_task, data, dtype).without_gan - trained
    everything = sum(kept.values())  # the pixel loss's share is freed before the decoder's
    assert 0.9 * everything < forecast <= everything


def test_forecast_is_the_same_twice_where_there_is_no_gan() -> None:
    forecast = forecast_gan_memory(task(), batch(), torch.float32)
    assert forecast.with_gan == forecast.without_gan


def test_forecast_follows_the_precision_of_the_training() -> None:
    full, half = (
        forecast_gan_memory(task(gan_weight=0.5), batch(8), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.without_gan < full.without_gan
    assert half.with_gan < full.with_gan
