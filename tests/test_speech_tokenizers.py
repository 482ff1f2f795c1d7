"""The speech sigma-VAEs as wholes: published numbers, causality, rates, sizes and refusals."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.draws import Draws
from latentlm_core.errors import ArtifactError, ConfigError, DataError
from latentlm_core.published import vibevoice_tokenizer_weights
from latentlm_core.recipes.speech import SPEECH_VAE_RECIPES
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig, SpeechNetwork
from latentlm_core.tokenizers.spectral import SpectralConfig, SpectralDecoder
from latentlm_core.tokenizers.speech import CausalConvConfig
from tests.tiny_speech import CAUSAL, CHANNELS, HOP, NETWORKS, SPECTRAL, noise, speech_vae
from tests.tiny_speech import raw_latents as latents

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


# Published numbers


@pytest.fixture
def published(golden) -> tuple[SigmaVAE, dict[str, Tensor]]:
    """Our network with the weights of the golden file, and its other tensors."""
    tensors, weights = golden("sigma_vae_speech")
    network = CausalConvConfig(base_channels=4, strides=(2, 4, 5), num_blocks=(1, 1, 1, 2))
    vae = build_tokenizer(SigmaVAEConfig(latent_channels=6, network=network))
    vae.load_state_dict(vibevoice_tokenizer_weights(weights))
    return vae, tensors


def test_agrees_with_the_published_code(published: tuple[SigmaVAE, dict[str, Tensor]]) -> None:
    vae, tensors = published
    posterior = vae.encode(tensors["in.audio"])
    assert_close(posterior.mean, tensors["out.mean"])
    assert_close(vae.decode(posterior.mode(), (12,)), tensors["out.audio"])


def test_agrees_on_audio_that_does_not_fill_its_last_latent(
    published: tuple[SigmaVAE, dict[str, Tensor]],
) -> None:
    """The published decode guesses the layout of its input from the shape, wrongly where T == C.

    Here both are 6, so that it decoded the transposed latents, which we give it on purpose.
    """
    vae, tensors = published
    audio = tensors["in.audio_ragged"]
    assert vae.grid(audio.shape) == (6,)
    mean = vae.encode(audio).mean
    assert_close(mean, tensors["out.mean_ragged"])
    assert_close(vae.decode(mean.mT, (6,)), tensors["out.audio_ragged"])


def test_vibevoice_has_its_published_size() -> None:
    with torch.device("meta"):
        vae = build_tokenizer(SigmaVAEConfig(latent_channels=64, network=CausalConvConfig()))
    assert vae.speech.hop_length == 3_200
    assert num_parameters(vae.encoder) == 343_696_032


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("speech-15hz", 15.0, 32), ("speech-7.5hz", 7.5, 64), ("speech-3.75hz", 3.75, 128)],
)
def test_the_recipes_of_the_paper_have_its_rates_and_sizes(
    name: str, rate: float, channels: int
) -> None:
    config = SPEECH_VAE_RECIPES[name].tokenizer
    with torch.device("meta"):
        vae = build_tokenizer(config)
    assert (vae.speech.sample_rate, vae.latent_channels) == (24_000, channels)
    assert vae.speech.sample_rate / vae.speech.hop_length == rate
    assert vae.grid((1, 1, 24_000 * 4)) == (rate * 4,)
    assert num_parameters(vae) == pytest.approx(120e6, rel=0.05)


def num_parameters(module: object) -> int:
    assert isinstance(module, torch.nn.Module)
    return sum(parameter.numel() for parameter in module.parameters())


# Shapes and rows


@NETWORKS
@pytest.mark.parametrize("kind", list(PosteriorKind))
@pytest.mark.parametrize("num_samples", [1, HOP - 1, HOP, HOP + 1, 217])
def test_round_trip_shapes(network: SpeechNetwork, kind: PosteriorKind, num_samples: int) -> None:
    rule = LatentPosteriorConfig(kind=kind)
    vae = build_tokenizer(SigmaVAEConfig(latent_channels=5, posterior=rule, network=network))
    audio = noise(num_samples, rows=2)
    posterior, grid = vae.encode(audio), vae.grid(audio.shape)
    assert grid == vae.grid(audio.shape[1:]) == (math.ceil(num_samples / HOP),)
    assert posterior.mean.shape == (2, *grid, 5)
    assert (posterior.log_variance is not None) == (kind is PosteriorKind.LEARNED)
    assert vae.decode(posterior.sample(Draws(generator("z"))), grid).shape == (2, 1, grid[0] * HOP)
    assert (vae.modality, vae.latent_channels, vae.speech) == ("speech", 5, network)


@NETWORKS
def test_an_example_does_not_depend_on_its_batch(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    audio = noise(217, rows=3)
    mean = vae.encode(audio).mean
    assert_close(mean[1:2], vae.encode(audio[1:2]).mean)
    assert_close(vae.decode(mean, (6,))[1:2], vae.decode(mean[1:2], (6,)))


@NETWORKS
def test_a_padded_clip_is_the_same_alone_and_in_a_longer_batch(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    clip = torch.nn.functional.pad(noise(217), (0, 240 - 217))
    batch = noise(480, rows=2)
    batch[1:] = torch.nn.functional.pad(clip, (0, 240))
    alone, together = vae.encode(clip).mean, vae.encode(batch).mean
    assert_close(together[1:, :6], alone)
    assert_close(vae.decode(together, (12,))[1:, :, : 5 * HOP], vae.decode(alone, (6,))[..., :200])


# Causality


@NETWORKS
@pytest.mark.parametrize("sample", [0, 41, 119, 120, 217])
def test_a_sample_changes_no_latent_before_its_own(network: SpeechNetwork, sample: int) -> None:
    vae = speech_vae(network)
    audio = noise(7 * HOP)
    before = vae.encode(audio).mean
    audio[..., sample] += 1.0
    own = sample // HOP
    changed = (vae.encode(audio).mean - before).abs().amax(dim=(0, 2))
    assert_close(changed[:own], torch.zeros(own), atol=1e-6)
    assert changed[own] > 1e-4


@pytest.mark.parametrize(
    ("network", "early"),
    [(CAUSAL, 0), (SPECTRAL, SPECTRAL.frame_length - SPECTRAL.frame_hop)],
    ids=["causal-conv", "spectral"],
)
@pytest.mark.parametrize("position", [0, 1, 3, 6])
def test_a_latent_changes_no_audio_before_its_own(
    network: SpeechNetwork, early: int, position: int
) -> None:
    """Its own begins ``early`` samples before the latent's, where frames overlap."""
    vae = speech_vae(network)
    raw = latents(7)
    before = vae.decode(raw, (7,))
    raw[:, position] += 1.0
    changed = (vae.decode(raw, (7,)) - before).abs().flatten()
    start = max(0, position * HOP - early)
    assert_close(changed[:start], torch.zeros(start), atol=1e-6)
    assert changed[start : start + SPECTRAL.frame_hop].max() > 1e-4


