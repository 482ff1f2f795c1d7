"""The mel distance: its filters, its scales, and what it is zero for."""

import pytest
import torch

from latentlm_core.errors import ConfigError, DataError
from latentlm_core.tokenizers.mel import FLOOR, MelConfig, MelDistance, mel_filterbank
from tests.tiny_speech_task import RATE, noises, sine

RATES = (8_000, 16_000, 22_050, 24_000, 44_100, 48_000)


@pytest.mark.parametrize(("hertz", "n_fft", "num_mels"), [(250, 512, 40), (1_000, 256, 20)])
def test_a_sine_peaks_in_the_band_around_it(hertz: int, n_fft: int, num_mels: int) -> None:
    bank = mel_filterbank(RATE, n_fft, num_mels)
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(sine(hertz)[0], n_fft, window=window, return_complex=True).abs()[0]
    loudest = int((bank @ spectrum).mean(1).argmax())
    band = torch.nonzero(bank[loudest])[:, 0] * RATE / n_fft
    assert band.min() <= hertz <= band.max()
    assert band.max() - band.min() < 300


def test_bands_have_unit_area_and_overlap_by_half() -> None:
    bank = mel_filterbank(24_000, 2_048, 80)
    torch.testing.assert_close(bank.sum(1) * 24_000 / 2_048, torch.ones(80), rtol=0.05, atol=0)
    assert ((bank > 0).sum(0) <= 2).all()
    below_1khz = torch.diff(bank.argmax(1)[:20]).float()  # linear there, equal steps
    assert below_1khz.max() - below_1khz.min() <= 1


def test_limits_of_the_bands_are_kept() -> None:
    hertz = torch.linspace(0, 8_000, 513)
    used = hertz[mel_filterbank(16_000, 1_024, 30, 300.0, 3_400.0).sum(0) > 0]
    assert 300 < used.min() < 350
    assert 3_300 < used.max() < 3_400


@pytest.mark.parametrize("rate", RATES)
def test_filters_are_those_of_librosa(rate: int) -> None:
    filters = pytest.importorskip("librosa.filters", reason="librosa is not installed")
    for window, num_mels in MelConfig().scales(rate):
        expected = torch.from_numpy(filters.mel(sr=rate, n_fft=window, n_mels=num_mels))
        torch.testing.assert_close(mel_filterbank(rate, window, num_mels), expected)


@pytest.mark.parametrize("rate", RATES)
def test_default_scales_fit_the_sample_rate(rate: int) -> None:
    scales = MelConfig().scales(rate)
    assert scales[0][0] == 32
    assert 0.046 < scales[-1][0] / rate <= 0.1 or scales[-1][0] == 2_048
    for window, num_mels in scales:  # one band more than this may be empty
        assert 0.85 * 5 / 32 * window - 1 < num_mels <= 5 / 32 * window
        assert (mel_filterbank(rate, window, num_mels).sum(1) > 0).all()


def test_the_published_scales_are_the_default_at_44100_hz() -> None:
    windows, num_mels = zip(*MelConfig().scales(44_100), strict=True)
    assert windows == (32, 64, 128, 256, 512, 1024, 2048)
    assert num_mels == (5, 10, 20, 40, 80, 160, 320)
    assert MelConfig().scales(48_000)[0] == (32, 4)  # the first of five bands would be empty


def test_empty_bands_are_refused() -> None:
    with pytest.raises(ConfigError, match="of 64 mel bands hold no bin of an STFT of 64 samples"):
        MelDistance(RATE, MelConfig(windows=(64,), num_mels=(64,)))
    with pytest.raises(ValueError, match="num_mels has 1 entries for 2 windows"):
        MelConfig(windows=(64, 128), num_mels=(10,))


def test_a_distance_is_zero_symmetric_and_of_its_own_row() -> None:
    distance = MelDistance(RATE)
    x, y = noises(3).media, noises(6).media[3:]
    assert torch.equal(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(x, y), distance(y, x))
    assert (distance(x, y) > 0.1).all()
    torch.testing.assert_close(distance(x, y)[1:2], distance(x[1:2], y[1:2]))


def test_a_gain_of_ten_is_one_a_scale_and_silence_is_the_floor() -> None:
    distance = MelDistance(RATE, MelConfig(windows=(64, 128)))
    x = noises(2).media
    torch.testing.assert_close(distance(x, 10 * x), torch.full((2,), 2.0), rtol=1e-3, atol=0)
    silence = torch.zeros_like(x)
    assert torch.equal(distance(silence, FLOOR * x), torch.zeros(2))  # both are below the floor


def test_the_gradient_is_finite_even_at_silence() -> None:
    silence = torch.zeros_like(noises().media).requires_grad_()
    MelDistance(RATE)(silence, noises().media).sum().backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


def test_the_distance_is_float32_under_autocast_and_has_no_state() -> None:
    distance = MelDistance(RATE)
    x, y = noises(3).media, noises(6).media[3:]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance(x, y), distance(x.double(), y))
    assert distance(x, y).dtype == torch.float32
    assert not distance.state_dict()


def test_recordings_shorter_than_half_a_window_are_refused() -> None:
    with pytest.raises(DataError, match=r"more than 256 samples.* not 256"):
        MelDistance(RATE)(torch.zeros(1, 1, 256), torch.zeros(1, 1, 256))
    assert MelDistance(RATE)(torch.zeros(1, 1, 257), torch.zeros(1, 1, 257)) == 0
