"""What is to be said: texts with a voice, or the utterances of a data set under a protocol.

Protocols (the paper's two, on LibriSpeech test-clean; here on any data with speakers):

    reference-utterance   the voice is the utterance of that speaker before this one in the set, for
                          the first the last, with its transcript
    3s-prefix             the voice is the first three seconds of the utterance itself, which the
                          model goes on with; the sample holds them and the continuation
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from latentlm_core.data.audio import read_audio
from latentlm_core.data.base import Clip, SpeechSource
from latentlm_core.data.speech_sources import open_speech, pair_reference
from latentlm_core.errors import DataError
from latentlm_core.files import read_text
from latentlm_core.progress import Progress
from latentlm_core.tokenizers.text import has_content
from latentlm_core.workflows.speaking import Line

Protocol = Literal["reference-utterance", "3s-prefix"]

PREFIX_SECONDS = 3.0
"""Of the utterance that `3s-prefix` continues."""


def read_voice(path: Path, text: str | None) -> Clip:
    """A recording of a speaker, with a transcript: as given, or from a .txt beside it.

    Raises:
        DataError: it cannot be read.
    """
    samples, sample_rate = read_audio(path, str(path))
    beside = path.with_suffix(".txt")
    if text is None and beside.is_file():
        text = read_text(beside).strip() or None
    return Clip(samples, sample_rate, text, None, str(path))


class TextLines(Sequence[Line]):
    """Every text a number of times, in turn.

    Args:
        texts: what to say.
        count: of samples in all.
        voice: of the speaker, None for whatever voice comes.
    """

    def __init__(self, texts: Sequence[str], count: int, voice: Clip | None) -> None:
        self._lines = [Line(text, voice) for text in texts]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Line:  # type: ignore[override]
        return self._lines[index % len(self._lines)]


class ProtocolLines(Sequence[Line]):
    """Utterances of a data set, with the voices that a protocol gives them.

    Args:
        data: a data set of speech with speakers and transcripts.
        split: train or test.
        protocol: where the voice comes from.
        seconds: shortest and longest utterance that is taken, None for all.
        count: how many, from all over the set; None takes all.
        progress: hears of the reading.

    Raises:
        DataError: nothing fits.
    """

    def __init__(
        self,
        data: str,
        split: str,
        protocol: Protocol,
        seconds: tuple[float, float] | None,
        count: int | None,
        progress: Progress,
    ) -> None:
        self._source: SpeechSource = open_speech(data, split)
        self._protocol = protocol
        shortest = max(seconds[0] if seconds else 0.0, _least_seconds(protocol))
        longest = seconds[1] if seconds else float("inf")
        kept, speakers = _fitting(self._source, shortest, longest, progress)
        if not kept:
            raise DataError(
                f"{data} has no utterance with a transcript of {shortest:g} to {longest:g} seconds "
                f"in its split {split!r}."
            )
        places = range(len(kept))
        if count is not None and count < len(kept):
            places = [number * len(kept) // count for number in range(count)]  # type: ignore[assignment]
        references = pair_reference(speakers)
        self._pairs = [(kept[place], kept[references[place]]) for place in places]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Line:  # type: ignore[override]
        own, other = self._pairs[index]
        original = self._source[own]
        text = original.text or ""
        if self._protocol == "reference-utterance":
            return Line(text, self._source[other], original)
        length = round(PREFIX_SECONDS * original.sample_rate)
        return Line(text, replace(original, samples=original.samples[:length]), original, True)


def _least_seconds(protocol: Protocol) -> float:
    return PREFIX_SECONDS if protocol == "3s-prefix" else 0.0


def _fitting(
    source: SpeechSource, shortest: float, longest: float, progress: Progress
) -> tuple[list[int], list[int | None]]:
    """Utterances with a text and of such a length, and their speakers; broken ones are left out."""
    kept: list[int] = []
    speakers: list[int | None] = []
    with progress.bar(f"reading {source.name}", len(source), "clips") as bar:
        for index in range(len(source)):
            bar.advance(1)
            try:
                clip = source[index]
            except DataError as error:
                progress.warn(f"Skipped: {error}")
                continue
            is_long_enough = shortest <= len(clip.samples) / clip.sample_rate <= longest
            if is_long_enough and has_content(clip.text or ""):
                kept.append(index)
                speakers.append(clip.speaker)
    return kept, speakers