# Spectra


@pytest.mark.parametrize(("length", "hop"), [(32, 8), (32, 16), (320, 80), (48, 16)])
@pytest.mark.parametrize("harmonic", [0, 3])
def test_a_stationary_spectrum_is_a_stationary_tone(length: int, hop: int, harmonic: int) -> None:
    """Overlapping windows sum to one, from the first sample to the fade at the end."""
    num_frames = 12
    decoder = SpectralDecoder(SpectralConfig(frame_length=length, frame_hop=hop, width=8), 1)
    starts = (torch.arange(num_frames) + 1) * hop - length
    spectrum = torch.zeros(1, num_frames, length // 2 + 1, dtype=torch.complex64)
    turns = 2j * math.pi * harmonic / length
    spectrum[0, :, harmonic] = torch.exp(turns * starts) * length / (1 if harmonic == 0 else 2)
    audio = decoder.overlap_add(spectrum, None)
    assert audio.shape == (1, 1, num_frames * hop)
    tone = torch.cos(2 * math.pi * harmonic * torch.arange(num_frames * hop) / length)
    fade = length - hop
    assert_close(audio[0, 0, :-fade], tone[:-fade])
    assert audio[0, 0, -1].abs() < 0.05 * tone.abs().max()


def test_silence_and_a_full_tone_are_features_of_about_unit_scale() -> None:
    vae = speech_vae(SPECTRAL)
    tone = torch.cos(2 * math.pi * 4 * torch.arange(320) / 32)[None, :, None]
    quiet, loud = (vae.encoder.spectrum(x, None) for x in (torch.zeros(1, 320, 1), tone))
    assert_close(quiet, torch.full_like(quiet, -1.0))
    assert 1.0 < loud.max() < 2.0


# Precision


@NETWORKS
def test_autocast_changes_little_and_leaves_latents_in_float32(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    audio = noise(217, rows=2)
    exact = vae.encode(audio).mean
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(audio).mean
        decoded = vae.decode(exact, (6,))
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, exact, rtol=0.1, atol=0.1 * exact.std().item())
    whole = vae.decode(exact, (6,))
    torch.testing.assert_close(decoded.float(), whole, rtol=0.1, atol=0.1 * whole.std().item())


@NETWORKS
def test_gradients_reach_every_weight(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    vae.decode(vae.encode(noise(200)).mean, (5,)).square().sum().backward()
    without = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert vae.decoder.last_weight.grad is not None


# Refusals


@NETWORKS
def test_what_cannot_be_encoded_or_decoded_is_refused_in_a_sentence(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    with pytest.raises(DataError, match="it has no samples"):
        vae.encode(torch.zeros(1, 1, 0))
    with pytest.raises(DataError, match=r"shape \(B, 3, 6\), not \(1, 4, 6\)"):
        vae.decode(torch.zeros(1, 4, CHANNELS), (3,))


def test_images_and_speech_are_not_confused() -> None:
    image = build_tokenizer(SigmaVAEConfig(network=ConvConfig(image_size=16, channels=(8,))))
    with pytest.raises(ArtifactError, match="of images, where one of speech is wanted"):
        _ = image.speech
    with pytest.raises(ArtifactError, match="of speech, where one of images is wanted"):
        _ = speech_vae(CAUSAL).image_size


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        ({"kind": "causal-conv", "strides": [2, 2]}, "one longer than strides"),
        ({"kind": "causal-conv", "strides": [], "num_blocks": [1]}, "strides"),
        ({"kind": "causal-conv", "strides": [0], "num_blocks": [1, 1]}, "strides"),
        ({"kind": "spectral", "frame_length": 100}, "100 must be a multiple of frame_hop 80"),
        ({"kind": "spectral", "frame_length": 80}, "at least twice as long"),
    ],
)
def test_impossible_networks_are_refused(network: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build(SigmaVAEConfig, {"network": network}, "recipe")


@NETWORKS
def test_config_round_trips_through_json(network: SpeechNetwork) -> None:
    config = SigmaVAEConfig(latent_channels=4, network=network)
    assert build(SigmaVAEConfig, config.to_dict(), "config.json") == config
