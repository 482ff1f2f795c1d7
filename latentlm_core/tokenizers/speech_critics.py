"""The discriminators that sharpen a speech tokenizer, and their losses.

Two kinds judge a recording together, as in the Descript Audio Codec (Kumar et al. 2023, which the
paper's tokenizer follows): multi-period critics see the samples folded at a period (HiFi-GAN, Kong
et al. 2020), multi-scale ones the complex spectrum at a window length, a band at a time.

Notable choices:
    weight norm, as published, and no norm of activations: a logit depends on its own row alone;
    recordings are not scaled to their peak first: that would blow up the noise of a pause, and
    loudness is settled where data is read;
    spectra are divided by the window's norm, so that white noise is as loud as its samples;
    each critic counts the same: its logits are averaged, and so is each layer of feature matching,
    then critics and layers are summed (published weights are made for that). Losses are sums over
    examples, so the count of each is B.

Axes: B examples, S samples, L logits, F bins of an STFT.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from latentlm_core.config import Config
from latentlm_core.errors import ConfigError

PERIOD_KERNEL, PERIOD_STRIDES = 5, (3, 3, 3, 3, 1)
STFT_KERNEL, STFT_STRIDES = (3, 9), (1, 2, 2, 2)
SLOPE = 0.1
"""Of LeakyReLU below zero."""

CriticLoss = Literal["least_squares", "hinge"]


class SpeechCriticConfig(Config):
    """Size of the discriminators; the defaults are those published for 24 kHz."""

    periods: tuple[Annotated[int, Field(ge=1)], ...] = (2, 3, 5, 7, 11)
    """A multi-period critic folds the samples at each of these; none: no such critics."""
    period_channels: PositiveInt = 32
    """Width of their first layer; it grows fourfold with each layer."""
    max_channels: PositiveInt = 1024
    """Their largest width."""
    stft_windows: tuple[Annotated[int, Field(ge=16, multiple_of=4)], ...] = (2048, 1024, 512)
    """A spectral critic has a window of each of these, in samples; none: no such critics."""
    stft_channels: PositiveInt = 32
    """Width of all their layers."""
    band_edges: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    """Edges of their bands as shares of the bins; each band has layers of its own."""
    loss: CriticLoss = "least_squares"
    """`least_squares` (as published) or `hinge`."""

    @property
    def min_samples(self) -> int:
        """The shortest recording that fills a longest window and a longest period."""
        return max(*self.periods, *self.stft_windows, 1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.periods and not self.stft_windows:
            raise ValueError("periods and stft_windows are both empty: there is no critic")
        if len(self.band_edges) < 2 or (self.band_edges[0], self.band_edges[-1]) != (0.0, 1.0):
            raise ValueError(f"band_edges {self.band_edges} must lead from 0.0 to 1.0")
        for window in self.stft_windows:
            edges = _band_bins(self.band_edges, window)
            if any(high <= low for low, high in pairwise(edges)):
                raise ValueError(
                    f"band_edges {self.band_edges} leave a band without bins of a window of "
                    f"{window} samples"
                )
        return self


class Verdict(NamedTuple):
    """What one critic makes of recordings.

    Attributes:
        logits: (B, L), high where a recording sounds real.
        features: (B, ...) activations of each layer but the last.
    """

    logits: Tensor
    features: list[Tensor]


class SpeechCritic(nn.Module):
    """Recordings (B, 1, S) in [-1, 1] => the verdict of each critic."""

    def __init__(self, config: SpeechCriticConfig) -> None:
        super().__init__()
        self.config = config
        critics: list[nn.Module] = [PeriodCritic(config, period) for period in config.periods]
        critics.extend(SpectrumCritic(config, window) for window in config.stft_windows)
        self.critics = nn.ModuleList(critics)

    def check(self, media_shape: Sequence[int]) -> None:
        """See that recordings (..., S) are long enough.

        Raises:
            ConfigError: they are not.
        """
        if media_shape[-1] < (shortest := self.config.min_samples):
            raise ConfigError(
                f"The discriminators need at least {shortest} samples, their longest window, not "
                f"{media_shape[-1]}; train on longer segments or set smaller stft_windows."
            )

    def forward(self, media: Tensor) -> list[Verdict]:
        """Verdicts, those of the periods first.

        Raises:
            ConfigError: the recordings are too short.
        """
        self.check(media.shape)
        return [critic(media) for critic in self.critics]


class PeriodCritic(nn.Module):
    """Every period-th sample is a row of its own, all rows are judged by the same layers."""

    def __init__(self, config: SpeechCriticConfig, period: int) -> None:
        super().__init__()
        self.period = period
        widths = [
            min(config.period_channels * 4**i, config.max_channels)
            for i in range(len(PERIOD_STRIDES))
        ]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(narrow, wide, PERIOD_KERNEL, stride, PERIOD_KERNEL // 2))
            for (narrow, wide), stride in zip(pairwise([1, *widths]), PERIOD_STRIDES, strict=True)
        )
        self.head = weight_norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, media: Tensor) -> Verdict:
        """Logits and features of recordings (B, 1, S)."""
        batch = len(media)
        padded = F.pad(media, (0, -media.shape[-1] % self.period), "reflect")
        rows = padded.reshape(batch, -1, self.period).mT.reshape(batch * self.period, 1, -1)
        features = []
        for layer in self.layers:
            rows = F.leaky_relu(layer(rows), SLOPE)
            features.append(rows.reshape(batch, self.period, *rows.shape[1:]))
        return Verdict(self.head(rows).reshape(batch, -1), features)


class SpectrumCritic(nn.Module):
    """Convolutions over time and frequency on real and imaginary parts, apart for each band."""

    window: Tensor

    def __init__(self, config: SpeechCriticConfig, window: int) -> None:
        super().__init__()
        self.bands = tuple(pairwise(_band_bins(config.band_edges, window)))
        hann = torch.hann_window(window)
        self.register_buffer("window", hann, persistent=False)
        self.scale = 1.0 / float(hann.norm())
        width = config.stft_channels
        self.layers = nn.ModuleList(_spectrum_layers(width) for _ in self.bands)
        self.head = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, media: Tensor) -> Verdict:
        """Logits and features of recordings (B, 1, S)."""
        spectrum = self._spectrum(media)
        features, judged = [], []
        for (low, high), layers in zip(self.bands, self.layers, strict=True):
            maps = spectrum[..., low:high]
            for layer in layers:  # type: ignore[attr-defined]
                maps = F.leaky_relu(layer(maps), SLOPE)
                features.append(maps)
            judged.append(maps)
        return Verdict(self.head(torch.cat(judged, dim=-1)).flatten(1), features)

    def _spectrum(self, media: Tensor) -> Tensor:
        """(B, 2, frames, F) float32: real and imaginary parts."""
        length = len(self.window)
        with torch.autocast(media.device.type, enabled=False):
            spectrum = torch.stft(
                media.float().flatten(1),
                length,
                length // 4,
                window=self.window * self.scale,
                return_complex=True,
            )
            return torch.view_as_real(spectrum).permute(0, 3, 2, 1)


def critic_loss(kind: CriticLoss, real: Sequence[Verdict], fake: Sequence[Verdict]) -> Tensor:
    """What the critics minimise, a sum over examples of the sum over critics; a scalar.

    least_squares: mean (1 - real)^2 + mean fake^2;
    hinge: mean max(0, 1 - real) + mean max(0, 1 + fake).
    """
    if kind == "hinge":
        return _total(real, lambda x: F.relu(1.0 - x)) + _total(fake, lambda x: F.relu(1.0 + x))
    return _total(real, lambda x: (1.0 - x).square()) + _total(fake, torch.square)


def generator_loss(kind: CriticLoss, fake: Sequence[Verdict]) -> Tensor:
    """What a decoder minimises, a sum over examples of the sum over critics; a scalar.

    least_squares: mean (1 - fake)^2; hinge: mean -fake.
    """
    if kind == "hinge":
        return _total(fake, torch.neg)
    return _total(fake, lambda x: (1.0 - x).square())


def feature_distance(real: Sequence[Verdict], fake: Sequence[Verdict]) -> Tensor:
    """Mean |real - fake| of each layer, summed over layers, critics and examples; a scalar."""
    layers = [
        (r.detach().float() - f.float()).abs().flatten(1).mean(1).sum()
        for one, other in zip(real, fake, strict=True)
        for r, f in zip(one.features, other.features, strict=True)
    ]
    return torch.stack(layers).sum()


def mean_logit(verdicts: Sequence[Verdict]) -> Tensor:
    """Mean logit over critics, a sum over examples; a scalar, detached."""
    return _total(verdicts, torch.detach) / len(verdicts)


def _total(verdicts: Sequence[Verdict], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """``loss`` averaged over the logits of each critic, summed over critics and examples."""
    return torch.stack([loss(v.logits.float()).mean(1).sum() for v in verdicts]).sum()


def _band_bins(band_edges: Sequence[float], window: int) -> list[int]:
    """Edges of the bands as bins of an STFT."""
    return [int(edge * (window // 2 + 1)) for edge in band_edges]


def _spectrum_layers(width: int) -> nn.ModuleList:
    """Layers of one band: (B, 2, frames, F) => (B, width, frames, about F / 8)."""
    padding = (STFT_KERNEL[0] // 2, STFT_KERNEL[1] // 2)
    layers = [
        nn.Conv2d(narrow, width, STFT_KERNEL, (1, stride), padding)
        for narrow, stride in zip((2, width, width, width), STFT_STRIDES, strict=True)
    ]
    return nn.ModuleList(map(weight_norm, [*layers, nn.Conv2d(width, width, 3, padding=1)]))
