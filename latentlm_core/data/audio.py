"""Audio between files, bytes, arrays and networks.

Notable choices:
    audio is one channel: the mean of those that the file has;
    lengths and rates are checked in the header, before a sample is decoded;
    every network gets audio at one loudness, -25 dBFS, unless its peak would exceed 1;
    16 bits are value * 32768, rounded and clamped, so a file is read as it was written;
    a file that is written while its audio is generated can be played at any moment.

Axes: S samples.
"""

import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from latentlm_core import files
from latentlm_core.config import Config
from latentlm_core.data.base import Clip, Samples, whole_file
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError

if TYPE_CHECKING:
    import soundfile

FORMATS = ("WAV", "WAVEX", "W64", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")
SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    *(".aif", ".aiff", ".au", ".caf", ".w64"),
)
"""File names that are taken for audio."""
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 384_000
MAX_VALUES = 100_000_000
"""Longer recordings (samples * channels) are refused: decoded, this is 400 MB."""
BLOCK_VALUES = 1_000_000
"""Samples * channels that are decoded at once."""
LOUDNESS_DBFS = -25.0
"""Root mean square of what a network gets, relative to full scale."""

Pcm = npt.NDArray[np.int16]
"""Audio (S,) of 16 bits."""


class ClipLimits(Config):
    """What a recording must be like to be learnt from."""

    min_seconds: float = Field(default=0.1, ge=0)
    """Shorter ones are left out."""
    max_seconds: float = Field(default=30.0, gt=0)
    """Longer ones are left out."""
    needs_text: bool = False
    """Leave out what has no transcript."""
    silence_dbfs: float = Field(default=-60.0, le=0)
    """Those whose root mean square lies below this are silent, and left out."""
    max_clipped_share: float = Field(default=0.01, ge=0, le=1)
    """Those of which a larger share of the samples is at full scale are left out."""


USUAL_LIMITS = ClipLimits()
MAX_SKIPPED_SHARE = 0.1
"""Part of a source that may be broken or unfit: sets of real speech have some of either."""


def read_audio(content: Path | bytes, where: str) -> tuple[Samples, int]:
    """Decode a recording as (float32 (S,) in [-1, 1], sample rate in Hz).

    Args:
        content: a file, or its bytes.
        where: name of the recording for messages, its key as a rule.

    Raises:
        DataError: it is too long, or has a rate or a format that is not read.
        CorruptFileError: it is missing, empty or broken.
    """
    import soundfile

    encoded = whole_file(content, where)
    try:
        with soundfile.SoundFile(_Bytes(encoded)) as file:
            _check_header(file.format, file.samplerate, file.frames * file.channels, where)
            blocks = list(_blocks(file))
            sample_rate = int(file.samplerate)
    except DataError:
        raise
    except Exception as error:  # hostile bytes raise anything inside a decoder
        raise CorruptFileError(f"{where} is no audio, or broken ({_short(error)}).") from None
    if not blocks:
        raise CorruptFileError(f"{where} holds no samples.")
    samples = np.concatenate(blocks)
    if not np.isfinite(samples).all():
        raise CorruptFileError(f"{where} holds samples that are not finite numbers.")
    return np.clip(samples, -1.0, 1.0, out=samples), sample_rate


def resample(samples: Samples, sample_rate: int, to_rate: int) -> Samples:
    """Change the rate with soxr's high quality: (S,) => (about S * to_rate / sample_rate,)."""
    import soxr

    if sample_rate == to_rate:
        return samples
    return cast(Samples, soxr.resample(samples, sample_rate, to_rate, quality="HQ"))


def normalise_loudness(samples: Samples, dbfs: float = LOUDNESS_DBFS) -> Samples:
    """Scale to a root mean square of ``dbfs``, then down where the peak would exceed 1."""
    scale = 10 ** (dbfs / 20) / max(root_mean_square(samples), 1e-6)
    scale = min(scale, 1.0 / max(float(np.abs(samples).max(initial=0.0)), 1e-6))
    return samples * np.float32(scale)


