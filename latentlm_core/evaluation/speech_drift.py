"""What long speech loses on its way: WER and SIM by position.

Notable choices:
- Words are placed by their alignment with the text, not by the recogniser's clock, so that the
  numbers mean the same for every recogniser: of n words in a text, word i belongs to part
  floor(i k / n) of k. A wrong or missing word counts there, an inserted one at the word before
  which it stands, or at the last one.
- A voice is placed by seconds: windows that do not overlap, each against the prompt. A rest
  shorter than half a window is left out. Later windows are means over the files that are so long.

Axes: k parts of a text.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.data.base import Samples
from latentlm_core.errors import DataError
from latentlm_core.evaluation.speakers import SpeakerEncoder
from latentlm_core.evaluation.speech import (
    SpeechProtocol,
    VoiceBook,
    WerReport,
    WerRow,
    cosine,
    speech_versions,
)
from latentlm_core.evaluation.spoken_items import SpokenItem, listen
from latentlm_core.progress import SILENT, Progress

NUM_PARTS = 5
WINDOW_SECONDS = 10.0


class WerPart(Config):
    """Word errors in one part of the texts."""

    part: int
    """0 is the beginning."""
    num_words: int
    """Of all texts there."""
    errors: int
    """Of all kinds."""
    wer: float | None
    """Errors over words; None where no text has a word."""


class SimWindow(Config):
    """Similarity in one window of one file."""

    file: str
    """The sample."""
    index: int
    """Its place."""
    start_seconds: float
    """Where the window begins."""
    sim_prompt: float | None
    """Cosine with the prompt; None where no voice is heard."""


class SimPosition(Config):
    """Similarity at one distance from the beginning."""

    start_seconds: float
    """Where the windows begin."""
    num_files: int
    """How many have a voice there."""
    sim_prompt: float
    """Mean cosine with their prompts."""


class DriftReport(Config):
    """WER and SIM by position."""

    wer_parts: tuple[WerPart, ...]
    """By part of the text."""
    sim_positions: tuple[SimPosition, ...]
    """By seconds from the beginning."""
    protocol: SpeechProtocol
    """What they depend on."""
    rows: tuple[SimWindow, ...] = Field(exclude=True)
    """One a window, for ``write_scores``; no part of ``to_dict``."""


def measure_drift(
    items: Sequence[SpokenItem],
    understood: WerReport,
    encoder: SpeakerEncoder,
    *,
    num_parts: int = NUM_PARTS,
    window_seconds: float = WINDOW_SECONDS,
    progress: Progress = SILENT,
) -> DriftReport:
    """Measure how samples change from their beginning to their end.

    Args:
        items: samples; those without a prompt have no SIM.
        understood: what ``word_errors`` found in them.
        encoder: what tells voices apart.
        num_parts: k.
        window_seconds: length of a window of voice.
        progress: hears of the pass.

    Raises:
        DataError: no samples, or audio that cannot be read.
    """
    windows, sha256 = _compare_windows(items, encoder, window_seconds, progress)
    settings = {"num_parts": num_parts, "window_seconds": window_seconds}
    return DriftReport(
        wer_parts=wer_by_part(understood.rows, num_parts),
        sim_positions=_by_position(windows),
        protocol=SpeechProtocol(
            samples=understood.protocol.samples,
            num_samples=len(items),
            samples_sha256=sha256,
            recogniser=understood.protocol.recogniser,
            normaliser=understood.protocol.normaliser,
            encoder=encoder.name,
            settings=settings,
            versions=speech_versions(),
        ),
        rows=windows,
    )


def wer_by_part(rows: Sequence[WerRow], num_parts: int = NUM_PARTS) -> tuple[WerPart, ...]:
    """Word errors by part of the text, as this module's text places them.

    Raises:
        DataError: no samples.
    """
    import jiwer

    if not rows:
        raise DataError("There are no transcripts to measure a drift on.")
    words, errors = [0] * num_parts, [0] * num_parts
    found = jiwer.process_words([row.reference for row in rows], [row.hypothesis for row in rows])
    for row, chunks in zip(rows, found.alignments, strict=True):
        for place in range(row.num_words):
            words[place * num_parts // row.num_words] += 1
        for place in _error_places(chunks):
            errors[min(place, row.num_words - 1) * num_parts // row.num_words] += 1
    return tuple(
        WerPart(part=part, num_words=n, errors=e, wer=e / n if n else None)
        for part, (n, e) in enumerate(zip(words, errors, strict=True))
    )


def _error_places(chunks: Sequence[Any]) -> Iterator[int]:
    """For each error of an alignment the word of the reference that it belongs to."""
    for chunk in chunks:
        if chunk.type == "insert":
            yield from [chunk.ref_start_idx] * (chunk.hyp_end_idx - chunk.hyp_start_idx)
        elif chunk.type != "equal":
            yield from range(chunk.ref_start_idx, chunk.ref_end_idx)


def _compare_windows(
    items: Sequence[SpokenItem], encoder: SpeakerEncoder, seconds: float, progress: Progress
) -> tuple[tuple[SimWindow, ...], str]:
    """Similarities of all windows, and the hash of the audio."""
    voices = VoiceBook(encoder)

    def compare(item: SpokenItem, samples: Samples, sample_rate: int) -> list[SimWindow]:
        prompt = voices.find(item.prompt)
        if prompt is None:
            return []
        return [
            SimWindow(
                file=str(item.file),
                index=item.index,
                start_seconds=start / sample_rate,
                sim_prompt=cosine(encoder.embed(window, sample_rate), prompt),
            )
            for start, window in _windows(samples, round(seconds * sample_rate))
        ]

    found, sha256 = listen(items, compare, "comparing voices", progress)
    return tuple(row for rows in found for row in rows), sha256


def _windows(samples: Samples, size: int) -> Iterator[tuple[int, Samples]]:
    """Start and content of each window; the first one may be short, the last one half full."""
    for start in range(0, len(samples), size):
        window = samples[start : start + size]
        if start == 0 or 2 * len(window) >= size:
            yield start, window


def _by_position(rows: Sequence[SimWindow]) -> tuple[SimPosition, ...]:
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row.sim_prompt is not None:
            found[row.start_seconds].append(row.sim_prompt)
    return tuple(
        SimPosition(start_seconds=start, num_files=len(each), sim_prompt=sum(each) / len(each))
        for start, each in sorted(found.items())
    )
