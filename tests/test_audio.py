import contextlib
import io
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from latentlm_core.data import audio, base
from latentlm_core.data.audio import (
    ClipLimits,
    WavStream,
    check_clip,
    from_pcm,
    normalise_loudness,
    prepare,
    read_audio,
    resample,
    root_mean_square,
    to_pcm,
    trim_silence,
    write_wav,
)
from latentlm_core.data.base import Clip
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError

RATE = 8000


def tone(seconds=0.5, amplitude=0.3, rate=RATE, hertz=440.0):
    time = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def encoded(samples, kind="WAV", subtype=None, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def clip(samples, text="one", rate=RATE):
    return Clip(samples, rate, text, 0, "a/1.wav")


@pytest.mark.parametrize(("kind", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.05)])
def test_a_recording_is_read_from_bytes_and_from_a_file(tmp_path, kind, tolerance):
    content = encoded(tone(), kind)
    (tmp_path / "ü").write_bytes(content)
    for given_ in (content, tmp_path / "ü"):
        samples, rate = read_audio(given_, "it")
        assert (rate, samples.dtype, samples.shape) == (RATE, np.float32, (4000,))
        assert np.abs(samples - tone()).max() < tolerance


def test_channels_become_their_mean_and_values_stay_in_range():
    both = np.stack([tone(), np.zeros_like(tone())], axis=1)
    assert np.allclose(read_audio(encoded(both, subtype="FLOAT"), "it")[0], tone() / 2)
    loud = read_audio(encoded(tone(amplitude=3.0), subtype="FLOAT"), "it")[0]
    assert (loud.min(), loud.max()) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"RIFF and no more", "it is no audio, or broken"),
        (encoded(tone(), "FLAC")[:2000], "it is no audio, or broken"),
        (encoded(np.zeros(0, np.float32)), "it holds no samples"),
        (encoded(np.full(9, np.nan, np.float32), subtype="FLOAT"), "not finite numbers"),
    ],
)
def test_broken_audio_is_one_sentence(content, message):
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_audio(content, "it")
    assert str(caught.value).count(". ") == 0


def test_a_missing_file_and_a_folder_are_named_by_their_key(tmp_path):
    for path in (tmp_path / "nowhere.wav", tmp_path):
        with pytest.raises(CorruptFileError, match=r"^a/1\.wav is not there, or no file\.$"):
            read_audio(path, "a/1.wav")


def test_headers_are_believed_before_samples_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(audio, "MAX_VALUES", 3999)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DataError, match="4000 samples; 3999 are allowed"):
        read_audio(encoded(tone()), "it")
    with pytest.raises(DataError, match="sample rate of 11 Hz"):
        read_audio(encoded(tone(0.1), rate=11), "it")
    with pytest.raises(DataError, match="it is VOC; read are: WAV"):
        read_audio(encoded(tone(0.1), "VOC", "PCM_16"), "it")
    monkeypatch.setattr(base, "MAX_BYTES", 10)
    (tmp_path / "1.wav").write_bytes(encoded(tone()))
    with pytest.raises(DataError, match="larger than the 10 bytes"):
        read_audio(tmp_path / "1.wav", "it")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.sampled_from(["WAV", "FLAC", "AIFF"]))
def test_hostile_bytes_are_read_or_refused(noise, place, kind):
    content = bytearray(encoded(tone(0.05), kind))
    content[place : place + len(noise)] = noise
    with contextlib.suppress(DataError):
        samples, rate = read_audio(bytes(content), "it")
        assert rate > 0
        assert np.isfinite(samples).all()


def test_resampling_keeps_the_tone_and_its_length():
    up = resample(tone(), RATE, 24_000)
    assert abs(len(up) - 12_000) <= 1
    middle = slice(1000, 11_000)
    assert np.abs(up[middle] - tone(rate=24_000)[: len(up)][middle]).max() < 2e-3
    assert resample(tone(), RATE, RATE) is not None
    high = resample(tone(hertz=3500.0), RATE, 4000)
    assert root_mean_square(high) < 1e-3  # what the lower rate cannot hold is gone


