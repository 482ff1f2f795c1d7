"""Any tokenizer of the `tokenizers` library: a tokenizer.json, from this disk or from the hub.

Notable choices:
    the file is foreign: its size is bounded, and whatever the library raises is one sentence;
    truncation, padding and the tokens that the library would put around a text are left out: what
    stands around a text is the layout's affair, and marks are ours;
    special tokens of the file are never made from a text that spells them, and decode to nothing;
    other tokens that were added to the file (``<think>``, say) are made, and decode to themselves.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentlm_core.errors import ConfigError, CorruptFileError, DataError
from latentlm_core.files import read_text
from latentlm_core.tokenizers.text_bytes import LETTERS

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
PREFIX = "hf:"
MAX_CHARS = 1 << 26
"""Characters of a tokenizer.json at most; the largest in use have half as many."""
MAX_IDS = 1 << 20

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A piece that stands for a byte, in tokenizers that fall back on bytes."""


class LibraryCodec:
    """Text <=> the ids of a tokenizer.json.

    Args:
        content: the text of the file.
        where: what it came from, for messages.

    Attributes:
        num_ids: the largest id and one; there may be ids in between that stand for nothing.

    Raises:
        CorruptFileError: the library does not read it, or its ids are none or too many.
    """

    def __init__(self, content: str, where: str) -> None:
        self._library, decoder = _parse(content, where)
        ids = self._library.get_vocab(with_added_tokens=True).values()
        self.num_ids = max(ids, default=-1) + 1
        if not 0 < self.num_ids <= MAX_IDS:
            raise CorruptFileError(
                f"{where} has ids up to {self.num_ids - 1}; a tokenizer has 1 to {MAX_IDS}."
            )
        self._is_byte_level = '"ByteLevel"' in decoder
        self._falls_back = '"ByteFallback"' in decoder
        self._special = {
            token
            for token, added in self._library.get_added_tokens_decoder().items()
            if added.special
        }
        self.num_bytes = cache(self._num_bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone.

        Raises:
            DataError: it has none in this tokenizer.
        """
        with _one_sentence(DataError, f"The text tokenizer has no ids for {text[:40]!a}"):
            return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, as the file's decoder puts it together.

        It is what was encoded where the tokenizer is of bytes, after the file's normaliser and
        with the space in front that some files add.

        Raises:
            DataError: the file's decoder breaks on them.
        """
        with _one_sentence(DataError, f"The text tokenizer cannot read its ids {ids[:10]}"):
            return self._library.decode(ids, skip_special_tokens=True)

    def _num_bytes(self, token: int) -> int:
        """Bytes of a piece; where it is not of bytes, those that it adds behind another piece."""
        piece = self._library.id_to_token(token)
        if piece is None or token in self._special:
            return 0
        if self._is_byte_level:
            is_bytes = all(char in LETTERS for char in piece)
            return len(piece) if is_bytes else len(piece.encode())
        if self._falls_back and _BYTE.fullmatch(piece):
            return 1
        once, twice = (len(self.decode([token] * times).encode()) for times in (1, 2))
        return twice - once


def read_tokenizer_file(source: str) -> tuple[str, str]:
    """Find a tokenizer.json and read it.

    Args:
        source: its path, that of a folder that has one, or ``hf:ORG/NAME``.

    Returns:
        (its text, what it is called in messages).

    Raises:
        ConfigError: no such file or folder, or no name of a repository.
        DataError: the hub does not give it.
        CorruptFileError: it is no text, or longer than 64 Mi characters.
    """
    path = _download(source) if source.startswith(PREFIX) else Path(source).expanduser()
    if path.is_dir():
        path /= FILE
    if not path.is_file():
        raise ConfigError(
            f"There is no tokenizer {path}.",
            hint="text.source is a tokenizer.json, a folder that has one, or hf:ORG/NAME.",
        )
    where = source if source.startswith(PREFIX) else str(path)
    if path.stat().st_size > 4 * MAX_CHARS:
        raise CorruptFileError(f"{where} is longer than {MAX_CHARS} characters.")
    content = read_text(path)
    if len(content) > MAX_CHARS:
        raise CorruptFileError(f"{where} is longer than {MAX_CHARS} characters.")
    return content, where


def _download(source: str) -> Path:
    import huggingface_hub

    repository = source.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"{source} is not of the form hf:ORG/NAME.")
    hint = "Check the name, the network, and `hf auth login` if it is gated."
    with _one_sentence(DataError, f"The tokenizer {source} cannot be loaded from the hub", hint):
        return Path(huggingface_hub.hf_hub_download(repository, FILE))


def _parse(content: str, where: str) -> tuple["tokenizers.Tokenizer", str]:
    """The tokenizer, and its decoder as JSON."""
    from tokenizers import Tokenizer

    message = f"{where} is damaged or no {FILE} that the tokenizers library reads"
    with _one_sentence(CorruptFileError, message):
        plain = json.loads(content)
        _check_merges(plain["model"])
        library = Tokenizer.from_str(json.dumps(plain))
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        return library, json.dumps(plain.get("decoder"))


def _check_merges(model: dict[str, Any]) -> None:
    """Keep from the library what makes it read outside its memory and end the process.

    It cuts the prefix off the second piece of each merge without a look at the piece.
    """
    if "merges" in model and model.get("continuing_subword_prefix"):
        raise ValueError("a BPE with a continuing_subword_prefix is not read here")


@contextmanager
def _one_sentence(kind: type[DataError], message: str, hint: str | None = None) -> Iterator[None]:
    """Turn whatever comes out of foreign code into one error.

    The errors of the tokenizers library have no class of their own; those of the hub and its
    transport share none; and a panic of Rust is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = ascii(lines[0][:160].rstrip("."))[1:-1]
        raise kind(f"{message} ({reason}).", hint=hint) from None
