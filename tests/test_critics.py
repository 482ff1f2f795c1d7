"""The critics of a tokenizer, and the task that trains it against them."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from latentlm_core.data.stream import MediaBatch
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.runtime import evaluating, generator
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_critic, build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.critics import (
    CriticConfig,
    adaptive_gan_weight,
    hinge_critic_loss,
    hinge_generator_loss,
)
from latentlm_core.tokenizers.lpips import LPIPS, find_backbone, load_lpips
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.training.gan_memory import forecast_gan_memory
from latentlm_core.training.tasks import Terms, Turn
from latentlm_core.training.vae_task import VAELossConfig, VAETask

SMALL_CRITIC = CriticConfig(base_channels=8, num_layers=1)


def batch(count: int = 4, size: int = 16) -> MediaBatch:
    media = torch.rand((count, 3, size, size), generator=generator("media")) * 2 - 1
    labels = torch.full((count,), -1)
    return MediaBatch(media=media, labels=labels, keys=tuple(map(str, range(count))))


def task(
    kind: PosteriorKind = PosteriorKind.GAUSSIAN, perceptual: LPIPS | None = None, **loss: Any
) -> VAETask:
    network = ConvConfig(image_size=16, channels=(8, 16), stem_patch_size=2)
    posterior = LatentPosteriorConfig(kind=kind)
    vae = build_tokenizer(SigmaVAEConfig(latent_channels=4, posterior=posterior, network=network))
    return VAETask(vae, VAELossConfig(critic=SMALL_CRITIC, **loss), perceptual)


def objective(turn: Turn, terms: Terms) -> Tensor:
    parts = [w * terms[name].total / terms[name].count for name, w in turn.weights.items()]
    return torch.stack(parts).sum()


def mean(terms: Terms, name: str) -> float:
    return terms[name].total.item() / terms[name].count


# The discriminator


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


# LPIPS


@pytest.fixture(scope="module")
def random_lpips() -> LPIPS:
    pytest.importorskip("lpips", reason="the extra lpips is not installed")
    return LPIPS("alex")


def test_lpips_agrees_with_its_package(random_lpips: LPIPS) -> None:
    x, y = batch(2, 64).media, batch(2, 64).media.flip(3)
    distance = random_lpips(x, y)
    assert distance.shape == (2,)
    torch.testing.assert_close(distance, random_lpips.distance(x, y).flatten())
    assert torch.equal(random_lpips(x, x), torch.zeros(2))


def test_lpips_enlarges_small_images(random_lpips: LPIPS) -> None:
    x, y = batch(2, 16).media, batch(2, 16).media.flip(3)
    large = [nn.functional.interpolate(m, (64, 64), mode="bilinear") for m in (x, y)]
    torch.testing.assert_close(random_lpips(x, y), random_lpips(*large))


def test_lpips_is_frozen_and_differentiable_where_features_die(random_lpips: LPIPS) -> None:
    assert not any(weight.requires_grad for weight in random_lpips.parameters())
    x = batch(1, 64).media
    random_lpips(x.requires_grad_(), x.detach().flip(3)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    dead = random_lpips.distance.net.slice3[-1].register_forward_hook(lambda *a: a[2] * 0)
    black = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    random_lpips(black, x.detach()).sum().backward()
    dead.remove()
    assert black.grad is not None
    assert black.grad.isfinite().all()


def test_lpips_stays_in_float32_under_autocast(random_lpips: LPIPS) -> None:
    x, y = batch(1, 64).media, batch(1, 64).media.flip(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_lpips(x, y), random_lpips(x.float(), y.float()))
        assert random_lpips(x.bfloat16(), y).dtype == torch.float32


def test_lpips_with_real_weights_ranks_distortions() -> None:
    pytest.importorskip("lpips", reason="the extra lpips is not installed")
    try:
        find_backbone("alex", offline=True)
    except ArtifactError as error:
        pytest.skip(str(error))
    lpips = load_lpips("alex", offline=True)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    picture = torch.stack([torch.sin(3 * x), torch.cos(4 * y), x * y])[None]
    noise = torch.randn(picture.shape, generator=generator("noise"))
    near, far = (lpips(picture, picture + s * noise).item() for s in (0.05, 0.5))
    assert 0.02 < near < 0.2
    assert 0.4 < far < 0.8


def test_lpips_says_when_no_weights_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="finds no vgg backbone") as caught:
        find_backbone("vgg", offline=True)
    assert "vgg16-397923af.pth" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match=r"no file .*mine\.pth"):
        find_backbone("vgg", tmp_path / "mine.pth")
    cached = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    assert find_backbone("vgg", offline=True) == cached


def _torchvision_file(lpips: LPIPS, path: Path) -> None:
    weights = lpips.distance.net.state_dict()
    torch.save({f"features.{name.split('.', 1)[1]}": t for name, t in weights.items()}, path)


def _jax_file(lpips: LPIPS, path: Path) -> None:
    convolutions = [m for m in lpips.distance.net.modules() if isinstance(m, nn.Conv2d)]
    layers = {
        f"Conv_{i}": {
            "kernel": layer.weight.permute(2, 3, 1, 0).numpy(),
            "bias": cast(Tensor, layer.bias).numpy(),
        }
        for i, layer in enumerate(convolutions)
    }
    content = pickle.dumps({"AlexNet_0": layers}, protocol=3)
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))


@pytest.mark.parametrize(
    ("name", "write"), [("alex.pth", _torchvision_file), ("alex.ckpt", _jax_file)]
)
def test_lpips_reads_both_kinds_of_backbone(
    name: str, write: Callable[[LPIPS, Path], None], random_lpips: LPIPS, tmp_path: Path
) -> None:
    write(random_lpips, tmp_path / name)
    lpips = load_lpips("alex", tmp_path / name)
    x, y = batch(1, 64).media, batch(1, 64).media.flip(3)
    assert torch.equal(lpips(x, y), random_lpips(x, y))
    assert lpips.weights_file == tmp_path / name


def test_a_pickle_that_names_code_is_refused(random_lpips: LPIPS, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Evil()}))
    (tmp_path / "cut.ckpt").write_bytes(pickle.dumps(np.zeros(9))[:20])
    for name in ("evil", "cut"):
        with pytest.raises(CorruptFileError, match=f"{name}.ckpt is damaged"):
            random_lpips.load_backbone(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "touched").exists()


# The task


def test_the_critic_joins_exactly_at_its_start_step() -> None:
    vae_task = task(gan_weight=0.5, gan_start_step=7)
    before, after = vae_task.turns(6), vae_task.turns(7)
    assert [turn.name for turn in before] == ["generator"]
    assert [turn.name for turn in after] == ["generator", "critic"]
    assert "gan" not in before[0].loss(batch(), generator("z"))
    assert "gan" in after[0].loss(batch(), generator("z"))
    assert set(vae_task.modules) == {"vae", "critic"}
    assert vae_task.exported is vae_task.vae
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
    small, large = (forecast_gan_memory(vae_task, batch(n)) for n in (2, 4))
    assert small.without_gan > vae_bytes
    assert small.with_gan - small.without_gan > critic_bytes
    without, with_gan = small.without_gan - vae_bytes, small.with_gan - vae_bytes - critic_bytes
    assert large.without_gan - vae_bytes == pytest.approx(2 * without, rel=0.02)
    assert large.with_gan - vae_bytes - critic_bytes == pytest.approx(2 * with_gan, rel=0.02)
    assert all(weight.grad is None for weight in vae_task.vae.parameters())


def test_forecast_is_what_autograd_keeps_for_the_whole_batch() -> None:
    vae_task = task()
    data = batch(8)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = vae_task.turns(0)[0].loss(data, generator("z"))
    assert terms
    for weight in vae_task.vae.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    trained = 4 * sum(weight.nbytes for weight in vae_task.vae.parameters())
    forecast = forecast_gan_memory(vae_task, data).without_gan - trained
    everything = sum(kept.values())  # the pixel loss's share is freed before the decoder's
    assert 0.9 * everything < forecast <= everything


def test_forecast_is_the_same_twice_where_there_is_no_gan() -> None:
    forecast = forecast_gan_memory(task(), batch())
    assert forecast.with_gan == forecast.without_gan
