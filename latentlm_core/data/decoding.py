"""From indices of a source to uint8 views of its images, in workers or here.

The result is the same for any number of workers: what is decoded, and in which order, is decided
by the caller; a broken item is reported, never replaced, by the worker that met it. Workers are
processes, or threads of this one, which need no start and read JPEGs as fast. Of a source that is
read in blocks they are threads in any case, which share the blocks.

Axes: n examples, V views of each, S image size.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentlm_core.data.base import Example, Image, Question, SkippedItem, Source
from latentlm_core.data.blocks import reading_ahead, streamed
from latentlm_core.data.media import center_crop
from latentlm_core.data.pipeline import ahead
from latentlm_core.errors import DataError
from latentlm_core.runtime import generator

Views = Callable[[Example], Sequence[Image]]
"""What is made of an example: V images of one size."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A batch as it leaves a worker.

    Attributes:
        views: (n, V, S, S, 3) uint8.
        labels: (n,) int64, -1 where there is none.
        captions: n texts, None where there is none.
        keys: n keys.
        indices: (n,) int64, the examples' places in the source.
        skipped: what was asked for and is broken.
        questions: n tuples; left out where a batch trains a tokenizer.
    """

    views: Tensor
    labels: Tensor
    captions: tuple[str | None, ...]
    keys: tuple[str, ...]
    indices: Tensor
    skipped: tuple[SkippedItem, ...]
    questions: tuple[tuple[Question, ...], ...] = ()

    def pin_memory(self) -> Self:
        """The same with views that a GPU takes over without making the host wait."""
        return replace(self, views=self.views.pin_memory())


@dataclass(frozen=True, slots=True)
class CenterView:
    """One view of an example: its centre crop, (size, size, 3)."""

    size: int

    def __call__(self, example: Example) -> Sequence[Image]:
        """The only view."""
        return (center_crop(example.image, self.size),)


def decode(
    source: Source,
    views: Views,
    batches: Iterable[list[int]],
    num_workers: int = 0,
    num_threads: int = 0,
    pinned: bool = False,
) -> Generator[Decoded, None, None]:
    """Decode batches of indices, in order, some batches ahead where there are workers.

    Closing this ends the workers.

    Args:
        source: what the indices point into.
        views: what is made of each example; it travels to the workers.
        batches: indices of each batch; may be endless.
        num_workers: processes, or threads where the source is read in blocks.
        num_threads: threads at most where there are no processes; 0 of both decodes here, one
            batch at a time.
        pinned: put the views into pinned memory, for a GPU.
    """
    coming = reading_ahead(source, iter(batches))
    if num_workers and streamed(source) is None:
        yield from DataLoader(
            _Reader(source, views),
            batch_sampler=coming,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pinned,
            generator=generator("decode"),  # else the loader draws from the global one
        )
        return
    reader = _Reader(source, views, pinned)
    if threads := num_workers or num_threads:
        yield from ahead(reader.__getitems__, coming, threads, 2 * threads)
    else:
        yield from map(reader.__getitems__, coming)


class _Reader(Dataset[Decoded]):
    """A source as a worker sees it."""

    def __init__(self, source: Source, views: Views, pinned: bool = False) -> None:
        self._source = source
        self._views = views
        self._pinned = pinned

    def __getitems__(self, indices: Sequence[int]) -> Decoded:
        kept: list[tuple[int, Example, Sequence[Image]]] = []
        skipped = []
        for index in indices:
            try:
                example = self._source[index]
            except DataError as error:
                skipped.append(SkippedItem(index=index, reason=str(error)))
            else:
                kept.append((index, example, self._views(example)))
        examples = [example for _, example, _ in kept]
        labels = [-1 if example.label is None else example.label for example in examples]
        images = np.array([shown for _, _, shown in kept], np.uint8)
        decoded = Decoded(
            views=torch.from_numpy(images),
            labels=torch.tensor(labels, dtype=torch.int64),
            captions=tuple(example.caption for example in examples),
            keys=tuple(example.key for example in examples),
            indices=torch.tensor([index for index, _, _ in kept], dtype=torch.int64),
            skipped=tuple(skipped),
            questions=tuple(example.questions for example in examples),
        )
        return decoded.pin_memory() if self._pinned else decoded


def _as_it_is(batch: Any) -> Any:
    return batch
