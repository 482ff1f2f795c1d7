"""The parts of a mix: where documents of words and pictures come from.

A part is asked for the document of a place in its endless run, and gets a generator for all that
is drawn anew at each visit (sigma's noise, the direction, the stretch of a long text).

Axes: T latent positions, C latent channels.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.data.document_format import DocumentFormat, ImageSpan, TextSpan
from latentlm_core.data.documents import Document
from latentlm_core.data.order import EpochOrder
from latentlm_core.data.shards import LatentRecord, LatentSet
from latentlm_core.data.texts import EndlessTexts
from latentlm_core.errors import DataError
from latentlm_core.tokenizers.base import LatentStats

NUM_LOOKED_AT = 64
"""Examples of a set that are looked at before a run: whether any has words."""
NUM_KEPT = 64
"""Texts whose ids are kept, so that a few books are not encoded for every stretch of theirs."""
DRAW, DESCRIBE, ASK = range(3)
"""Places of the weights of ``Directions``."""
T = TypeVar("T")

_CAPTIONS = "Tokenize data with captions, such as coloured-digits or a folder with .txt."


class Directions(Config):
    """How often a pair is read in which direction, as weights."""

    draw: float = Field(default=2.0, ge=0.0)
    """The image after its caption."""
    describe: float = Field(default=1.0, ge=0.0)
    """The caption after its image."""
    ask: float = Field(default=1.0, ge=0.0)
    """A question about the image, and its answer; of images that have any."""


class Part(Protocol):
    """A source of documents."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def document(self, place: int, source: torch.Generator) -> Document:
        """The document at a place of the endless run, as ``source`` draws it."""

    def held_out(self, source: torch.Generator) -> Iterator[Document]:
        """What is never trained on."""


class TextPart:
    """Texts alone.

    Args:
        texts: the data set.
        document_format: how documents are written.
        row_length: elements of a document at most; of a longer text a stretch is drawn.
    """

    def __init__(
        self, texts: EndlessTexts, document_format: DocumentFormat, row_length: int
    ) -> None:
        self.name = texts.name
        self._texts, self._format, self._row_length = texts, document_format, row_length
        self._ids = lru_cache(maxsize=NUM_KEPT)(
            lambda text: array("i", document_format.text_ids(text))
        )

    def document(self, place: int, source: torch.Generator) -> Document:
        """See ``Part``."""
        text, key = self._texts[place]
        ids = self._ids(text)
        spare = max(len(ids) - self._row_length, 0)
        start = int(torch.randint(spare + 1, (), generator=source))
        return self._format.stretch(ids[start : start + self._row_length], key)

    def held_out(self, source: torch.Generator) -> Iterator[Document]:
        """Every stretch of the texts that are held out."""
        for text, key in self._texts.held_out:
            yield from self._format.stretches(text, key, self._row_length)


