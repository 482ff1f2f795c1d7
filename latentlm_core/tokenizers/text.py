"""Text as token ids: bytes, a BPE trained on the texts, or a tokenizer that others have made.

Notable choices:
    the file is one JSON object that holds all of a tokenizer, a tokenizer.json of others included;
    of an encoding of tiktoken it holds the name and the hash of the ranks;
    what decides ids is in the file and nothing else is: two tokenizers of one content have one
    sha256, wherever they were read from;
    marks come after the text ids and are no part of the file: the version fixes their order;
    lone surrogates, which UTF-8 cannot hold, count as U+FFFD.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

from pydantic import Field, ValidationError, model_validator

from latentlm_core.config import Config
from latentlm_core.errors import ConfigError, CorruptFileError, DataError
from latentlm_core.tokenizers.text_bytes import (
    NUM_BYTES,
    BpeCodec,
    ByteCodec,
    learn_merges,
    vocabulary,
)
from latentlm_core.tokenizers.text_library import MAX_CHARS, LibraryCodec, read_tokenizer_file
from latentlm_core.tokenizers.text_normalise import Normalisation, has_content, normalise, whole
from latentlm_core.tokenizers.text_tiktoken import DEFAULT, Ranks, TiktokenCodec, read_ranks

__all__ = [
    "Marks",
    "Normalisation",
    "TextConfig",
    "TextTokenizer",
    "has_content",
    "make_tokenizer",
    "normalise",
    "train_bpe",
]

MAX_VOCAB_SIZE = 1 << 20


class TextConfig(Config):
    """How text becomes token ids."""

    kind: Literal["bytes", "bpe", "library", "tiktoken"] = "bytes"
    """bytes (nothing to train); bpe: merges of bytes that are frequent in the training texts;
    library: a tokenizer.json of the `tokenizers` library; tiktoken: an encoding of that package."""
    vocab_size: Annotated[int, Field(ge=NUM_BYTES, le=MAX_VOCAB_SIZE)] = 512
    """Text ids of a `bpe` at most, the 256 bytes among them and the marks not; the other kinds
    have as many as they have."""
    normalise: Normalisation = "none"
    """none; speech: NFKC, lower case, straight quotes and dashes, single spaces, no invisible
    characters; words: as speech, and of punctuation and symbols only apostrophes inside words stay,
    for transcripts that have none."""
    source: str | None = None
    """Of `library`: the path of a tokenizer.json or of a folder that has one, or hf:ORG/NAME. Of
    `tiktoken`: the name of the encoding, cl100k_base unless said."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source is not None and self.kind in ("bytes", "bpe"):
            raise ValueError(f"a tokenizer of kind {self.kind} has no source")
        return self


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


class Codec(Protocol):
    """What a kind of tokenizer does with a normalised text; ids are 0 to ``num_ids - 1``."""

    num_ids: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none where it is empty."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def num_bytes(self, token: int) -> int:
        """Bytes of UTF-8 behind an id."""


class _Document(Config):
    """The file of a tokenizer."""

    format: Literal["latentlm-text"] = "latentlm-text"
    version: Literal[1] = 1
    config: TextConfig
    merges: tuple[tuple[int, int], ...] = ()
    """Pairs of ids to merge, the most urgent first; each may use the tokens of those before."""
    library: Annotated[str, Field(max_length=MAX_CHARS)] | None = None
    """The text of a tokenizer.json."""
    ranks: Ranks | None = None
    """What an encoding of tiktoken is held to."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind = self.config.kind
        if self.merges and kind != "bpe":
            raise ValueError(f"a tokenizer of {kind} has no merges")
        contents = {"library": self.library, "tiktoken": self.ranks}
        if any((content is None) == (kind == name) for name, content in contents.items()):
            raise ValueError(f"its content is not that of a tokenizer of {kind}")
        size = len(vocabulary(self.merges))
        if size > self.config.vocab_size:
            raise ValueError(f"{size} text ids are more than its vocab_size")
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without what its kind has none of."""
        return self.model_dump(mode="json", exclude_none=True)


