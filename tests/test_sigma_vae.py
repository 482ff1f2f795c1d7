"""The sigma-VAE: published numbers, posterior rules, shapes and refusals."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.draws import Draws
from latentlm_core.errors import ArtifactError, ConfigError, DataError
from latentlm_core.published import sigma_vae_weights
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import LatentPosterior, LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.vit import ViTConfig

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "sigma_vae_image.safetensors"

TINY_VIT = ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_layers=2, num_heads=2)
TINY_CONV = ConvConfig(image_size=16, channels=(8, 16), num_blocks=1, stem_patch_size=2)
NETWORKS = pytest.mark.parametrize("network", [TINY_VIT, TINY_CONV], ids=["vit", "conv"])
KINDS = pytest.mark.parametrize("kind", list(PosteriorKind))


def images(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand((count, 3, height, width), generator=generator("images")) * 2 - 1


# Published numbers


@pytest.fixture
def golden() -> dict[str, Tensor]:
    if not GOLDEN.exists():
        pytest.skip("the golden numbers of the published code are not beside the checkout")
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_agrees_with_the_published_code(golden: dict[str, Tensor]) -> None:
    network = ViTConfig(image_size=32, patch_size=8, hidden_size=48, num_layers=2, num_heads=4)
    vae = build_tokenizer(SigmaVAEConfig(latent_channels=6, network=network))
    weights = {n.removeprefix("weight."): t for n, t in golden.items() if n.startswith("weight.")}
    vae.load_state_dict(sigma_vae_weights(weights))
    posterior = vae.encode(golden["in.image"])
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert_close(posterior.mean, golden["out.mean"].flatten(2).mT)
    assert_close(posterior.kl().mean(), golden["out.kl"])
    assert_close(vae.decode(posterior.mode(), (4, 4)), golden["out.reconstruction"])


@pytest.mark.parametrize(
    "name",
    [
        "encoder.blocks.0.attn.inner_attn_ln.weight",
        "encoder.cls_token.weight.bias",
        "quantize.embedding",
        "decoder_post_processor.fc3.weight",
    ],
)
def test_a_weight_that_is_not_published_is_named(name: str) -> None:
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        sigma_vae_weights({name: torch.zeros(1)})


def test_the_paper_configuration_has_172_million_parameters() -> None:
    with torch.device("meta"):
        vae = build_tokenizer(SigmaVAEConfig(latent_channels=16, network=ViTConfig()))
    count = sum(weight.numel() for weight in vae.parameters())
    assert count == 172_286_992
    assert abs(count - 172e6) < 1e6


# Posterior rules


@pytest.mark.parametrize("std", [0.5, 0.75])
def test_gaussian_sigma_has_the_published_moments(std: float) -> None:
    rule = LatentPosteriorConfig(kind=PosteriorKind.GAUSSIAN, std=std)
    noise = rule.draw(torch.zeros(100_000, 64), None, Draws(generator("moments")))
    sigma = noise.square().mean(1).sqrt()  # |sigma| of each example, up to 1 / sqrt(128)
    assert sigma.mean().item() == pytest.approx(std * math.sqrt(2 / math.pi) / 0.8, rel=0.01)
    assert sigma.mean().item() == pytest.approx(std, rel=0.01)
    assert noise.square().mean().sqrt().item() == pytest.approx(std / 0.8, rel=0.01)
    assert rule.noise_variance() == pytest.approx((std / 0.8) ** 2)


def test_gaussian_sigma_is_one_number_an_example() -> None:
    rule = LatentPosteriorConfig(kind=PosteriorKind.GAUSSIAN)
    noise = rule.draw(torch.zeros(8, 64, 64), None, Draws(generator("scalar")))
    scales = noise.std(dim=1)
    assert (scales.std(dim=1) / scales.mean(dim=1)).max() < 0.15
    assert scales.mean(dim=1).std() > 0.2


def test_fixed_none_and_learned_draw_what_they_say() -> None:
    mean = torch.full((4, 1000, 8), 3.0)
    fixed = LatentPosteriorConfig(kind=PosteriorKind.FIXED, std=0.5)
    assert (fixed.draw(mean, None, Draws(generator("f"))) - mean).std().item() == pytest.approx(
        0.5, rel=0.02
    )
    none = LatentPosteriorConfig(kind=PosteriorKind.NONE)
    assert torch.equal(none.draw(mean, None, Draws(generator("n"))), mean)
    learned = LatentPosteriorConfig(kind=PosteriorKind.LEARNED)
    log_variance = torch.full_like(mean, math.log(0.04))
    drawn = learned.draw(mean, log_variance, Draws(generator("l")))
    assert (drawn - mean).std().item() == pytest.approx(0.2, rel=0.02)
    assert learned.noise_variance(log_variance) == pytest.approx(0.04)


def test_kl_closed_forms() -> None:
    mean = torch.randn(2, 5, 3, generator=generator("mean"))
    log_variance = torch.randn(2, 5, 3, generator=generator("variance"))
    learned = LatentPosterior(mean, log_variance, LatentPosteriorConfig(kind=PosteriorKind.LEARNED))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(0.0, 1.0),
    )
    torch.testing.assert_close(learned.kl(), expected)
    plain = LatentPosterior(mean, None, LatentPosteriorConfig())
    torch.testing.assert_close(plain.kl(), mean**2)


@KINDS
def test_a_draw_depends_on_its_generator_alone(kind: PosteriorKind) -> None:
    config = SigmaVAEConfig(posterior=LatentPosteriorConfig(kind=kind), network=TINY_CONV)
    posterior = build_tokenizer(config).encode(images())
    first = posterior.sample(Draws(generator("z", 1)))
    torch.manual_seed(123)
    assert torch.equal(first, posterior.sample(Draws(generator("z", 1))))
    is_noisy = kind is not PosteriorKind.NONE
    assert torch.equal(first, posterior.sample(Draws(generator("z", 2)))) != is_noisy


# Networks


@NETWORKS
@KINDS
def test_round_trip_shapes(network: ViTConfig | ConvConfig, kind: PosteriorKind) -> None:
    posterior_config = LatentPosteriorConfig(kind=kind)
    config = SigmaVAEConfig(latent_channels=5, posterior=posterior_config, network=network)
    vae = build_tokenizer(config)
    media = images()
    posterior = vae.encode(media)
    grid = vae.grid(media.shape)
    assert grid == (4, 4)
    assert vae.grid(media.shape[1:]) == grid
    assert posterior.mean.shape == (2, 16, 5)
    assert (posterior.log_variance is not None) == (kind is PosteriorKind.LEARNED)
    assert vae.decode(posterior.sample(Draws(generator("z"))), grid).shape == media.shape
    assert (vae.modality, vae.latent_channels, vae.image_size) == ("image", 5, 16)


@NETWORKS
def test_positions_run_along_the_rows(network: ViTConfig | ConvConfig) -> None:
    """The pixels that latent t = y * width + x depends on most are around patch (y, x)."""
    vae = build_tokenizer(SigmaVAEConfig(network=network))
    media = images(1).requires_grad_()
    vae.encode(media).mean[0, 3].square().sum().backward()
    assert media.grad is not None
    influence = media.grad.square().sum((0, 1))
    right_top, left_bottom = influence[:8, 8:].sum(), influence[8:, :8].sum()
    assert right_top > 10 * left_bottom


@NETWORKS
def test_an_example_does_not_depend_on_its_batch(network: ViTConfig | ConvConfig) -> None:
    vae = build_tokenizer(SigmaVAEConfig(network=network))
    media = images(3)
    together = vae.decode(vae.encode(media).mean, (4, 4))
    alone = vae.decode(vae.encode(media[1:2]).mean, (4, 4))
    torch.testing.assert_close(together[1:2], alone)


def test_conv_takes_other_sizes_and_any_stem() -> None:
    for stem in (1, 2, 4):
        network = ConvConfig(image_size=16, channels=(8, 16), stem_patch_size=stem)
        vae = build_tokenizer(SigmaVAEConfig(network=network))
        media = images(1, height=8 * stem, width=4 * stem)
        assert vae.grid(media.shape) == (4, 2)
        assert vae.decode(vae.encode(media).mean, (4, 2)).shape == media.shape


@pytest.mark.parametrize("kind", [PosteriorKind.GAUSSIAN, PosteriorKind.LEARNED])
def test_folded_latents_are_those_of_the_same_network_four_at_a_time(kind) -> None:
    posterior = LatentPosteriorConfig(kind=kind)
    fine, folded = (
        build_tokenizer(
            SigmaVAEConfig(
                latent_channels=channels,
                posterior=posterior,
                network=ConvConfig(image_size=32, channels=(8, 16), latent_patch_size=patch),
            )
        )
        for channels, patch in ((3, 1), (12, 2))
    )
    folded.load_state_dict(fine.state_dict())
    media = images(2, height=32, width=16)
    apart, together = fine.encode(media), folded.encode(media)
    assert (fine.grid(media.shape), folded.grid(media.shape)) == ((8, 4), (4, 2))
    for one, four in ((apart.mean, together.mean), (apart.log_variance, together.log_variance)):
        if one is not None:
            parts = one.unflatten(1, (4, 2, 2, 2)).permute(0, 1, 3, 5, 2, 4)
            torch.testing.assert_close(parts.reshape(2, 8, 12), four)
    torch.testing.assert_close(
        fine.decode(apart.mean, (8, 4)), folded.decode(together.mean, (4, 2))
    )


def test_latents_that_do_not_fold_are_refused() -> None:
    network = ConvConfig(image_size=32, channels=(8, 16), latent_patch_size=2)
    with pytest.raises(ConfigError, match="6 channels do not part into 2x2"):
        build_tokenizer(SigmaVAEConfig(latent_channels=6, network=network))


def test_autocast_leaves_the_posterior_in_float32() -> None:
    vae = build_tokenizer(SigmaVAEConfig(network=TINY_VIT))
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images())
        assert vae.encoder(images()).dtype == torch.bfloat16
    assert posterior.mean.dtype == torch.float32


def test_residual_outputs_start_smaller_with_depth() -> None:
    network = ViTConfig(image_size=8, patch_size=4, hidden_size=64, num_layers=4, num_heads=2)
    weights = build_tokenizer(SigmaVAEConfig(network=network)).state_dict()
    for layer in range(4):
        for name in ("attention.out", "mlp_out"):
            std = weights[f"encoder.tower.blocks.{layer}.{name}.weight"].std().item()
            assert std == pytest.approx(0.02 / math.sqrt(2 * (layer + 1)), rel=0.05)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = SigmaVAEConfig(network=TINY_CONV)
    state = torch.get_rng_state()
    first = build_tokenizer(config, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = build_tokenizer(config, seed=1), build_tokenizer(config, seed=2)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.state_dict().items())
    assert not torch.equal(first["encoder.stem.weight"], other.state_dict()["encoder.stem.weight"])


# Refusals


def test_wrong_image_sizes_are_refused_in_a_sentence() -> None:
    vit, conv = (build_tokenizer(SigmaVAEConfig(network=n)) for n in (TINY_VIT, TINY_CONV))
    with pytest.raises(DataError, match=r"images of 16x16 pixels, not 20x16"):
        vit.encode(images(1, height=16, width=20))
    with pytest.raises(DataError, match=r"multiples of 4 pixels, not 18x16"):
        conv.encode(images(1, height=16, width=18))
    with pytest.raises(DataError, match=r"shape \(B, 16, 16\), not \(1, 16, 3\)"):
        conv.decode(torch.zeros(1, 16, 3), (4, 4))


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        ({"kind": "vit", "image_size": 250}, "250 is not a multiple of patch_size 16"),
        ({"kind": "vit", "num_heads": 7}, "768 is not a multiple of num_heads 7"),
        ({"kind": "conv", "image_size": 28}, "28 is not a multiple of 8"),
        ({"kind": "conv", "channels": [12]}, "not all multiples of 8"),
        ({"kind": "conv", "channels": []}, "channels"),
        ({"kind": "resnet"}, "resnet"),
    ],
)
def test_impossible_networks_are_refused(network: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build(SigmaVAEConfig, {"network": network}, "recipe")


@NETWORKS
def test_config_round_trips_through_json(network: ViTConfig | ConvConfig) -> None:
    config = SigmaVAEConfig(latent_channels=4, network=network)
    assert build(SigmaVAEConfig, config.to_dict(), "config.json") == config
