"""The task that trains a speech tokenizer against its critics, and the forecast of its memory."""

import pytest
import torch
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.data.stream import MediaBatch
from latentlm_core.draws import Draws
from latentlm_core.errors import ArtifactError, ConfigError
from latentlm_core.runtime import evaluating, generator
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.mel import MelDistance
from latentlm_core.training.gan_memory import forecast_gan_memory
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.speech_task import SpeechLossConfig, SpeechVAETask, si_snr
from latentlm_core.training.step import Stepper
from latentlm_core.training.tasks import Terms, Turn
from tests import tiny_vae_task
from tests.tiny_speech_task import RATE, chirp, noises, recordings, sine, task

CPU = torch.device("cpu")


def objective(turn: Turn, terms: Terms) -> Tensor:
    parts = [w * terms[name].total / terms[name].count for name, w in turn.weights.items()]
    return torch.stack(parts).sum()


def mean(terms: Terms, name: str) -> float:
    return terms[name].total.item() / terms[name].count


def stepper(speech: SpeechVAETask, optimizer: OptimizerConfig) -> Stepper:
    modules = {turn.name: turn.module for turn in speech.turns(0)}
    configs = dict.fromkeys(modules, optimizer)
    return Stepper(modules, configs, total_steps=999, seed=0, device=CPU, dtype=torch.float32)


def validated_distance(speech: SpeechVAETask, data: MediaBatch) -> float:
    with evaluating(speech.vae):
        return mean(speech.validate(data, generator("v")), "mel_distance")


def test_the_critics_join_exactly_at_their_start_step() -> None:
    speech = task(gan_start_step=7)
    before, after = speech.turns(6), speech.turns(7)
    assert [turn.name for turn in before] == ["generator"]
    assert [turn.name for turn in after] == ["generator", "critic"]
    assert [turn.start for turn in after] == [0, 7]
    assert {"gan", "feature"}.isdisjoint(before[0].loss(noises(), generator("z")))
    assert {"gan", "feature"} <= after[0].loss(noises(), generator("z")).keys()
    assert set(speech.modules) == {"vae", "critic"}
    assert speech.exported is speech.vae
    without = task(gan_weight=0.0)
    assert [turn.name for turn in without.turns(9)] == ["generator"]
    assert set(without.modules) == {"vae"}


def test_the_defaults_are_the_published_weights() -> None:
    weights = [turn.weights for turn in task().turns(0)]
    assert weights[0] == {"mel_distance": 15.0, "kl": 0.1, "gan": 1.0, "feature": 2.0}
    assert weights[1] == {"critic": 1.0}
    loss = build(SpeechLossConfig, {"kind": "speech", "critic": {"loss": "hinge"}}, "recipe")
    assert loss.critic.loss == "hinge"


@pytest.mark.parametrize("loss", ["least_squares", "hinge"])
def test_counts_are_known_before_the_loss(loss: str) -> None:
    speech = task(waveform_weight=1.0)
    speech.config = speech.config.model_copy(
        update={"critic": speech.config.critic.model_copy(update={"loss": loss})}
    )
    for turn in speech.turns(0):
        assert turn.counts is not None
        counts, terms = turn.counts(noises(3)), turn.loss(noises(3), generator("z"))
        assert {n: terms[n].count for n in turn.weights} == {n: counts[n] for n in turn.weights}


def test_terms_are_the_sums_they_say() -> None:
    speech = task(PosteriorKind.NONE, waveform_weight=2.0, gan_weight=0.0, beta=0.3)
    data = noises(3)
    (turn,) = speech.turns(0)
    terms = turn.loss(data, generator("z"))
    mu = speech.vae.encode(data.media).mean
    fake = speech.vae.decode(mu, (4,))
    mel, wave = MelDistance(RATE)(fake, data.media), (fake - data.media).abs()
    assert [terms[n].count for n in ("mel_distance", "waveform", "kl")] == [3, 3 * 1_280, 3 * 4 * 8]
    torch.testing.assert_close(
        objective(turn, terms), 15 * mel.mean() + 2 * wave.mean() + 0.3 * mu.square().mean()
    )


def test_each_turn_trains_its_own_module_alone() -> None:
    speech = task()
    generator_turn, critic_turn = speech.turns(0)
    objective(generator_turn, generator_turn.loss(noises(), generator("z"))).backward()
    assert all(weight.grad is not None for weight in speech.vae.parameters())
    assert all(weight.grad is None for weight in speech.modules["critic"].parameters())
    speech.vae.zero_grad()
    objective(critic_turn, critic_turn.loss(noises(), generator("z"))).backward()
    assert all(weight.grad is not None for weight in speech.modules["critic"].parameters())
    assert all(weight.grad is None for weight in speech.vae.parameters())


def test_the_gradient_is_that_of_the_whole_loss() -> None:
    speech = task(PosteriorKind.NONE)
    media, turn = noises(2).media, speech.turns(0)[0]
    weights = tuple(speech.vae.parameters())
    value = objective(turn, turn.loss(noises(2), generator("z")))
    mu = speech.vae.encode(media).mean
    fake = speech.vae.decode(mu, (4,))
    critic = speech.modules["critic"]
    judged = list(zip(critic(media), critic(fake), strict=True))
    layers = [
        (r.detach() - f).abs().mean()
        for real, other in judged
        for r, f in zip(real.features, other.features, strict=True)
    ]
    whole = (
        15 * MelDistance(RATE)(fake, media).mean()
        + torch.stack([(1 - other.logits).square().mean() for _, other in judged]).sum()
        + 2 * torch.stack(layers).sum()
        + 0.1 * mu.square().mean()
    )
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(
        torch.autograd.grad(value, weights),
        torch.autograd.grad(whole, weights),
        rtol=1e-3,
        atol=1e-5,
    )


