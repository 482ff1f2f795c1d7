"""Encodings of the package tiktoken, cl100k_base (the paper's) among them.

Notable choices:
    a file of a tokenizer names the encoding and holds the hash of its ranks, not the ranks: two
    machines that agree on the hash agree on every id;
    the ranks are downloaded at first use, unless a plugin brings them as NAME_offline;
    special tokens are never made from a text that spells them, and decode to nothing.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.errors import CorruptFileError, DataError, MissingExtraError, did_you_mean

if TYPE_CHECKING:
    import tiktoken

DEFAULT = "cl100k_base"
OFFLINE = "_offline"
"""Ends the name of an encoding whose ranks a plugin brings along."""


class Ranks(Config):
    """What an encoding is held to."""

    num_ids: int = Field(gt=0)
    """The largest id and one; there may be ids in between that stand for nothing."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the bytes of all ids."""


class TiktokenCodec:
    """Text <=> the ids of an encoding.

    Args:
        name: of the encoding.
        ranks: what it must be.
        where: what names it, for messages.

    Attributes:
        num_ids: as in ``ranks``.

    Raises:
        MissingExtraError: tiktoken is not installed.
        DataError: there is no such encoding, or its ranks cannot be had.
        CorruptFileError: it is not what ``ranks`` says.
    """

    def __init__(self, name: str, ranks: Ranks, where: str) -> None:
        self._encoding = _load(name)
        self._pieces = _pieces(self._encoding)
        self.num_ids = len(self._pieces)
        if ranks != _ranks(self._pieces):
            raise CorruptFileError(
                f"{where} was made with another {name} than the one of this machine's tiktoken."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return self._encoding.encode(text, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; what is no UTF-8 becomes U+FFFD."""
        return b"".join(self._pieces[token] for token in ids).decode("utf-8", "replace")

    def num_bytes(self, token: int) -> int:
        """Bytes of a piece; 0 of ids that are no text."""
        return len(self._pieces[token])


def read_ranks(name: str) -> Ranks:
    """What the encoding of this machine is.

    Raises:
        MissingExtraError: tiktoken is not installed.
        DataError: there is no such encoding, or its ranks cannot be had.
    """
    return _ranks(_pieces(_load(name)))


def _load(name: str) -> "tiktoken.Encoding":
    try:
        import tiktoken
    except ImportError:
        raise MissingExtraError("tiktoken", f"The text tokenizer {name}", "tiktoken") from None
    known = tiktoken.list_encoding_names()
    try:
        return tiktoken.get_encoding(f"{name}{OFFLINE}" if f"{name}{OFFLINE}" in known else name)
    except Exception as error:  # the library's own checks, and its download's
        if name not in known:
            raise DataError(
                f"tiktoken has no encoding {name!r}. {did_you_mean(name, known)}"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
        raise DataError(
            f"The ranks of {name} cannot be loaded: {reason}.",
            hint="tiktoken downloads them once; TIKTOKEN_CACHE_DIR names a folder that has them.",
        ) from None


@lru_cache(maxsize=2)
def _pieces(encoding: "tiktoken.Encoding") -> list[bytes]:
    """The bytes of each id; none of special tokens and of ids that stand for nothing."""
    pieces = []
    for token in range(encoding.max_token_value + 1):
        try:
            is_text = not encoding.is_special_token(token)
            pieces.append(encoding.decode_single_token_bytes(token) if is_text else b"")
        except KeyError:
            pieces.append(b"")
    return pieces


def _ranks(pieces: list[bytes]) -> Ranks:
    content = "\n".join(piece.hex() for piece in pieces)
    return Ranks(num_ids=len(pieces), sha256=hashlib.sha256(content.encode()).hexdigest())
