"""Speech piece by piece is speech as a whole, whatever the pieces."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from latentlm_core.errors import ArtifactError
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.causal import (
    CausalBlock,
    CausalConv,
    CausalConvTranspose,
    StreamState,
)
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig, SpeechNetwork
from latentlm_core.tokenizers.streaming import StreamingDecoder, StreamingEncoder
from tests.tiny_speech import (
    CAUSAL,
    CHANNELS,
    HOP,
    NETWORKS,
    SPECTRAL,
    noise,
    raw_latents,
    speech_vae,
)

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

SAMPLES = 7 * HOP + 17
"""The last latent stands for 17 samples."""


def encode_in_pieces(vae: SigmaVAE, pieces: Sequence[Tensor], rows: int = 1) -> Tensor:
    encoder = StreamingEncoder(vae, rows)
    means = [encoder.push(piece).mean for piece in pieces]
    return torch.cat([*means, encoder.finish().mean], dim=1)


def decode_in_pieces(vae: SigmaVAE, pieces: Sequence[Tensor], rows: int = 1) -> Tensor:
    decoder = StreamingDecoder(vae, rows)
    audio = [decoder.push(piece) for piece in pieces]
    return torch.cat([*audio, decoder.finish()], dim=-1)


@NETWORKS
@pytest.mark.parametrize("size", [1, 3, HOP - 1, HOP, HOP + 1, 3 * HOP, 1_000])
def test_encoding_in_pieces_is_encoding_the_whole(network: SpeechNetwork, size: int) -> None:
    vae = speech_vae(network)
    audio = noise(SAMPLES, rows=2)
    assert_close(encode_in_pieces(vae, audio.split(size, dim=-1), 2), vae.encode(audio).mean)


@NETWORKS
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_decoding_in_pieces_is_decoding_the_whole(network: SpeechNetwork, size: int) -> None:
    vae = speech_vae(network)
    latents = raw_latents(8, rows=2)
    audio = decode_in_pieces(vae, latents.split(size, dim=1), 2)
    assert_close(audio, vae.decode(latents, (8,)))


@NETWORKS
@pytest.mark.parametrize("num_samples", [1, HOP - 1, HOP, HOP + 1, 5 * HOP])
def test_pieces_of_any_length_empty_ones_too(network: SpeechNetwork, num_samples: int) -> None:
    vae = speech_vae(network)
    audio = noise(num_samples)
    mean = vae.encode(audio).mean
    lengths = [0, num_samples // 3, 0, num_samples - num_samples // 3, 0]
    assert_close(encode_in_pieces(vae, audio.split(lengths, dim=-1)), mean)
    count = mean.shape[1]
    lengths = [0, count // 3, 0, count - count // 3, 0]
    assert_close(decode_in_pieces(vae, mean.split(lengths, dim=1)), vae.decode(mean, (count,)))


@NETWORKS
def test_a_stream_of_nothing_is_nothing(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    assert encode_in_pieces(vae, [], 2).shape == (2, 0, CHANNELS)
    assert decode_in_pieces(vae, [], 2).shape == (2, 1, 0)


@NETWORKS
def test_latents_come_as_soon_as_their_samples_are_there(network: SpeechNetwork) -> None:
    encoder = StreamingEncoder(speech_vae(network))
    arrived = [encoder.push(sample).mean.shape[1] for sample in noise(SAMPLES).split(1, dim=-1)]
    assert arrived == [int(count % HOP == 0) for count in range(1, SAMPLES + 1)]
    assert encoder.finish().mean.shape == (1, 1, CHANNELS)


@pytest.mark.parametrize(
    ("network", "delay"),
    [(CAUSAL, 0), (SPECTRAL, SPECTRAL.frame_length - SPECTRAL.frame_hop)],
    ids=["causal-conv", "spectral"],
)
def test_audio_waits_for_no_more_than_the_overlap(network: SpeechNetwork, delay: int) -> None:
    decoder = StreamingDecoder(speech_vae(network))
    lengths = [decoder.push(latent).shape[-1] for latent in raw_latents(4).split(1, dim=1)]
    assert lengths == [HOP - delay, HOP, HOP, HOP]
    assert decoder.finish().shape[-1] == delay


@NETWORKS
def test_two_streams_side_by_side_do_not_mix(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    audio = [noise(SAMPLES, name="a"), noise(SAMPLES, name="b")]
    means = [vae.encode(clip).mean for clip in audio]
    encoders, decoders = (
        [kind(vae) for _ in audio] for kind in (StreamingEncoder, StreamingDecoder)
    )
    seen: list[list[Tensor]] = [[], []]
    heard: list[list[Tensor]] = [[], []]
    for pieces in zip(*(clip.split(HOP + 3, dim=-1) for clip in audio), strict=True):
        for stream, piece in enumerate(pieces):
            seen[stream].append(encoders[stream].push(piece).mean)
            heard[stream].append(decoders[stream].push(seen[stream][-1]))
    for stream, mean in enumerate(means):
        seen[stream].append(encoders[stream].finish().mean)
        heard[stream] += [decoders[stream].push(seen[stream][-1]), decoders[stream].finish()]
        assert_close(torch.cat(seen[stream], dim=1), mean)
        assert_close(torch.cat(heard[stream], dim=-1), vae.decode(mean, (8,)))


@NETWORKS
def test_whole_clips_between_the_pieces_of_a_stream_leave_it_alone(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    audio = noise(SAMPLES)
    encoder, means = StreamingEncoder(vae), []
    for piece in audio.split(50, dim=-1):
        means.append(encoder.push(piece).mean)
        vae.encode(noise(90, name="other"))
    assert_close(torch.cat([*means, encoder.finish().mean], dim=1), vae.encode(audio).mean)


@NETWORKS
def test_a_stream_restores_the_mode_and_keeps_no_gradients(network: SpeechNetwork) -> None:
    vae = speech_vae(network).train()
    mean = encode_in_pieces(vae, [noise(SAMPLES)])
    audio = decode_in_pieces(vae, [mean])
    assert vae.training
    assert not mean.requires_grad
    assert not audio.requires_grad


def test_a_learned_posterior_streams_its_variance() -> None:
    config = SigmaVAEConfig.model_validate(
        {"network": CAUSAL, "posterior": {"kind": PosteriorKind.LEARNED}}
    )
    vae = build_tokenizer(config)
    audio = noise(2 * HOP)
    streamed, whole = StreamingEncoder(vae).push(audio), vae.encode(audio)
    assert streamed.log_variance is not None
    assert whole.log_variance is not None
    assert_close(streamed.log_variance, whole.log_variance)


@NETWORKS
def test_streams_work_under_autocast(network: SpeechNetwork) -> None:
    vae = speech_vae(network)
    audio = noise(SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        mean = encode_in_pieces(vae, audio.split(50, dim=-1))
        heard = decode_in_pieces(vae, mean.split(3, dim=1))
    exact = vae.encode(audio).mean
    torch.testing.assert_close(mean, exact, rtol=0.1, atol=0.1 * exact.std().item())
    assert heard.shape == (1, 1, 8 * HOP)
    assert heard.isfinite().all()


@pytest.mark.parametrize(
    "layer",
    [
        CausalConv(3, 5, 7),
        CausalConv(3, 5, 8, 4),
        CausalConv(3, 5, 4, 4),
        CausalConv(3, 3, 7, groups=3),
        CausalConvTranspose(3, 5, 4),
        CausalBlock(3, 0.5, 1e-5),
    ],
    ids=["conv", "strided", "without past", "depthwise", "transposed", "block"],
)
def test_each_layer_in_pieces_is_the_layer_as_a_whole(layer: torch.nn.Module) -> None:
    x = noise(3 * 22, rows=2).reshape(2, 22, 3)
    whole, state, parts = layer(x), StreamState(), []
    for piece in x.split([1, 0, 5, 2, 14], dim=1):
        state.is_final = len(parts) == 4
        parts.append(layer(piece, state))
    assert_close(torch.cat(parts, dim=1), whole)


def test_convolutions_are_those_of_pytorch() -> None:
    x = noise(3 * 24, rows=2).reshape(2, 24, 3)
    conv, transposed = CausalConv(3, 5, 8, 4), CausalConvTranspose(3, 5, 4)
    padded = torch.nn.functional.pad(x.mT, (4, 0))
    assert_close(conv(x), torch.conv1d(padded, conv.weight, conv.bias, stride=4).mT)
    untrimmed = torch.conv_transpose1d(x.mT, transposed.weight, transposed.bias, stride=4)
    assert_close(transposed(x), untrimmed[..., :-4].mT)


def test_tokenizers_of_images_do_not_stream() -> None:
    image = build_tokenizer(SigmaVAEConfig(network=ConvConfig(image_size=16, channels=(8,))))
    with pytest.raises(ArtifactError, match="which are encoded as a whole"):
        StreamingEncoder(image)
    with pytest.raises(ArtifactError, match="which are decoded as a whole"):
        StreamingDecoder(image)
