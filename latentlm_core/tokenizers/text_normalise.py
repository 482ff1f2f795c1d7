"""Rules that make texts alike before they become ids."""

import unicodedata
from collections.abc import Iterator
from typing import Literal

Normalisation = Literal["none", "speech", "words"]

_STRAIGHT = str.maketrans(
    dict.fromkeys("‘’‚‛′`´", "'") | dict.fromkeys("“”„‟«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)
_JOINERS = "\u200c\u200d"
"""Invisible characters that the spelling of some languages needs."""


def normalise(text: str, rule: Normalisation) -> str:
    """``text`` under a rule of ``TextConfig.normalise``; a second time changes nothing."""
    text = whole(text)
    if rule == "none":
        return text
    text = "".join(filter(_is_visible, text)).translate(_STRAIGHT)
    text = unicodedata.normalize("NFKC", text)
    text = unicodedata.normalize("NFKC", text.lower()).translate(_STRAIGHT)
    if rule == "words":
        text = "".join(_word_characters(text))
    return " ".join(text.split())


def has_content(text: str) -> bool:
    """Whether there is something to say: a letter or a digit of any script."""
    return any(char.isalnum() for char in unicodedata.normalize("NFKC", text))


def whole(text: str) -> str:
    """``text`` as UTF-8 can hold it: with U+FFFD for lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf") or char.isspace() or char in _JOINERS


def _word_characters(text: str) -> Iterator[str]:
    """Letters, digits, what modifies them, and apostrophes between them; spaces for the rest."""
    for before, char, after in zip(f" {text}", text, f"{text[1:]} ", strict=False):
        apostrophe = char == "'" and before.isalnum() and after.isalnum()
        kept = apostrophe or char in _JOINERS or unicodedata.category(char)[0] in "LMN"
        yield char if kept else " "