def test_a_split_batch_takes_the_same_step() -> None:
    """Gradients of one batch and of its parts, through the trainer's own arithmetic."""
    data = noises(4)
    parts = [recordings(data.media[:1]), recordings(data.media[1:])]
    results = []
    for batches in ([data], parts):
        speech = task(PosteriorKind.NONE)
        figures = stepper(speech, OptimizerConfig(clip_norm=0.0)).step(speech.turns(0), batches, 0)
        gradients = {n: p.grad for n, p in speech.modules["critic"].named_parameters()}
        results.append(({n: mean(figures, n) for n in figures}, gradients))
    (whole, whole_gradients), (split, split_gradients) = results
    averages = {"std_mean", "std_latent", "noise_to_signal"}  # of one batch each, as documented
    for name in whole.keys() - averages:
        assert split[name] == pytest.approx(whole[name], rel=1e-3), name
    torch.testing.assert_close(split_gradients, whole_gradients, rtol=1e-3, atol=1e-5)


def test_one_sigma_is_drawn_for_each_segment() -> None:
    speech = task(gan_weight=0.0)
    posterior = speech.vae.encode(noises(64).media)
    noise = posterior.sample(Draws(generator("z"))) - posterior.mean
    levels = noise.flatten(1).std(1)
    assert levels.min() < 0.3 < 1.2 < levels.max()


def test_losses_are_float32_under_autocast() -> None:
    speech = task(waveform_weight=1.0)
    for turn in speech.turns(0):
        with torch.autocast("cpu", torch.bfloat16):
            terms = turn.loss(noises(), generator("z"))
            loss = objective(turn, terms)
        assert all(term.total.dtype == torch.float32 for term in terms.values())
        loss.backward()
        assert all(p.grad.isfinite().all() for p in turn.module.parameters() if p.grad is not None)


def test_what_cannot_be_trained_is_refused_at_once() -> None:
    with pytest.raises(ArtifactError, match="tokenizer of images"):
        SpeechVAETask(tiny_vae_task.task().vae, SpeechLossConfig())
    (turn,) = task(gan_start_step=1_000).turns(0)
    assert turn.counts is not None
    with pytest.raises(ConfigError, match="at least 256 samples"):  # and not at step 1,000
        turn.counts(noises(1, 160))


def test_validation_reads_the_mean_and_compares_samples_where_training_does() -> None:
    speech = task()
    data = noises(3, 1_300)  # the last frame is not whole
    with evaluating(speech.vae):
        terms = speech.validate(data, generator("a"))
        again = speech.validate(data, generator("b"))
        fake = speech.vae.decode(speech.vae.encode(data.media).mean, (5,))[..., :1_300]
        expected = MelDistance(RATE)(fake, data.media).mean().item()
    assert all(torch.equal(terms[name].total, again[name].total) for name in terms)
    assert mean(terms, "mel_distance") == pytest.approx(expected, rel=1e-5)
    assert terms.keys() == {"mel_distance", "kl", "std_mean", "std_latent", "noise_to_signal"}
    assert {"si_snr", "waveform"} <= task(waveform_weight=1.0).validate(data, generator("c")).keys()


def test_si_snr_is_the_ratio_of_orthogonal_parts() -> None:
    tone, other = sine(400), sine(700)  # whole periods: orthogonal, of zero mean
    noisy = 3 * (tone + 0.1 * other)
    assert si_snr(noisy, tone).item() == pytest.approx(20.0, abs=1e-2)
    assert si_snr(tone, tone).item() > 90
    assert si_snr(noisy, torch.zeros_like(tone)).isfinite().all()


def test_health_speaks_up_when_mu_is_inflated() -> None:
    speech = task(beta=1e-3)
    assert speech.health({"noise_to_signal": 0.5}) == []
    (warning,) = speech.health({"noise_to_signal": 0.05})
    assert "raise loss.beta (now 0.001)" in warning


@pytest.mark.parametrize(("gan_weight", "num_steps", "factor"), [(0.0, 150, 0.2), (1.0, 50, 0.5)])
def test_a_tiny_vae_overfits_two_chirps(gan_weight: float, num_steps: int, factor: float) -> None:
    speech = task(beta=1e-3, gan_weight=gan_weight)
    data = recordings(torch.cat([chirp(200, 900), chirp(1_500, 400)]))
    optimizer = OptimizerConfig(lr=6e-3, betas=(0.8, 0.99), warmup_steps=0, schedule="constant")
    steps = stepper(speech, optimizer)
    before = validated_distance(speech, data)
    for step in range(num_steps):
        steps.step(speech.turns(step), [data], step)
    assert validated_distance(speech, data) < factor * before


def test_forecast_counts_the_critics() -> None:
    speech = task(gan_start_step=5)
    critic = 4 * sum(p.nbytes for p in speech.modules["critic"].parameters())
    vae = 4 * sum(p.nbytes for p in speech.modules["vae"].parameters())
    small, large = (forecast_gan_memory(speech, noises(n), torch.float32) for n in (2, 4))
    assert small.without_gan > vae
    assert small.with_gan - small.without_gan > critic
    growth = (large.with_gan - small.with_gan) / (small.with_gan - vae - critic)
    assert growth == pytest.approx(1.0, abs=0.3)
    assert all(p.requires_grad for p in speech.modules["critic"].parameters())
