"""The distance between two recordings as the ear weighs it: multi-scale log-mel L1.

    d(x, y) = sum over scales of mean |log10 max(M_x, 1e-5) - log10 max(M_y, 1e-5)|

with M the mel spectrogram of magnitudes, as the Descript Audio Codec trains with it (Kumar et al.
2023: windows of 32 to 2048 samples, hop = window / 4, 5 to 320 bands, Hann, reflected edges).

Notable choices:
    Slaney's mel scale (linear below 1 kHz) with triangles of unit area, the default of librosa;
    scales follow the sample rate: a long window is at most 100 ms, so 8 kHz ends at 512 samples;
    a band that holds no bin of the STFT would compare nothing and dilute the mean, so the default
    has fewer bands there (48 kHz, window 32) and a configuration that asks for one is refused;
    always float32, even under autocast.

Axes: B examples, S samples, F bins of an STFT, M mel bands.
"""

import math
from typing import Annotated, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.errors import ConfigError, DataError

WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
LONGEST_SECONDS = 0.1
BANDS_PER_SAMPLE = 5 / 32
FLOOR = 1e-5
"""Magnitudes below this are silence: nothing there is compared."""

_LINEAR_HZ = 200 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27


class MelConfig(Config):
    """Scales of the mel distance."""

    windows: tuple[Annotated[int, Field(ge=16, multiple_of=4)], ...] = ()
    """Lengths of the windows in samples; none: 32, 64, ... up to 2048 and to 100 ms."""
    num_mels: tuple[PositiveInt, ...] = ()
    """Mel bands of each window; none: 5 for each 32 samples, fewer where one would be empty."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.num_mels and len(self.num_mels) != len(self.windows):
            raise ValueError(
                f"num_mels has {len(self.num_mels)} entries for {len(self.windows)} windows"
            )
        return self

    def scales(self, sample_rate: int) -> tuple[tuple[int, int], ...]:
        """(window, mel bands) of each scale at ``sample_rate``, in Hz."""
        longest = LONGEST_SECONDS * sample_rate
        windows = self.windows or tuple(w for w in WINDOWS if w <= max(longest, WINDOWS[0]))
        counts = self.num_mels or tuple(_most_mels(sample_rate, window) for window in windows)
        return tuple(zip(windows, counts, strict=True))


class MelDistance(nn.Module):
    """Multi-scale log-mel L1; it has no weights and no state.

    Args:
        sample_rate: of both recordings, in Hz.
        config: the scales.

    Raises:
        ConfigError: a mel band of a scale holds no bin of its STFT.
    """

    def __init__(self, sample_rate: int, config: MelConfig | None = None) -> None:
        super().__init__()
        self.scales = (config or MelConfig()).scales(sample_rate)
        for window, num_mels in self.scales:
            bank = mel_filterbank(sample_rate, window, num_mels)
            self.register_buffer(f"bank_{window}", bank, persistent=False)
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) between recordings (B, 1, S), differentiable in both.

        Raises:
            DataError: the recordings do not cover half of the longest window.
        """
        half = max(window for window, _ in self.scales) // 2
        if x.shape[-1] <= half:
            raise DataError(
                f"The mel distance needs more than {half} samples, half of its longest window, "
                f"not {x.shape[-1]}."
            )
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self._log_mels(x), self._log_mels(y), strict=True)
            return torch.stack([(a - b).abs().mean(dim=(1, 2)) for a, b in pairs]).sum(0)

    def _log_mels(self, media: Tensor) -> list[Tensor]:
        """Log-mel spectrograms (B, M, frames), one a scale."""
        samples = media.float().flatten(1)
        return [self._mels(samples, window).clamp_min(FLOOR).log10() for window, _ in self.scales]

    def _mels(self, samples: Tensor, window: int) -> Tensor:
        spectrum = torch.stft(
            samples,
            window,
            window // 4,
            window=self.get_buffer(f"window_{window}"),
            return_complex=True,
        )
        return self.get_buffer(f"bank_{window}") @ spectrum.abs()


def mel_filterbank(
    sample_rate: int, n_fft: int, num_mels: int, f_min: float = 0.0, f_max: float | None = None
) -> Tensor:
    """Triangular filters of unit area (in Hz) on Slaney's mel scale.

    Args:
        sample_rate: in Hz.
        n_fft: samples of the STFT's window.
        num_mels: M.
        f_min: lower edge of the first band, in Hz.
        f_max: upper edge of the last band, in Hz; by default half of ``sample_rate``.

    Returns:
        (M, F) float32, F = n_fft // 2 + 1.

    Raises:
        ConfigError: a band holds no bin of the STFT.
    """
    bank = _triangles(sample_rate, n_fft, num_mels, f_min, f_max or sample_rate / 2)
    if empty := int((bank.amax(1) == 0).sum()):
        raise ConfigError(
            f"{empty} of {num_mels} mel bands hold no bin of an STFT of {n_fft} samples at "
            f"{sample_rate} Hz; ask for fewer bands or a longer window."
        )
    return bank.float()


def _triangles(sample_rate: int, n_fft: int, num_mels: int, f_min: float, f_max: float) -> Tensor:
    low, high = _mel(f_min), _mel(f_max)
    step = (high - low) / (num_mels + 1)
    points = [_hertz(low + i * step) for i in range(num_mels + 2)]
    edges = torch.tensor(points, dtype=torch.float64)[:, None]
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    slopes = torch.minimum((bins - left) / (peak - left), (right - bins) / (right - peak))
    return slopes.clamp_min(0) * 2 / (right - left)


def _most_mels(sample_rate: int, window: int) -> int:
    """Five bands for each 32 samples of the window, or as many as hold a bin each."""
    wanted = max(1, int(window * BANDS_PER_SAMPLE))
    return next(
        count
        for count in range(wanted, 0, -1)
        if (_triangles(sample_rate, window, count, 0.0, sample_rate / 2).amax(1) > 0).all()
    )


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + math.log(hertz / _BREAK_HZ) / _LOG_STEP


def _hertz(mel: float) -> float:
    break_mel = _BREAK_HZ / _LINEAR_HZ
    if mel < break_mel:
        return mel * _LINEAR_HZ
    return _BREAK_HZ * math.exp((mel - break_mel) * _LOG_STEP)
