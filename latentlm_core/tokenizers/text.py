"""Text as token ids: the bytes of UTF-8, or a byte-level BPE trained on the transcripts.

Notable choices:
    ids 0 to 255 are bytes in both kinds, so every text has ids and comes back whole;
    the BPE reads a text behind one space, which decoding takes off again: a word has the same
    token at the beginning of a text as inside it;
    the file is one JSON object whose merges are pairs of ids, each checked; what the library
    makes of them is put together here, never read from a file;
    marks come after the text ids and are no part of the file: the version fixes their order;
    lone surrogates, which UTF-8 cannot hold, count as U+FFFD.
"""

import itertools
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from latentlm_core.config import Config
from latentlm_core.errors import CorruptFileError, DataError

if TYPE_CHECKING:
    import tokenizers

Normalisation = Literal["none", "speech", "words"]

NUM_BYTES = 256
MAX_VOCAB_SIZE = 1 << 20
MAX_TOKEN_BYTES = 64
"""No token of a BPE is longer."""
MIN_COUNT = 2
"""Pairs that occur less often in the texts are not merged."""

_STRAIGHT = str.maketrans(
    dict.fromkeys("‘’‚‛′`´", "'") | dict.fromkeys("“”„‟«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)
_JOINERS = "\u200c\u200d"
"""Invisible characters that the spelling of some languages needs."""
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}


def _byte_letters() -> str:
    """The 256 characters that stand for bytes in the library: printable ones for themselves."""
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return "".join(chr(b if b in _PRINTABLE else next(others)) for b in range(NUM_BYTES))


_LETTERS = _byte_letters()


class TextConfig(Config):
    """How text becomes token ids."""

    kind: Literal["bytes", "bpe"] = "bytes"
    """bytes (nothing to train), or bpe: merges of bytes that are frequent in the training texts."""
    vocab_size: Annotated[int, Field(ge=NUM_BYTES, le=MAX_VOCAB_SIZE)] = 512
    """Text ids of a `bpe` at most, the 256 bytes among them and the marks not; `bytes` has 256."""
    normalise: Normalisation = "none"
    """none; speech: NFKC, lower case, straight quotes and dashes, single spaces, no invisible
    characters; words: as speech, and of punctuation and symbols only apostrophes inside words stay,
    for transcripts that have none."""


class Marks(NamedTuple):
    """Ids that are no text; they follow the text ids in this order."""

    bos: int
    """Begins a document."""
    eos: int
    """Ends a document."""
    bod: int
    """Begins a span of latents."""
    eod: int
    """Ends a span of latents."""
    go_on: int
    """Only ever predicted: the span of latents goes on, the rival of ``eod``."""
    null: int
    """Stands for a condition that was dropped (classifier-free guidance)."""


class _Document(Config):
    """The file of a tokenizer."""

    format: Literal["latentlm-text"] = "latentlm-text"
    version: Literal[1] = 1
    config: TextConfig
    merges: tuple[tuple[int, int], ...] = ()
    """Pairs of ids to merge, the most urgent first; each may use the tokens of those before."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.config.kind == "bytes" and self.merges:
            raise ValueError("a tokenizer of bytes has no merges")
        size = len(_vocabulary(self.merges))
        if size > self.config.vocab_size:
            raise ValueError(f"{size} text ids are more than its vocab_size")
        return self


class TextTokenizer:
    """Text <=> ids; ``make_tokenizer`` and ``from_json`` make one.

    Args:
        config: the kind and the normalisation.
        merges: pairs of ids to merge, the most urgent first; none where the kind is bytes.

    Attributes:
        config: as given.
        num_text_ids: ids that stand for text; 0 to 255 are the bytes.
        marks: the ids that follow them.
        vocab_size: text ids and marks together.
        sha256: hex digest of ``to_json()``; what a model is held to.
    """

    def __init__(self, config: TextConfig, merges: Sequence[tuple[int, int]] = ()) -> None:
        self._document = _Document(config=config, merges=tuple(merges))
        self._tokens = _vocabulary(merges)
        self.config = config
        self.num_text_ids = len(self._tokens)
        self.vocab_size = self.num_text_ids + len(Marks._fields)
        self.marks = Marks(*range(self.num_text_ids, self.vocab_size))
        self.sha256 = self._document.digest()

    def encode(self, text: str) -> list[int]:
        """Ids of the normalised text, without marks; empty only where that is empty."""
        normalised = normalise(text, self.config.normalise)
        if self.config.kind == "bytes":
            return list(normalised.encode())
        return self._library.encode(f" {normalised}").ids if normalised else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: of ``encode(text)``, that is ``normalise(text, config.normalise)``.

        Marks, and ids that are none, are left out; bytes that are no UTF-8 become U+FFFD.
        """
        content = b"".join(self._tokens[i] for i in ids if 0 <= i < self.num_text_ids)
        if self.config.kind == "bpe":
            content = content.removeprefix(b" ")
        return content.decode("utf-8", "replace")

    def num_bytes(self, ids: Iterable[int]) -> list[int]:
        """Bytes of UTF-8 behind each text id; a space before a word counts as its own."""
        return [len(self._tokens[token]) for token in ids]

    def to_json(self) -> str:
        """The tokenizer as one JSON object, in ASCII; equal tokenizers give equal texts."""
        return json.dumps(self._document.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> "TextTokenizer":
        """The tokenizer that ``to_json`` wrote.

        Args:
            text: the JSON object.
            where: what it came from, for the message.

        Raises:
            CorruptFileError: it is damaged or something else.
        """
        try:
            document = _Document.model_validate_json(_utf8(text))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ascii(".".join(map(str, first["loc"])) or "the top")[:60]
            reason = first["msg"].removeprefix("Value error, ")
            raise CorruptFileError(
                f"{where} is damaged or no text tokenizer (at {place}: {reason})."
            ) from None
        if not {"format", "version"} <= document.model_fields_set:
            raise CorruptFileError(f"{where} is no text tokenizer (it names no format or version).")
        return cls(document.config, document.merges)

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer":
        from tokenizers import models

        names = ["".join(_LETTERS[byte] for byte in token) for token in self._tokens]
        vocab = {name: index for index, name in enumerate(names)}
        merges = [(names[left], names[right]) for left, right in self._document.merges]
        return _byte_level(models.BPE(vocab=vocab, merges=merges))


def make_tokenizer(config: TextConfig, texts: Iterable[str]) -> TextTokenizer:
    """A tokenizer of bytes, which leaves ``texts`` unread, or a BPE trained on them.

    Raises:
        DataError: a BPE was wanted and no text has content.
    """
    return TextTokenizer(config) if config.kind == "bytes" else train_bpe(texts, config)


def train_bpe(texts: Iterable[str], config: TextConfig) -> TextTokenizer:
    """Train a byte-level BPE, the same whatever the order of the texts.

    It has fewer than ``config.vocab_size`` text ids where the texts offer no more pairs.

    Raises:
        DataError: no text has content.
    """
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=MIN_COUNT,
        initial_alphabet=list(_LETTERS),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    learner = _byte_level(models.BPE())
    spoken = (f" {normalise(text, config.normalise)}" for text in texts if has_content(text))
    first = next(spoken, None)
    if first is None:
        raise DataError("A BPE is trained on text, and the data has none with a letter or a digit.")
    learner.train_from_iterator(itertools.chain([first], spoken), trainer)
    ids = {letter: byte for byte, letter in enumerate(_LETTERS)}
    merges = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return TextTokenizer(config, merges)


def normalise(text: str, rule: Normalisation) -> str:
    """``text`` under a rule of ``TextConfig.normalise``; a second time changes nothing."""
    text = _utf8(text).decode()
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


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf") or char.isspace() or char in _JOINERS


def _word_characters(text: str) -> Iterator[str]:
    """Letters, digits, what modifies them, and apostrophes between them; spaces for the rest."""
    for before, char, after in zip(f" {text}", text, f"{text[1:]} ", strict=False):
        apostrophe = char == "'" and before.isalnum() and after.isalnum()
        kept = apostrophe or char in _JOINERS or unicodedata.category(char)[0] in "LMN"
        yield char if kept else " "


def _utf8(text: str) -> bytes:
    """UTF-8, with U+FFFD for lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _vocabulary(merges: Iterable[tuple[int, int]]) -> list[bytes]:
    """The bytes of every text id; a token that two merges make has one id."""
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
