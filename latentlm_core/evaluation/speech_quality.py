"""How much of a recording a tokenizer keeps: mel distance, PESQ and STOI, against the original.

    mel_distance    multi-scale log-mel L1, the tokenizer's own loss (``tokenizers/mel.py``)
    pesq_wb         ITU-T P.862.2 at 16 kHz, 1.04 to 4.64
    pesq_nb         ITU-T P.862.1 at 8 kHz, 1.02 to 4.55
    stoi            short-time objective intelligibility, not extended, up to 1

Notable choices:
- Both sides are resampled to the rate that a measure is defined at; wide-band PESQ of audio below
  16 kHz is measured all the same, and warned of.
- PESQ is made for sentences, and its C code writes past its tables where there are more than
  fifty: longer recordings are scored in equal pieces of 20 s at most, and count their mean.
- What is too short for a measure, or silent on either side, has None there and is counted.

Axes: S samples.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.data.audio import resample
from latentlm_core.data.base import Samples
from latentlm_core.errors import DataError, MissingExtraError
from latentlm_core.evaluation.speech import speech_versions
from latentlm_core.evaluation.spoken_items import AudioHash, audio_digest, is_silent
from latentlm_core.processes import current
from latentlm_core.progress import SILENT, Progress
from latentlm_core.tokenizers.mel import MelDistance

QualityMetric = Literal["mel_distance", "pesq_wb", "pesq_nb", "stoi"]
QUALITY_METRICS: tuple[QualityMetric, ...] = ("mel_distance", "pesq_wb", "pesq_nb", "stoi")
PESQ_SECONDS = 20.0
"""Longest piece that is scored at once."""
STOI_SECONDS = 0.4
"""STOI is defined from 30 frames at 10 kHz on, 384 ms."""

Measure = Callable[[Samples, Samples], float | None]
"""Original and reconstruction (S,) => score; None where there is none."""


@dataclass(frozen=True, slots=True)
class AudioPair:
    """A recording and what a tokenizer made of it.

    Attributes:
        file: name of the recording.
        original: (S,).
        rebuilt: (S,), at the same rate.
    """

    file: str
    original: Samples
    rebuilt: Samples


class QualityRow(Config):
    """The scores of one recording; None where it is too short or silent."""

    file: str
    """Its name."""
    mel_distance: float | None = None
    pesq_wb: float | None = None
    pesq_nb: float | None = None
    stoi: float | None = None


class QualityReport(Config):
    """What a tokenizer keeps of a set of recordings."""

    values: dict[str, float]
    """Mean of each measure over the recordings that have it."""
    num_recordings: int
    """How many there were."""
    num_unscored: dict[str, int]
    """How many were too short or silent for each measure."""
    sample_rate: int
    """Of the recordings, in Hz."""
    originals_sha256: str
    """Of the originals' audio, in order."""
    rebuilt_sha256: str
    """Of the reconstructions'."""
    versions: dict[str, str]
    """Of everything that was involved."""
    warnings: tuple[str, ...]
    """What speaks against comparing the numbers with others."""
    rows: tuple[QualityRow, ...] = Field(exclude=True)
    """One a recording, for ``write_scores``; no part of ``to_dict``."""


def installed_metrics() -> tuple[QualityMetric, ...]:
    """The measures whose packages are installed."""
    needs = {"pesq_wb": "pesq", "pesq_nb": "pesq", "stoi": "pystoi"}
    return tuple(
        name
        for name in QUALITY_METRICS
        if name not in needs or importlib.util.find_spec(needs[name]) is not None
    )


