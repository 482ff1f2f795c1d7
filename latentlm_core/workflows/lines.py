"""What is to be said: texts with a voice, or the utterances of a data set under a protocol.

Protocols (the paper's two, on LibriSpeech test-clean; here on any data with speakers):

    reference-utterance   the voice is the utterance of that speaker before this one in the set, for
                          the first the last, with its transcript
    3s-prefix             the voice is the first three seconds of the utterance itself, which the
                          model goes on with; the sample holds them and the continuation

A speaker's only utterance has no other to give it a voice: the first protocol leaves it out.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from latentlm_core.data.audio import ClipLimits, check_clip, read_audio
from latentlm_core.data.base import Clip, SpeechSource
from latentlm_core.data.folders import read_beside
from latentlm_core.data.speech_sources import open_speech, pair_reference
from latentlm_core.errors import DataError
from latentlm_core.processes import current
from latentlm_core.progress import Progress
from latentlm_core.tokenizers.text import has_content
from latentlm_core.workflows.speaking import Line

Protocol = Literal["reference-utterance", "3s-prefix"]

PREFIX_SECONDS = 3.0
"""Of the utterance that `3s-prefix` continues."""


def read_voice(path: Path, text: str | None) -> Clip:
    """A recording of a speaker, with a transcript: as given, or from a .txt beside it.

    Args:
        path: the recording.
        text: its transcript; nothing to say is none, whatever lies beside it.

    Raises:
        DataError: it cannot be read.
    """
    samples, sample_rate = read_audio(path, str(path))
    if text is None:
        text = read_beside(path.with_suffix(".txt"), str(path), "transcript")
    return Clip(samples, sample_rate, text if has_content(text or "") else None, None, str(path))


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
        limits: what a voice must be like.
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
        limits: ClipLimits,
        progress: Progress,
    ) -> None:
        with current().main_first():
            self._source: SpeechSource = open_speech(data, split)
        self._is_prefix = protocol == "3s-prefix"
        shortest, longest = seconds or (0.0, float("inf"))
        shortest = max(shortest, PREFIX_SECONDS if self._is_prefix else 0.0)
        kept, speakers = self._fitting(shortest, longest, limits, progress)
        pairs = [(kept[own], kept[other]) for own, other in enumerate(pair_reference(speakers))]
        if not self._is_prefix:
            pairs = [(own, other) for own, other in pairs if own != other]
            if len(pairs) < len(kept):
                progress.warn(
                    f"Left out {len(kept) - len(pairs)} utterances whose speakers have no other."
                )
        if not pairs:
            raise DataError(
                f"{data} has no utterance with a transcript of {shortest:g} to {longest:g} seconds "
                f"in its split {split!r} that the protocol {protocol} can take."
            )
        number = min(count or len(pairs), len(pairs))
        self._pairs = [pairs[place * len(pairs) // number] for place in range(number)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Line:  # type: ignore[override]
        own, other = self._pairs[index]
        original = self._source[own]
        voice = self._voice(original if self._is_prefix else self._source[other])
        return Line(original.text or "", voice, original, continues=self._is_prefix)

    def _voice(self, clip: Clip) -> Clip:
        """What is heard of an utterance that gives the voice."""
        if not self._is_prefix:
            return clip
        length = round(PREFIX_SECONDS * clip.sample_rate)
        return replace(clip, samples=clip.samples[:length], text=None)

    def _fitting(
        self, shortest: float, longest: float, limits: ClipLimits, progress: Progress
    ) -> tuple[list[int], list[int | None]]:
        """Utterances with a text, of such a length and fit to give a voice, and their speakers."""
        kept: list[int] = []
        speakers: list[int | None] = []
        with progress.bar(f"reading {self._source.name}", len(self._source), "clips") as bar:
            for index in range(len(self._source)):
                bar.advance(1)
                try:
                    clip = self._source[index]
                    has_length = shortest <= len(clip.samples) / clip.sample_rate <= longest
                    if not has_length or not has_content(clip.text or ""):
                        continue
                    check_clip(self._voice(clip), limits)
                except DataError as error:
                    progress.warn(f"Skipped: {error}")
                    continue
                kept.append(index)
                speakers.append(clip.speaker)
        return kept, speakers