def root_mean_square(samples: Samples) -> float:
    """Of full scale; 0 where there are no samples."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def trim_silence(
    samples: Samples, sample_rate: int, below_db: float = 35.0, margin_seconds: float = 0.01
) -> Samples:
    """Cut off what lies before the first and after the last 10 ms that can be heard.

    Args:
        samples: (S,).
        sample_rate: in Hz.
        below_db: frames that are this much quieter than the loudest one are not heard.
        margin_seconds: left on either side where there is as much.
    """
    size = max(sample_rate // 100, 1)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    heard = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (-below_db / 10))
    if not len(heard):
        return samples
    margin = round(margin_seconds * sample_rate)
    return samples[max(heard[0] * size - margin, 0) : (heard[-1] + 1) * size + margin]


def prepare(clip: Clip, sample_rate: int) -> Samples:
    """What a network gets of a recording: (S,) at ``sample_rate`` and of the usual loudness."""
    return normalise_loudness(resample(clip.samples, clip.sample_rate, sample_rate))


def check_clip(clip: Clip, limits: ClipLimits) -> None:
    """Refuse a recording that is not fit to be learnt from.

    Raises:
        DataError: says why; begins with the clip's key.
    """
    seconds = len(clip.samples) / clip.sample_rate
    if seconds < limits.min_seconds:
        raise DataError(
            f"{clip.key} is too short: {seconds:.2f} s of at least {limits.min_seconds} s."
        )
    if seconds > limits.max_seconds:
        raise DataError(
            f"{clip.key} is too long: {seconds:.1f} s of at most {limits.max_seconds} s."
        )
    if limits.needs_text and not (clip.text or "").strip():
        raise DataError(f"{clip.key} has no text.")
    if root_mean_square(clip.samples) < 10 ** (limits.silence_dbfs / 20):
        raise DataError(f"{clip.key} is silent: it lies below {limits.silence_dbfs} dBFS.")
    clipped = float(np.mean(np.abs(clip.samples) >= _FULL_SCALE))
    if clipped > limits.max_clipped_share:
        raise DataError(
            f"{clip.key} is clipped: {clipped:.1%} of it is at full scale, "
            f"{limits.max_clipped_share:.1%} may be."
        )


def to_pcm(samples: Samples) -> Pcm:
    """Samples (S,) in [-1, 1] => 16 bits: rounded, clamped."""
    pcm: Pcm = np.rint(samples * np.float32(32768.0)).clip(-32768.0, 32767.0).astype(np.int16)
    return pcm


def from_pcm(pcm: Pcm) -> Samples:
    """16 bits (S,) => samples in [-1, 1)."""
    return pcm.astype(np.float32) / np.float32(32768.0)


def write_wav(path: Path, samples: Samples, sample_rate: int) -> None:
    """Write audio (S,) atomically as 16-bit wav; equal audio gives equal bytes.

    Raises:
        ArtifactError: the file system refused.
    """
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        _describe(file, sample_rate)
        file.writeframes(to_pcm(samples).astype("<i2").tobytes())
    files.write_bytes(path, buffer.getvalue())


class WavStream:
    """A 16-bit wav file that grows, and is complete after each ``write``. A context manager.

    Args:
        path: the file; one that is there is replaced.
        sample_rate: in Hz.

    Raises:
        ArtifactError: the file system refused, here or in ``write``.
    """

    def __init__(self, path: Path, sample_rate: int) -> None:
        self.num_samples = 0
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            raise self._refused(error) from error
        self._wave = wave.open(self._file, "wb")  # noqa: SIM115 - closed by __exit__
        _describe(self._wave, sample_rate)
        self.write(np.zeros(0, np.float32))

    def write(self, samples: Samples) -> None:
        """Append (S,); from here on the file on disk has them, and a header that says so."""
        try:
            self._wave.writeframes(to_pcm(samples).astype("<i2").tobytes())
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error
        self.num_samples += len(samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wave.close()
        self._file.close()

    def _refused(self, error: OSError) -> ArtifactError:
        return ArtifactError(f"{self._path} cannot be written: {error.strerror or error}.")


_FULL_SCALE = 0.999


class _Bytes(io.BytesIO):
    """Bytes whose reader may be sent before their beginning, as broken headers do it."""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Stay where it is, which the decoder notices: an error would be printed, not raised."""
        return self.tell() if whence == 0 and offset < 0 else super().seek(offset, whence)


def _blocks(file: "soundfile.SoundFile") -> Iterator[Samples]:
    """The mean of the channels (S,), a part at a time, so that no header decides on memory."""
    frames = max(BLOCK_VALUES // file.channels, 1)
    while len(block := file.read(frames, dtype="float32", always_2d=True)):
        yield block.mean(axis=1)


def _describe(file: wave.Wave_write, sample_rate: int) -> None:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(sample_rate)


def _check_header(kind: str, sample_rate: int, values: int, where: str) -> None:
    if kind not in FORMATS:
        raise DataError(f"{where} is {kind}; read are: {', '.join(FORMATS)}.")
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise DataError(
            f"{where} has a sample rate of {sample_rate} Hz; "
            f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} are read."
        )
    if values > MAX_VALUES:
        raise DataError(f"{where} has {values} samples; {MAX_VALUES} are allowed.")


def _short(error: Exception) -> str:
    lines = str(getattr(error, "error_string", error)).strip().splitlines()
    return lines[0][:120].rstrip(".") if lines else type(error).__name__
