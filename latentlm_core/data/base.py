"""What every source of media promises, and how its broken items are accounted for.

A source is finite and read at random: shuffling, sharding and resuming are arithmetic on indices.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from latentlm_core.config import Config
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.progress import SILENT, Progress

Image = npt.NDArray[np.uint8]
"""An image (H, W, 3), RGB."""
Samples = npt.NDArray[np.float32]
"""Audio (S,), one channel, in [-1, 1]."""


class Question(NamedTuple):
    """What may be asked of an image, and what is true of it."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    """One item of a source.

    Attributes:
        image: uint8 (H, W, 3), RGB, of the size that it has in the source.
        label: index into the source's classes, None where there is none.
        caption: what the item shows, in words; each of several lines is a caption of its own.
        key: name of the item inside its source, the same on every machine.
        questions: what may be asked of it.
    """

    image: Image
    label: int | None
    caption: str | None
    key: str
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording of a source.

    Attributes:
        samples: float32 (S,), one channel, in [-1, 1], as loud as it was recorded.
        sample_rate: in Hz, of the recording.
        text: its transcript, None where there is none.
        speaker: index into the source's classes, None where it is not known.
        key: name of the item inside its source, the same on every machine.
    """

    samples: Samples
    sample_rate: int
    text: str | None
    speaker: int | None
    key: str


Item_co = TypeVar("Item_co", covariant=True)


class AnySource(Protocol[Item_co]):
    """A finite set of items in a fixed order."""

    @property
    def name(self) -> str:
        """What the source is called in messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label, of the speakers in a source of speech; may be empty."""

    def __len__(self) -> int:
        """Number of items, the broken ones included."""

    def __getitem__(self, index: int) -> Item_co:
        """Item ``index`` of 0 to ``len - 1``.

        Raises:
            DataError: it is broken; the message names it by its key.
        """


Source = AnySource[Example]
"""Images."""
SpeechSource = AnySource[Clip]
"""Recordings, whose classes are the speakers."""


MAX_BYTES = 1_000_000_000
"""Larger files of an item are refused, for they are read as a whole."""


def whole_file(content: Path | bytes, where: str) -> bytes:
    """What is encoded in a file, or in its bytes.

    Args:
        content: the file, or its bytes.
        where: name of the item for messages, its key as a rule.

    Raises:
        DataError: it is too large.
        CorruptFileError: it is missing or empty, or cannot be read.
    """
    if isinstance(content, Path):
        content = _read(content, where)
    if not content:
        raise CorruptFileError(f"{where} is empty.")
    return content


def _read(path: Path, where: str) -> bytes:
    try:
        if not os.path.isfile(path):
            raise CorruptFileError(f"{where} is not there, or no file.")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{where} is larger than the {MAX_BYTES} bytes allowed.")
        return path.read_bytes()
    except OSError as error:
        raise CorruptFileError(f"{where} cannot be read: {error.strerror or error}.") from None


MAX_BROKEN_SHARE = 0.01
"""What part of a source may be broken."""
LEAST_BROKEN = 10
"""How many of its items may be broken however small a source is."""
NUM_LISTED = 5
"""How many broken items are shown one by one."""


def num_allowed_broken(total: int, share: float = MAX_BROKEN_SHARE) -> int:
    """How many items of a source of ``total`` may be broken, as long as not all are."""
    return max(LEAST_BROKEN, int(share * total))


class SkippedItem(Config):
    """An item that was left out."""

    index: int
    """Its place in the source."""
    reason: str
    """Why; begins with the item's key."""


class SkipLog:
    """The broken items of one source, and the bound on how many there may be.

    Args:
        source: whose items they are.
        progress: hears of the first few.
        share: what part of the source may be broken.
    """

    def __init__(
        self,
        source: AnySource[object],
        progress: Progress = SILENT,
        share: float = MAX_BROKEN_SHARE,
    ) -> None:
        self._source = source
        self._progress = progress
        self._allowed = num_allowed_broken(len(source), share)
        self._items: dict[int, SkippedItem] = {}

    @property
    def items(self) -> tuple[SkippedItem, ...]:
        """Everything that was skipped, by index."""
        return tuple(self._items[index] for index in sorted(self._items))

    def extend(self, items: Iterable[SkippedItem]) -> None:
        """Account for broken items, as ``add`` does for one."""
        for item in items:
            self.add(item)

    def add(self, item: SkippedItem) -> None:
        """Account for one broken item; the same one counts once.

        Raises:
            DataError: more are broken than may be, or all of them; lists the first ones.
        """
        if item.index in self._items:
            return
        self._items[item.index] = item
        count, total = len(self._items), len(self._source)
        if count > self._allowed or count == total:
            listed = "; ".join(known.reason.rstrip(".") for known in self.items[:NUM_LISTED])
            raise DataError(
                f"{self._source.name} has too many broken items: {count} of the {total} that it "
                f"has ({self._allowed} may be); the first: {listed}."
            )
        if count <= NUM_LISTED:
            self._progress.warn(f"Skipped: {item.reason}")
