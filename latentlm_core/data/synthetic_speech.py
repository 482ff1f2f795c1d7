"""Speech that needs no download: sentences of a small grammar, read by the hibari-tts package.

Notable choices:
    the words are common, regular and unlike each other, for a small recogniser has to read them;
    what is held out are other sentences of the same words, so that a small model can say them;
    the training part also has the phrases that sentences are made of, down to single words, so that
    a model can find out which sound belongs to which word before it has to follow a sentence;
    a sentence is read when it is asked for, always with the same noise, and kept from then on;
    the pauses at its ends are cut to a tenth of a second.
"""

import importlib.util
from functools import lru_cache
from typing import Any

import torch

from latentlm_core.data.audio import Pcm, from_pcm, to_pcm, trim_silence
from latentlm_core.data.base import Clip
from latentlm_core.data.digit_strings import DIGITS
from latentlm_core.errors import MissingExtraError
from latentlm_core.runtime import derive_seed, generator

NUM_SENTENCES = {"train": 800, "test": 100}
PHRASES_DRAWN = 400
"""Of these, the different ones stand beside the sentences of the training part."""
MARGIN_SECONDS = 0.1

_SLOTS = {
    "colour": ("red", "blue", "green", "black", "white", "yellow"),
    "kind": ("big", "small", "old", "young", "happy"),
    "animal": ("fox", "dog", "horse", "bird", "rabbit"),
    "person": ("brother", "sister", "teacher", "doctor", "mother"),
    "moves": ("jumps over", "runs around", "looks under", "walks behind"),
    "gets": ("found", "bought", "painted"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "things": ("boxes", "tables", "baskets", "flowers", "apples", "bottles"),
    "place": ("in the garden", "by the river", "near the window", "after breakfast"),
}
"""Words by the names that the patterns use."""
_PATTERNS = (
    "the {colour} {animal} {moves} {number} {things}",
    "my {person} {gets} {number} {colour} {things}",
    "the {kind} {animal} {moves} the {colour} {things}",
    "her {kind} {person} {gets} a {colour} {animal} {place}",
)
_PHRASES = (
    *("{colour}", "{kind}", "{animal}", "{person}", "{gets}", "{number}", "{things}"),
    *("{moves}", "{place}", "the {animal}", "my {person}", "her {person}", "{colour} {animal}"),
    *("{kind} {animal}", "{number} {things}", "{colour} {things}", "{gets} a {animal}"),
)
_DIGIT_SHARE = 4
"""One sentence or phrase of so many is a string of digits."""


class HibariSource:
    """Sentences such as "the red fox jumps over seven boxes", and strings of 4 to 7 digits.

    One American voice at 24 kHz, about 1 to 4 seconds each.

    Args:
        split: `train` (800 sentences and some 200 phrases) or `test` (100 other sentences).

    Raises:
        MissingExtraError: hibari-tts is not installed.
    """

    name = "hibari"
    classes = ("hibari",)

    def __init__(self, split: str) -> None:
        if importlib.util.find_spec("hibari") is None:
            raise MissingExtraError("hibari-tts", "The data set hibari", extra="demo")
        train, test = sentences()
        self._split = split
        self._texts = train if split == "train" else test
        self._kept: dict[int, Pcm] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Clip:
        text = self._texts[index]
        if index not in self._kept:
            self._kept[index] = _read_aloud(text)
        rate = _voice().sample_rate
        return Clip(from_pcm(self._kept[index]), rate, text, 0, f"{self._split}-{index:03d}")


@lru_cache(maxsize=1)
def sentences() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of `train` and of `test`: other sentences, the same on every machine."""
    random = generator("hibari")
    found: dict[str, None] = {}
    while len(found) < sum(NUM_SENTENCES.values()):
        found[_sentence(len(found), random)] = None
    texts = tuple(found)
    is_test = [index % (len(texts) // NUM_SENTENCES["test"]) == 0 for index in range(len(texts))]
    phrases = tuple({_phrase(place, random): None for place in range(PHRASES_DRAWN)})
    return (
        tuple(text for text, held in zip(texts, is_test, strict=True) if not held) + phrases,
        tuple(text for text, held in zip(texts, is_test, strict=True) if held),
    )


def _sentence(place: int, random: torch.Generator) -> str:
    if place % _DIGIT_SHARE == 0:
        return _digits(4, 7, random)
    return _filled(_pick(_PATTERNS, random), random)


def _phrase(place: int, random: torch.Generator) -> str:
    if place % _DIGIT_SHARE == 0:
        return _digits(1, 3, random)
    return _filled(_pick(_PHRASES, random), random)


def _digits(fewest: int, most: int, random: torch.Generator) -> str:
    length = int(torch.randint(fewest, most + 1, (), generator=random))
    return " ".join(_pick(DIGITS, random) for _ in range(length))


def _filled(pattern: str, random: torch.Generator) -> str:
    return pattern.format(**{name: _pick(words, random) for name, words in _SLOTS.items()})


def _pick(words: tuple[str, ...], random: torch.Generator) -> str:
    return words[int(torch.randint(len(words), (), generator=random))]


def _read_aloud(text: str) -> Pcm:
    voice = _voice()
    samples = voice(f"{text.capitalize()}.", seed=derive_seed("hibari", text))
    return to_pcm(trim_silence(samples, voice.sample_rate, margin_seconds=MARGIN_SECONDS))


@lru_cache(maxsize=1)
def _voice() -> Any:
    from hibari import Hibari

    return Hibari()
