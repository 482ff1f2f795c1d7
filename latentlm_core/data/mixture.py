"""Batches of a mix: text, pairs and interleaved documents, by weight.

    text:SPEC[=W]                      texts, as ``texts`` opens them
    LATENTS[=W]                        images of a latent set with captions, and questions
    interleaved:LATENTS[=W]            several of its captions and images in a document
    interleaved:LATENTS+FILE.jsonl[=W] documents of a file, whose images the set has

Parts are parted by commas. A weight is a share of the elements (tokens and latents); the paper's
mix of text, pairs and interleaved documents is 2 : 1 : 1.

How many documents of each part are in the batches before batch k follows from k alone, so a batch
is a function of (seed, its number), and a run goes on at a number.

A document of images that is longer than a row is left out, and the next one that fits stands in.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.data.documents import Document, pack
from latentlm_core.data.mix_parts import Directions, Part
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.draws import WHOLE, Share
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.text import TextConfig

NUM_MEASURED = 256
"""Documents from which the mean length of a part is told."""
NUM_TRIED = 1000
"""Documents in a row that may be too long before a run gives up."""
TEXT, INTERLEAVED = "text:", "interleaved:"


class MultimodalDataConfig(Config):
    """How batches are made of a mix of text and images."""

    kind: Literal["multimodal"] = "multimodal"
    """Documents of words and images."""
    batch_elements: int = Field(default=8192, ge=64)
    """Tokens and latents of a batch (a micro-batch, where gradients are accumulated), about."""
    row_length: int = Field(default=512, ge=8)
    """Elements of a packed row at most."""
    directions: Directions = Directions()
    """How often a pair is read in which direction."""
    max_questions: int = Field(default=4, ge=1)
    """Of an image that is asked about, one after the other in an order that is drawn anew."""
    condition_drop: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the images to draw whose caption is dropped, so that guidance works."""
    learn_leading_images: bool = False
    """Whether an image that comes before its text is learned as well, or only read."""
    max_images: int = Field(default=3, ge=2)
    """Of an interleaved document that is composed of pairs."""
    held_out: float = Field(default=0.02, ge=0.0, le=0.5)
    """Share of each part that is never trained on (at most 2,048): validation loss."""
    per_channel_stats: bool = False
    """Normalise each channel by its own statistics; the published code uses one scale for all."""
    text: TextConfig = TextConfig()
    """Bytes, a BPE that is trained on the mix, or a tokenizer that exists."""


@dataclass(frozen=True, slots=True)
class PartSpec:
    """A part of a mix as the user wrote it.

    Attributes:
        kind: text, pairs or interleaved.
        source: of text as ``texts`` opens it, else a latent set.
        documents: a .jsonl of interleaved documents; None composes them of pairs.
        weight: share of the elements, before weights are brought to a sum of one.
    """

    kind: Literal["text", "pairs", "interleaved"]
    source: str
    documents: str | None
    weight: float


def is_mix(spec: str) -> bool:
    """Whether a data spec is more than the name of one latent set."""
    return "," in spec or spec.startswith((TEXT, INTERLEAVED)) or _split_weight(spec)[1] is not None


def parse_mix(spec: str) -> tuple[PartSpec, ...]:
    """The parts of a mix, their weights summing to one.

    Raises:
        ConfigError: a part is empty, a weight is negative, or all are zero.
    """
    parts = [_parse_part(part.strip(), spec) for part in spec.split(",")]
    total = sum(part.weight for part in parts)
    if total <= 0:
        raise ConfigError(f"The weights of {spec} sum to zero; one part at least needs one.")
    return tuple(
        PartSpec(part.kind, part.source, part.documents, part.weight / total)
        for part in parts
        if part.weight
    )