class CaptionedImages:
    """Images of a latent set, with their words.

    Args:
        latents: the set; its latents have one grid.
        stats: normalisation.
    """

    def __init__(self, latents: LatentSet, stats: LatentStats) -> None:
        self.latents = latents
        self.stats = stats
        self.name = latents.manifest.name

    def __len__(self) -> int:
        return len(self.latents)

    def record(self, index: int, source: torch.Generator) -> LatentRecord:
        """An example, in any of its variants."""
        variant = int(torch.randint(self.latents.num_variants, (), generator=source))
        return self.latents.read_one(index, variant)

    def picture(self, record: LatentRecord, source: torch.Generator) -> Tensor:
        """Normalised latents (T, C), drawn from their posterior."""
        return self.latents.draw(record, self.stats, source)

    def some(self) -> Iterator[LatentRecord]:
        """Some examples, from all over the set."""
        step = -(-len(self) // NUM_LOOKED_AT)
        return (self.latents.read_one(index) for index in range(0, len(self), step))

    def corpus(self) -> Iterator[str]:
        """All captions, questions and answers."""
        for index in range(len(self)):
            yield from captions_of(self.latents.caption(index))
            for question in self.latents.questions(index):
                yield from question


class PairPart:
    """Images with captions and questions, in several directions.

    An image without words for any of them is drawn as one whose caption was dropped.

    Args:
        captioned: the images.
        document_format: how documents are written.
        directions: how often which.
        max_questions: of a document, in an order that is drawn anew.
        condition_drop: share of the images to draw whose caption is dropped.
        learn_leading: whether an image that comes before its text is learned too.
        held_out: share of the images.
        seed: of the run.

    Raises:
        DataError: no example has what the directions want.
    """

    def __init__(
        self,
        captioned: CaptionedImages,
        document_format: DocumentFormat,
        directions: Directions,
        *,
        max_questions: int,
        condition_drop: float,
        learn_leading: bool,
        held_out: float,
        seed: int,
    ) -> None:
        self.name = captioned.name
        self._captioned, self._format, self._directions = captioned, document_format, directions
        self._max_questions = max_questions
        self._condition_drop, self._learn_leading = condition_drop, learn_leading
        self._order = EpochOrder(
            len(captioned), held_out, seed, 1, captioned.name, captioned.latents.blocks
        )
        self._encode = lru_cache(maxsize=1 << 16)(document_format.text.encode)
        self._check()

    def document(self, place: int, source: torch.Generator) -> Document:
        """See ``Part``."""
        record = self._captioned.record(self._order[place], source)
        chances = self._chances(record)
        if not chances.any():
            return self._draw(record, None, source)
        direction = int(torch.multinomial(chances, 1, generator=source))
        return self._in_direction(direction, record, source, self._condition_drop)

    def held_out(self, source: torch.Generator) -> Iterator[Document]:
        """Each image in every direction that is trained."""
        for index in self._order.held_out.tolist():
            record = self._captioned.latents.read_one(index)
            for direction in self._chances(record).nonzero()[:, 0].tolist():
                yield self._in_direction(direction, record, source, condition_drop=0.0)

    def _in_direction(
        self, direction: int, record: LatentRecord, source: torch.Generator, condition_drop: float
    ) -> Document:
        if direction == ASK:
            order = torch.randperm(len(record.questions), generator=source)
            asked = [record.questions[place] for place in order[: self._max_questions].tolist()]
            return self._describe(record, self._format.answered(asked), source)
        caption = _any_of(captions_of(record.caption), source)
        if direction == DESCRIBE:
            return self._describe(record, [TextSpan(self._encode(caption))], source)
        is_dropped = bool(torch.rand((), generator=source) < condition_drop)
        return self._draw(record, None if is_dropped else caption, source)

    def _draw(self, record: LatentRecord, caption: str | None, source: torch.Generator) -> Document:
        words = self._format.nothing if caption is None else TextSpan(self._encode(caption))
        picture = ImageSpan(self._captioned.picture(record, source))
        return self._format.document([words, picture], record.key)

    def _describe(
        self, record: LatentRecord, words: Sequence[TextSpan], source: torch.Generator
    ) -> Document:
        picture = ImageSpan(self._captioned.picture(record, source), learn=self._learn_leading)
        return self._format.document([picture, *words], record.key)

    def _chances(self, record: LatentRecord) -> Tensor:
        """Weights of drawing, describing and asking, zero where an example has no words for it."""
        weights = self._directions
        has_caption, has_questions = bool(captions_of(record.caption)), bool(record.questions)
        return torch.tensor(
            [
                weights.draw * has_caption,
                weights.describe * has_caption,
                weights.ask * has_questions,
            ]
        )

    def _check(self) -> None:
        if not any(self._chances(record).any() for record in self._captioned.some()):
            raise DataError(
                f"{self.name} has no captions and no questions for the directions that are wanted.",
                hint=_CAPTIONS,
            )


class ComposedPart:
    """Interleaved documents: captions with their images, several in a row.

    Args:
        captioned: the images.
        document_format: how documents are written.
        max_images: of a document; it has at least two.
        held_out: share of the images.
        seed: of the run.

    Raises:
        DataError: no example has a caption.
    """

    def __init__(
        self,
        captioned: CaptionedImages,
        document_format: DocumentFormat,
        max_images: int,
        held_out: float,
        seed: int,
    ) -> None:
        self.name = f"interleaved:{captioned.name}"
        self._captioned, self._format, self._max_images = captioned, document_format, max_images
        self._order = EpochOrder(
            len(captioned), held_out, seed, 1, captioned.name, captioned.latents.blocks
        )
        if not any(captions_of(record.caption) for record in captioned.some()):
            raise DataError(
                f"{captioned.name} has no captions to compose documents of.", hint=_CAPTIONS
            )

    def document(self, place: int, source: torch.Generator) -> Document:
        """See ``Part``."""
        train = self._order.train
        others = torch.randint(len(train), (self._count(source) - 1,), generator=source)
        return self._compose([self._order[place], *train[others].tolist()], source)

    def held_out(self, source: torch.Generator) -> Iterator[Document]:
        """Two images of those that are held out at a time."""
        indices = self._order.held_out.tolist()
        for pair in zip(indices[::2], indices[1::2], strict=False):
            yield self._compose(pair, source)

    def _count(self, source: torch.Generator) -> int:
        return int(torch.randint(2, self._max_images + 1, (), generator=source))

    def _compose(self, indices: Iterable[int], source: torch.Generator) -> Document:
        pieces: list[TextSpan | ImageSpan] = []
        keys = []
        for index in indices:
            record = self._captioned.record(index, source)
            captions = captions_of(record.caption)
            if captions:
                pieces.append(TextSpan(self._format.text.encode(_any_of(captions, source))))
            pieces.append(ImageSpan(self._captioned.picture(record, source), learn=bool(captions)))
            keys.append(record.key)
        return self._format.document(pieces, "+".join(keys))


def captions_of(caption: str | None) -> list[str]:
    """The captions of an example: the lines of its text."""
    return [line.strip() for line in (caption or "").splitlines() if line.strip()]


def _any_of(choices: Sequence[T], source: torch.Generator) -> T:
    return choices[int(torch.randint(len(choices), (), generator=source))]