class TextTokenizer:
    """Text <=> ids; ``make_tokenizer`` and ``from_json`` make one.

    Args:
        config: the kind and the normalisation.
        merges: of a `bpe`: pairs of ids to merge, the most urgent first.
        library: of a `library`: the text of a tokenizer.json.
        ranks: of `tiktoken`: what the encoding must be.
        where: what the content came from, for messages.

    Attributes:
        config: as given.
        num_text_ids: ids that stand for text; 0 to 255 are the bytes where it was made here.
        marks: the ids that follow them.
        vocab_size: text ids and marks together.
        sha256: hex digest of ``to_json()``; what a model is held to.

    Raises:
        CorruptFileError: the content of others is not what it should be.
        DataError: there is no such encoding, or its ranks cannot be had.
        MissingExtraError: tiktoken is wanted and not installed.
    """

    def __init__(
        self,
        config: TextConfig,
        merges: Sequence[tuple[int, int]] = (),
        *,
        library: str | None = None,
        ranks: Ranks | None = None,
        where: str = "The text tokenizer",
    ) -> None:
        self._document = _Document(
            config=config, merges=tuple(merges), library=library, ranks=ranks
        )
        self._codec = _make_codec(self._document, where)
        self.config = config
        self.num_text_ids = self._codec.num_ids
        self.vocab_size = self.num_text_ids + len(Marks._fields)
        self.marks = Marks(*range(self.num_text_ids, self.vocab_size))
        self.sha256 = self._document.digest()

    def encode(self, text: str) -> list[int]:
        """Ids of the normalised text, without marks; none where that is empty.

        Special tokens of a tokenizer of others that the text spells are plain text.

        Raises:
            DataError: a tokenizer of others has no ids for it.
        """
        return self._codec.encode(normalise(text, self.config.normalise))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: of ``encode(text)``, that is ``normalise(text, config.normalise)``.

        Tokenizers of others that are not of bytes may lose something of it. Marks, special tokens
        and ids that are none are left out; bytes that are no UTF-8 become U+FFFD.
        """
        return self._codec.decode([token for token in ids if 0 <= token < self.num_text_ids])

    def num_bytes(self, ids: Iterable[int]) -> list[int]:
        """Bytes of UTF-8 behind each text id; a space before a word counts as its own."""
        return [self._codec.num_bytes(token) for token in ids]

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
            DataError: it names an encoding of tiktoken that cannot be had.
            MissingExtraError: the same, for tiktoken is not installed.
        """
        try:
            document = _Document.model_validate_json(whole(text).encode())
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ascii(".".join(map(str, first["loc"])) or "the top")[:60]
            reason = first["msg"].removeprefix("Value error, ")
            raise CorruptFileError(
                f"{where} is damaged or no text tokenizer (at {place}: {reason})."
            ) from None
        if not {"format", "version"} <= document.model_fields_set:
            raise CorruptFileError(f"{where} is no text tokenizer (it names no format or version).")
        return cls(
            document.config,
            document.merges,
            library=document.library,
            ranks=document.ranks,
            where=where,
        )


def make_tokenizer(config: TextConfig, texts: Iterable[str]) -> TextTokenizer:
    """The tokenizer of a configuration; only a BPE reads ``texts``, on which it is trained.

    Raises:
        ConfigError: a `library` has no source, or there is nothing at its source.
        DataError: a BPE was wanted and no text has content; or as ``TextTokenizer``.
        MissingExtraError: tiktoken is wanted and not installed.
    """
    match config.kind:
        case "bytes":
            return TextTokenizer(config)
        case "bpe":
            return train_bpe(texts, config)
        case "library":
            return _read_library(config)
        case "tiktoken":
            name = config.source or DEFAULT
            settled = TextConfig(kind="tiktoken", normalise=config.normalise, source=name)
            return TextTokenizer(settled, ranks=read_ranks(name))


def train_bpe(texts: Iterable[str], config: TextConfig) -> TextTokenizer:
    """Train a byte-level BPE, the same whatever the order of the texts.

    It has fewer than ``config.vocab_size`` text ids where the texts offer no more pairs.

    Raises:
        DataError: no text has content.
    """
    spoken = (normalise(text, config.normalise) for text in texts if has_content(text))
    first = next(spoken, None)
    if first is None:
        raise DataError("A BPE is trained on text, and the data has none with a letter or a digit.")
    return TextTokenizer(config, learn_merges(itertools.chain([first], spoken), config.vocab_size))


def _read_library(config: TextConfig) -> TextTokenizer:
    """Where the file lay is no part of the tokenizer."""
    if config.source is None:
        raise ConfigError(
            "A text tokenizer of kind library needs text.source.",
            hint="It is a tokenizer.json, a folder that has one, or hf:ORG/NAME.",
        )
    content, where = read_tokenizer_file(config.source)
    settled = TextConfig(kind="library", normalise=config.normalise)
    return TextTokenizer(settled, library=content, where=where)


def _make_codec(document: _Document, where: str) -> Codec:
    if document.library is not None:
        return LibraryCodec(document.library, where)
    if document.ranks is not None:
        return TiktokenCodec(document.config.source or DEFAULT, document.ranks, where)
    return BpeCodec(document.merges) if document.config.kind == "bpe" else ByteCodec()
