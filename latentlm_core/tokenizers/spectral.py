"""Speech networks on short-time spectra: quick to train on little data and on a CPU.

The encoder reads log magnitudes of a causal short-time Fourier transform, the decoder writes
magnitudes and phases of one and overlap-adds their inverse (Vocos, Siuzdak 2023); between them are
the blocks of the published networks, at the rate of the frames and at that of the latents. All the
work happens a hundred times a second instead of thousands.

Notable choices:
    frame j covers samples [(j + 1) hop - length, (j + 1) hop): the encoder is causal;
    so is the decoder, but for a delay of length - hop samples in a stream, by which a sample waits
    for the last frame that adds to it; the end of the audio fades out over as many samples;
    phase is not encoded, it is found by the decoder: losses must not compare waveforms.

Axes: B clips, S audio samples, N frames, T latent positions, C latent channels, n bins.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentlm_core.config import Config, Width
from latentlm_core.nn.layers import RMSNorm
from latentlm_core.tokenizers.base import Grid
from latentlm_core.tokenizers.causal import (
    CausalBlock,
    CausalConv,
    CausalConvTranspose,
    CausalStack,
    StreamState,
    sliding_input,
)
from latentlm_core.tokenizers.speech import END_KERNEL, frames_of

FLOOR = 1e-3
"""Added to magnitudes before their logarithm: -60 dB of a frame that peaks at 1."""
MAX_LOG_MAGNITUDE = 6.0
"""Largest log magnitude that is written, so that a step gone wrong cannot overflow."""


class SpectralConfig(Config):
    """A pair of spectral networks; the defaults make 12.5 latents a second of 8 kHz speech."""

    modality: ClassVar[Literal["speech"]] = "speech"
    kind: Literal["spectral"] = "spectral"
    """Networks on short-time spectra."""
    sample_rate: Width = 8_000
    """Of the audio, in Hz."""
    frame_length: Annotated[int, Field(ge=1, le=2**16)] = 320
    """Samples of a frame, a multiple of frame_hop."""
    frame_hop: Annotated[int, Field(ge=1, le=2**16)] = 80
    """Samples between frames."""
    frames_per_latent: Annotated[int, Field(ge=1, le=2**16)] = 8
    """Frames behind one latent position."""
    width: Width = 256
    """Channels of all blocks."""
    frame_blocks: Annotated[int, Field(ge=0, le=1000)] = 4
    """Blocks at the rate of the frames, on each side."""
    latent_blocks: Annotated[int, Field(ge=0, le=1000)] = 2
    """Blocks at the rate of the latents, on each side."""
    layer_scale: float = 0.1
    """Where the residuals' factors start."""
    norm_eps: float = 1e-5
    """Added to the mean square in each norm."""

    @property
    def hop_length(self) -> int:
        """Audio samples behind one latent position."""
        return self.frame_hop * self.frames_per_latent

    @property
    def num_bins(self) -> int:
        """n: frequencies of a frame's spectrum."""
        return self.frame_length // 2 + 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.frame_length % self.frame_hop or self.frame_length == self.frame_hop:
            raise ValueError(
                f"frame_length {self.frame_length} must be a multiple of frame_hop "
                f"{self.frame_hop}, at least twice as long"
            )
        return self

    def grid(self, media_shape: Sequence[int]) -> Grid:
        """(T,) of audio (..., S)."""
        return frames_of(media_shape, self.hop_length)


