"""Strings of spoken digits, composed from single recordings of one speaker.

Notable choices:
    string i is a function of (split, i) alone, and takes come from its own split, so what is held
    out has been heard in no string of the training part;
    speakers take turns, each round begun by the next of them, so that every n-th string is by all
    of them; every digit is drawn on its own, and so is the take of it;
    takes lose the silence at their ends and get one loudness, as in a string spoken in one go.
"""

from collections.abc import Sequence

import numpy as np
import torch

from latentlm_core.data.audio import normalise_loudness, resample, trim_silence
from latentlm_core.data.base import Clip, Samples, SpeechSource
from latentlm_core.errors import DataError
from latentlm_core.runtime import generator

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_STRINGS = {"train": 6_000, "test": 400}
MIN_DIGITS = {"train": 1, "test": 3}
MAX_DIGITS = 7
GAP_SECONDS = 0.15, 0.35
"""Shortest and longest pause between two digits."""
MARGIN_SECONDS = 0.2
"""Silence before the first digit and after the last."""
_FADE_SECONDS = 0.005
"""Over which a take begins and ends, so that it does not click."""


class DigitStringSource:
    """Strings of 3 to 7 digits, such as "three one four"; in the training part of 1 to 7.

    Args:
        takes: recordings of single digits, with texts and speakers.
        split: `train` (6,000 strings) or `test` (400 others).

    Raises:
        DataError: a take cannot be read, is no digit, or has no speaker; or a speaker lacks one.
    """

    name = "digit-strings"

    def __init__(self, takes: SpeechSource, split: str) -> None:
        self.classes = takes.classes
        self._split = split
        self._sample_rate = takes[0].sample_rate
        self._takes = _sort_takes(takes, self._sample_rate)

    def __len__(self) -> int:
        return NUM_STRINGS[self._split]

    def __getitem__(self, index: int) -> Clip:
        random = generator("digit-strings", self._split, index)
        speaker = (index + index // len(self.classes)) % len(self.classes)
        length = _draw(MIN_DIGITS[self._split], MAX_DIGITS, random)
        digits = torch.randint(len(DIGITS), (length,), generator=random).tolist()
        shortest, longest = (round(seconds * self._sample_rate) for seconds in GAP_SECONDS)
        margin = np.zeros(round(MARGIN_SECONDS * self._sample_rate), np.float32)
        parts: list[Samples] = []
        for digit in digits:
            takes = self._takes[speaker][digit]
            parts.append(takes[_draw(0, len(takes) - 1, random)])
            parts.append(np.zeros(_draw(shortest, longest, random), np.float32))
        parts = [margin, *parts[:-1], margin]
        text = " ".join(DIGITS[digit] for digit in digits)
        return Clip(np.concatenate(parts), self._sample_rate, text, speaker, f"digits-{index:06d}")


def _sort_takes(takes: SpeechSource, sample_rate: int) -> list[list[list[Samples]]]:
    """Takes by speaker and digit, ready to be joined."""
    sorted_takes: list[list[list[Samples]]] = [[[] for _ in DIGITS] for _ in takes.classes]
    for take in (takes[index] for index in range(len(takes))):
        if take.text not in DIGITS or take.speaker is None:
            raise DataError(
                f"{takes.name}: {take.key} is no digit of a speaker, but {take.text!r}."
            )
        digit = DIGITS.index(take.text)
        sorted_takes[take.speaker][digit].append(_ready(take, sample_rate))
    _check_complete(takes, sorted_takes)
    return sorted_takes


def _check_complete(takes: SpeechSource, found: Sequence[Sequence[Sequence[Samples]]]) -> None:
    missing = [
        f"{name} says no {DIGITS[digit]}"
        for name, digits in zip(takes.classes, found, strict=True)
        for digit in range(len(DIGITS))
        if not digits[digit]
    ]
    if missing:
        raise DataError(f"{takes.name} does not have every digit of every speaker: {missing[0]}.")


def _ready(take: Clip, sample_rate: int) -> Samples:
    """A take without the silence at its ends, of the usual loudness, faded in and out."""
    samples = resample(take.samples, take.sample_rate, sample_rate)
    samples = normalise_loudness(trim_silence(samples, sample_rate))
    length = min(round(_FADE_SECONDS * sample_rate), len(samples) // 2)
    ramp = np.linspace(0.0, 1.0, length, dtype=np.float32)
    samples[:length] *= ramp
    samples[len(samples) - length :] *= ramp[::-1]
    return samples


def _draw(low: int, high: int, random: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=random))