def reconstruction_quality(
    pairs: Iterable[AudioPair],
    num_pairs: int,
    sample_rate: int,
    metrics: Sequence[QualityMetric] = QUALITY_METRICS,
    *,
    progress: Progress = SILENT,
) -> QualityReport:
    """Compare reconstructions with their originals, one pair after the other.

    Args:
        pairs: recordings, this process's own ones (``processes.current().own``) of several; each is
            let go of after it was compared.
        num_pairs: how many there are in all.
        sample_rate: of both sides, in Hz.
        metrics: which measures.
        progress: hears of the pass and of the warnings.

    Raises:
        DataError: no pairs, or two sides of different length.
        MissingExtraError: the package of a measure is not installed.
    """
    measures = {name: _load(name, sample_rate) for name in metrics}

    def compare(pair: AudioPair) -> tuple[bytes, bytes, QualityRow]:
        if len(pair.original) != len(pair.rebuilt):
            raise DataError(
                f"{pair.file} has {len(pair.original)} samples, its reconstruction "
                f"{len(pair.rebuilt)}; they must be equally long."
            )
        original, other = (
            audio_digest(side, sample_rate) for side in (pair.original, pair.rebuilt)
        )
        scores = {name: run(pair.original, pair.rebuilt) for name, run in measures.items()}
        return original, other, QualityRow.model_validate({"file": pair.file} | scores)

    originals, rebuilt = AudioHash(), AudioHash()
    rows = []
    with progress.bar("comparing recordings", num_pairs, "files") as bar:
        for original, other, row in current().merged(map(compare, pairs)):
            originals.add(original)
            rebuilt.add(other)
            rows.append(row)
            bar.advance()
    if not rows:
        raise DataError("There are no recordings to compare.")
    values: dict[str, float] = {}
    num_unscored: dict[str, int] = {}
    for name in metrics:
        found = [score for row in rows if (score := getattr(row, name)) is not None]
        num_unscored[name] = len(rows) - len(found)
        if found:
            values[name] = sum(found) / len(found)
    found_warnings = _warnings(sample_rate, num_unscored)
    for warning in found_warnings:
        progress.warn(warning)
    return QualityReport(
        values=values,
        num_recordings=len(rows),
        num_unscored=num_unscored,
        sample_rate=sample_rate,
        originals_sha256=originals.hexdigest(),
        rebuilt_sha256=rebuilt.hexdigest(),
        versions=speech_versions(),
        warnings=found_warnings,
        rows=tuple(rows),
    )


def _load(name: QualityMetric, sample_rate: int) -> Measure:
    match name:
        case "mel_distance":
            return _load_mel(sample_rate)
        case "pesq_wb":
            return _load_pesq(sample_rate, 16_000, "wb")
        case "pesq_nb":
            return _load_pesq(sample_rate, 8_000, "nb")
        case "stoi":
            return _load_stoi(sample_rate)


def _load_mel(sample_rate: int) -> Measure:
    distance = MelDistance(sample_rate)

    @torch.inference_mode()
    def measure(original: Samples, rebuilt: Samples) -> float | None:
        x, y = (torch.from_numpy(side.copy()).view(1, 1, -1) for side in (original, rebuilt))
        try:
            return float(distance(x, y))
        except DataError:  # shorter than half of its longest window
            return None

    return measure


def _load_pesq(sample_rate: int, to_rate: int, mode: str) -> Measure:
    try:
        import pesq
    except ImportError:
        raise MissingExtraError("pesq", "PESQ", "speech") from None

    def measure(original: Samples, rebuilt: Samples) -> float | None:
        x, y = (resample(side, sample_rate, to_rate) for side in (original, rebuilt))
        num_pieces = max(1, -(-len(x) // round(PESQ_SECONDS * to_rate)))
        pieces = zip(np.array_split(x, num_pieces), np.array_split(y, num_pieces), strict=True)
        scores = []
        for piece, other in pieces:
            if is_silent(piece) or is_silent(other):
                continue
            try:
                scores.append(float(pesq.pesq(to_rate, piece, other, mode)))
            except pesq.PesqError:  # under a quarter of a second, or no speech in it
                continue
        return sum(scores) / len(scores) if scores else None

    return measure


def _load_stoi(sample_rate: int) -> Measure:
    try:
        from pystoi import stoi
    except ImportError:
        raise MissingExtraError("pystoi", "STOI", "speech") from None

    def measure(original: Samples, rebuilt: Samples) -> float | None:
        if len(original) < STOI_SECONDS * sample_rate or is_silent(original):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(stoi(original, rebuilt, sample_rate, extended=False))
            except RuntimeWarning:  # less than 384 ms of it is not silent
                return None

    return measure


def _warnings(sample_rate: int, num_unscored: dict[str, int]) -> tuple[str, ...]:
    found = [
        f"{count} recordings have no {name}: they are too short, or silent on either side."
        for name, count in num_unscored.items()
        if count
    ]
    if "pesq_wb" in num_unscored and sample_rate < 16_000:
        found.append(
            f"pesq_wb is made for audio of 16 kHz, and these recordings have {sample_rate} Hz: "
            "compare it with nothing else."
        )
    return tuple(found)