def test_loudness_is_reached_unless_the_peak_forbids_it():
    for amplitude in (0.001, 0.9):
        level = 20 * np.log10(root_mean_square(normalise_loudness(tone(amplitude=amplitude))))
        assert level == pytest.approx(-25.0, abs=1e-3)
    spike = np.zeros(8000, np.float32)
    spike[100] = 0.5
    assert np.abs(normalise_loudness(spike)).max() == pytest.approx(1.0)
    assert not normalise_loudness(np.zeros(10, np.float32)).any()
    assert len(normalise_loudness(np.zeros(0, np.float32))) == 0


def test_prepared_clips_have_the_rate_and_the_loudness():
    prepared = prepare(clip(tone(amplitude=0.01)), 16_000)
    assert abs(len(prepared) - 8000) <= 1
    assert prepared.dtype == np.float32
    assert 20 * np.log10(root_mean_square(prepared)) == pytest.approx(-25.0, abs=0.01)


def test_silence_at_the_ends_is_trimmed_to_its_margin():
    quiet = np.zeros(1600, np.float32)
    padded = np.concatenate([quiet, tone(), quiet])
    assert len(trim_silence(padded, RATE, margin_seconds=0.0)) == 4000
    assert len(trim_silence(padded, RATE, margin_seconds=0.05)) == 4800
    assert len(trim_silence(tone(), RATE, margin_seconds=0.05)) == 4000
    assert len(trim_silence(quiet, RATE)) == 1600


@pytest.mark.parametrize(
    ("samples", "text", "message"),
    [
        (tone(0.05), "one", "is too short: 0.05 s of at least 0.1 s"),
        (tone(31.0), "one", "is too long: 31.0 s of at most 30.0 s"),
        (tone(), None, "has no text"),
        (tone(), "  ", "has no text"),
        (tone(amplitude=0.0005), "one", "is silent"),
        (np.clip(tone(amplitude=2.0), -1, 1), "one", "is clipped: 67.* full scale"),
    ],
)
def test_unfit_clips_are_refused_by_their_key(samples, text, message):
    limits = ClipLimits(needs_text=True)
    check_clip(clip(tone()), limits)
    with pytest.raises(DataError, match=r"^a/1\.wav " + message):
        check_clip(clip(samples, text), limits)


def test_texts_are_optional_and_limits_move():
    check_clip(clip(tone(), None), ClipLimits())
    check_clip(clip(tone(0.05)), ClipLimits(min_seconds=0.05))
    with pytest.raises(DataError, match="silent"):
        check_clip(clip(tone(amplitude=0.1)), ClipLimits(silence_dbfs=-20.0))


def test_sixteen_bits_round_and_clamp():
    values = np.array([-2.0, -1.0, 0.0, 1.4 / 32768, 1.0], np.float32)
    assert to_pcm(values).tolist() == [-32768, -32768, 0, 1, 32767]
    every = np.arange(-32768, 32768, dtype=np.int16)
    assert np.array_equal(to_pcm(from_pcm(every)), every)


def test_a_wav_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "1.wav"
    write_wav(path, tone(), RATE)
    samples, rate = read_audio(path, "it")
    assert rate == RATE
    assert np.array_equal(samples, from_pcm(to_pcm(tone())))
    first = path.read_bytes()
    write_wav(path, tone(), RATE)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_a_growing_wav_is_complete_after_each_write(tmp_path):
    path = tmp_path / "new" / "1.wav"
    with WavStream(path, RATE) as stream:
        for chunk in (0, 1000, 2000, 3000):
            if chunk:
                stream.write(tone()[chunk - 1000 : chunk])
            with wave.open(io.BytesIO(path.read_bytes())) as file:
                assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (
                    *(chunk, RATE, 1),
                )
            assert stream.num_samples == chunk
    assert np.array_equal(read_audio(path, "it")[0], from_pcm(to_pcm(tone()[:3000])))
    write_wav(tmp_path / "whole.wav", tone()[:3000], RATE)
    assert path.read_bytes() == (tmp_path / "whole.wav").read_bytes()


def test_an_interrupted_wav_plays(tmp_path):
    path = tmp_path / "1.wav"

    def speak():
        with WavStream(path, RATE) as stream:
            stream.write(tone()[:1000])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speak()
    assert len(read_audio(path, "it")[0]) == 1000


def test_a_wav_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        WavStream(tmp_path / "file" / "1.wav", RATE)
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_wav(tmp_path / "file" / "1.wav", tone(), RATE)