class SpectralEncoder(nn.Module):
    """Audio (B, 1, S) => (B, T, outputs)."""

    def __init__(self, config: SpectralConfig, outputs: int) -> None:
        super().__init__()
        self.spectrum = _LogSpectrum(config)
        self.stem = nn.Linear(config.num_bins, config.width)
        self.frames = _blocks(config, config.frame_blocks)
        ratio = config.frames_per_latent
        self.downsample = CausalConv(config.width, config.width, 2 * ratio, ratio)
        self.latents = _blocks(config, config.latent_blocks)
        self.norm = RMSNorm(config.width, config.norm_eps, affine=True)
        self.head = nn.Linear(config.width, outputs)

    def forward(self, audio: Tensor, state: StreamState | None = None) -> Tensor:
        """Posterior parameters of each latent position that the audio completes."""
        x = self.frames(self.stem(self.spectrum(audio.transpose(1, 2), state)), state)
        x = self.latents(self.downsample(x, state), state)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class SpectralDecoder(nn.Module):
    """Raw latents (B, T, C) => audio (B, 1, T * hop_length)."""

    def __init__(self, config: SpectralConfig, latent_channels: int) -> None:
        super().__init__()
        self.stem = CausalConv(latent_channels, config.width, END_KERNEL)
        self.latents = _blocks(config, config.latent_blocks)
        self.upsample = CausalConvTranspose(config.width, config.width, config.frames_per_latent)
        self.frames = _blocks(config, config.frame_blocks)
        self.norm = RMSNorm(config.width, config.norm_eps, affine=True)
        self.head = nn.Linear(config.width, 2 * config.num_bins)
        self.overlap_add = _OverlapAdd(config)

    @property
    def last_weight(self) -> Tensor:
        """The weight nearest to the samples."""
        return self.head.weight

    def forward(self, latents: Tensor, grid: Grid, state: StreamState | None = None) -> Tensor:
        """Samples in about [-1, 1]."""
        x = self.latents(self.stem(latents, state), state)
        x = self.frames(self.upsample(x, state), state)
        magnitude, phase = self.head(self.norm(x)).float().chunk(2, dim=-1)
        spectrum = torch.polar(magnitude.clamp(max=MAX_LOG_MAGNITUDE).exp(), phase)
        return self.overlap_add(spectrum, state)  # type: ignore[no-any-return]


class _LogSpectrum(nn.Module):
    """Samples (B, S, 1) => log magnitudes (B, N, n), of about zero mean and unit scale."""

    window: Tensor

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.length, self.hop = config.frame_length, config.frame_hop
        self.register_buffer("window", torch.hann_window(self.length), persistent=False)

    def forward(self, samples: Tensor, state: StreamState | None) -> Tensor:
        """Spectra of the frames that the samples complete."""
        x, num_frames = sliding_input(self, samples.float(), self.length, self.hop, state)
        if not num_frames:
            return x.new_empty(x.shape[0], 0, self.length // 2 + 1)
        frames = x.squeeze(-1).unfold(1, self.length, self.hop) * self.window
        magnitude: Tensor = torch.fft.rfft(frames).abs()
        return (magnitude + FLOOR).log() / math.log(1 / FLOOR) * 2.0 + 1.0


class _OverlapAdd(nn.Module):
    """Spectra (B, N, n) => samples (B, 1, N * hop)."""

    window: Tensor

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.length, self.hop = config.frame_length, config.frame_hop
        self.overlap = self.length // self.hop
        window = torch.hann_window(self.length) * (2.0 / self.overlap)  # the overlap sums to 1
        self.register_buffer("window", window, persistent=False)

    def forward(self, spectrum: Tensor, state: StreamState | None) -> Tensor:
        """Add frames up; in a stream, give the samples to which no later frame adds."""
        rows, num_frames = spectrum.shape[:2]
        num_waiting = self.overlap - 1
        blocks = torch.zeros(
            rows, num_frames + num_waiting, self.hop, device=spectrum.device, dtype=torch.float32
        )
        if num_frames:
            frames = torch.fft.irfft(spectrum, self.length) * self.window
            parts = frames.unflatten(-1, (self.overlap, self.hop))
            for place in range(self.overlap):
                blocks[:, place : place + num_frames] += parts[:, :, place]
        kept = None if state is None else state.kept(self)
        waiting, early = kept or (blocks.new_zeros(rows, num_waiting, self.hop), num_waiting)
        blocks[:, :num_waiting] += waiting
        ends = state is None or state.is_final
        done = blocks if ends else blocks[:, :num_frames]
        if state is not None:
            state.exchange(self, (blocks[:, num_frames:], max(early - num_frames, 0)))
        return done[:, early:].flatten(1).unsqueeze(1)  # the first blocks are before the audio


def _blocks(config: SpectralConfig, count: int) -> CausalStack:
    return CausalStack(
        *(CausalBlock(config.width, config.layer_scale, config.norm_eps) for _ in range(count))
    )