class Mixture:
    """Batches of several parts (a ``training.tasks.BatchStream``).

    Args:
        parts: where documents come from.
        weights: share of the elements of each, summing to one.
        stats: normalisation of the latents, for who reads the attribute.
        config: how batches are made.
        seed: of the run.

    Attributes:
        stats: as given.
        rates: documents a batch of each part, on average.
        left_out: share of the documents of each part that are too long for a row.

    Raises:
        ConfigError: a batch is too small for every part, or a row for some part.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Sequence[float],
        stats: LatentStats,
        config: MultimodalDataConfig,
        seed: int,
    ) -> None:
        self.stats = stats
        self.config = config
        self._parts, self._seed = parts, seed
        lengths, left_out = zip(*map(self._measure, parts), strict=True)
        self.left_out: tuple[float, ...] = left_out
        self.rates = [
            config.batch_elements * weight / length
            for weight, length in zip(weights, lengths, strict=True)
        ]
        if max(self.rates) < 1:
            raise ConfigError(
                f"A batch of {config.batch_elements} elements holds no whole document of any part.",
                hint=f"Say --set data.batch_elements={round(max(lengths)) * len(parts)} or more.",
            )

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[SequenceBatch]:
        """A share of the batches of these numbers."""
        return (self.batch(number).share(*share) for number in numbers)

    def batch(self, number: int) -> SequenceBatch:
        """Training batch ``number`` of the endless run."""
        source = generator(self._seed, "batch", number)
        documents = [
            self._fitting(part, place, source)
            for part, rate in zip(self._parts, self.rates, strict=True)
            for place in range(_before(number, rate), _before(number + 1, rate))
        ]
        return pack(documents, self.config.row_length)

    def held_out(self) -> Iterator[SequenceBatch]:
        """The validation batches: the same draws each time, no dropped conditions."""
        for number, part in enumerate(self._parts):
            source = generator(self._seed, "held-out part", number)
            fitting = (one for one in part.held_out(source) if self._fits(one))
            for documents in _groups(fitting, self.config.batch_elements):
                yield pack(documents, self.config.row_length)

    def _fits(self, document: Document) -> bool:
        return len(document) <= self.config.row_length

    def _fitting(self, part: Part, place: int, source: torch.Generator) -> Document:
        """The document at a place, or the next one that fits in a row."""
        documents = (part.document(place + later, source) for later in range(NUM_TRIED))
        found = next(filter(self._fits, documents), None)
        if found is None:
            raise DataError(f"{NUM_TRIED} documents in a row of {part.name} are too long.")
        return found

    def _measure(self, part: Part) -> tuple[float, float]:
        """The mean length of the documents that fit in a row, and the share of the others."""
        source = generator(self._seed, "lengths", part.name)
        documents = [part.document(place, source) for place in range(NUM_MEASURED)]
        lengths = [len(document) for document in documents if self._fits(document)]
        if not lengths:
            shortest = min(map(len, documents))
            raise ConfigError(
                f"No document of {part.name} fits in a row of {self.config.row_length} elements.",
                hint=f"Say --set data.row_length={shortest} or more.",
            )
        return sum(lengths) / len(lengths), 1 - len(lengths) / NUM_MEASURED


def _before(number: int, rate: float) -> int:
    """Documents of a part in the batches before batch ``number``; the first batch has one."""
    return -int(-number * rate // 1)


def _groups(documents: Iterable[Document], num_elements: int) -> Iterator[list[Document]]:
    """Documents in groups of about so many elements."""
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if sum(map(len, group)) >= num_elements:
            yield group
            group = []
    if group:
        yield group


def _parse_part(part: str, mix: str) -> PartSpec:
    name, weight = _split_weight(part)
    share = 1.0 if weight is None else weight
    if not 0 <= share < float("inf"):
        raise ConfigError(f"The weight of {name} is {share:g}; it must be 0 or more, and finite.")
    if name.startswith(TEXT):
        spec = PartSpec("text", name.removeprefix(TEXT), None, share)
    elif name.startswith(INTERLEAVED):
        source, plus, documents = name.removeprefix(INTERLEAVED).partition("+")
        spec = PartSpec("interleaved", source, documents if plus else None, share)
    else:
        spec = PartSpec("pairs", name, None, share)
    if not spec.source or spec.documents == "":
        raise ConfigError(f"{mix!r} has an empty part; a mix is like text:FOLDER=2,latents/NAME=1.")
    return spec


def _split_weight(part: str) -> tuple[str, float | None]:
    """``NAME=2`` as its two sides; what follows a last = that is no number belongs to the name."""
    name, equals, number = part.rpartition("=")
    if not equals:
        return part, None
    try:
        return name, float(number)
    except ValueError:
        return part, None
