"""The text tokenizers that are made here: bytes of UTF-8, and merges of bytes (BPE).

Notable choices:
    ids 0 to 255 are bytes in both kinds, so every text has ids and comes back whole;
    the BPE reads a text behind one space, which decoding takes off again: a word has the same
    token at the beginning of a text as inside it;
    merges are pairs of ids, each checked; what the library makes of them is put together here,
    never read from a file.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

NUM_BYTES = 256
MAX_TOKEN_BYTES = 64
"""No token of a BPE is longer."""
MIN_COUNT = 2
"""Pairs that occur less often in the texts are not merged."""

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}


def _byte_letters() -> str:
    """The 256 characters that stand for bytes in the library: printable ones for themselves."""
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return "".join(chr(b if b in _PRINTABLE else next(others)) for b in range(NUM_BYTES))


LETTERS = _byte_letters()
"""The letter of each byte."""


class ByteCodec:
    """Text <=> bytes of UTF-8."""

    num_ids = NUM_BYTES

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; what is no UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")

    def num_bytes(self, token: int) -> int:
        """One."""
        return 1


class BpeCodec:
    """Text <=> merged bytes.

    Args:
        merges: pairs of ids to merge, the most urgent first.

    Raises:
        ValueError: as ``vocabulary``.
    """

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        self._merges = merges
        self._tokens = vocabulary(merges)
        self.num_ids = len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of the text behind one space."""
        return self._library.encode(f" {text}").ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Their text without that space; what is no UTF-8 becomes U+FFFD."""
        content = b"".join(self._tokens[token] for token in ids)
        return content.removeprefix(b" ").decode("utf-8", "replace")

    def num_bytes(self, token: int) -> int:
        """Bytes that were merged."""
        return len(self._tokens[token])

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer":
        from tokenizers import models

        names = ["".join(LETTERS[byte] for byte in token) for token in self._tokens]
        vocab = {name: index for index, name in enumerate(names)}
        merges = [(names[left], names[right]) for left, right in self._merges]
        return _byte_level(models.BPE(vocab=vocab, merges=merges))


def learn_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[int, int]]:
    """Pairs of ids that are frequent in the texts, whatever their order.

    Args:
        texts: normalised.
        vocab_size: ids at most, the bytes among them; fewer where there are no more pairs.
    """
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        initial_alphabet=list(LETTERS),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    learner = _byte_level(models.BPE())
    learner.train_from_iterator((f" {text}" for text in texts), trainer)
    ids = {letter: byte for byte, letter in enumerate(LETTERS)}
    merges = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return merges


def vocabulary(merges: Iterable[tuple[int, int]]) -> list[bytes]:
    """The bytes of every text id; a token that two merges make has one id.

    Raises:
        ValueError: a merge names an id that is not made before it, or a token is too long.
    """
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
    known = set(tokens)
    for left, right in merges:
        if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
            raise ValueError("a merge names an id that is not made before it")
        token = tokens[left] + tokens[right]
        if len(token) > MAX_TOKEN_BYTES:
            raise ValueError(f"a token is longer than {MAX_TOKEN_BYTES} bytes")
        if token not in known:
            known.add(token)
            tokens.append(token)
    return tokens


def _byte_level(model: "tokenizers.models.BPE") -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
