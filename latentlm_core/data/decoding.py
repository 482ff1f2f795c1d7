"""From indices of a source to uint8 views of its images, in workers or here.

The result is the same for any number of workers: what is decoded, and in which order, is decided
by the caller; a broken item is reported, never replaced, by the worker that met it. Workers are
processes; of a source that is read in blocks they are threads, which share the blocks.

Axes: n examples, V views of each, S image size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentlm_core.data.base import Example, Image, Question, SkippedItem, Source
from latentlm_core.data.blocks import reading_ahead, streamed
from latentlm_core.data.media import center_crop
from latentlm_core.errors import DataError
from latentlm_core.runtime import generator

Batch = TypeVar("Batch")
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


@dataclass(frozen=True, slots=True)
class CenterView:
    """One view of an example: its centre crop, (size, size, 3)."""

    size: int

    def __call__(self, example: Example) -> Sequence[Image]:
        """The only view."""
        return (center_crop(example.image, self.size),)


def decode(
    source: Source, views: Views, batches: Iterable[list[int]], num_workers: int = 0
) -> Iterator[Decoded]:
    """Decode batches of indices, in order, some batches ahead where there are workers.

    Args:
        source: what the indices point into.
        views: what is made of each example; it travels to the workers.
        batches: indices of each batch; may be endless.
        num_workers: processes or threads; 0 decodes here, one batch at a time.
    """
    reader = _Reader(source, views)
    coming = reading_ahead(source, iter(batches))
    if num_workers == 0:
        yield from map(reader.__getitems__, coming)
        return
    if streamed(source) is not None:
        yield from _in_threads(reader, coming, num_workers)
        return
    yield from DataLoader(
        reader,
        batch_sampler=coming,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=generator("decode"),  # else the loader draws from the global one
    )


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each decoded by a thread while the one before it is used.

    Decoding is Pillow, which lets go of the interpreter, and numpy: a thread that ran kernels of
    PyTorch would have a thread pool of its own, and the two would compete for the processors.
    """
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _in_threads(
    reader: "_Reader", batches: Iterator[list[int]], num_workers: int
) -> Iterator[Decoded]:
    """Decode batches in order, two for each thread ahead."""
    with ThreadPoolExecutor(num_workers) as workers:
        started = deque(
            workers.submit(reader.__getitems__, indices)
            for indices in islice(batches, 2 * num_workers)
        )
        while started:
            yield started.popleft().result()
            for indices in islice(batches, 1):
                started.append(workers.submit(reader.__getitems__, indices))


class _Reader(Dataset[Decoded]):
    """A source as a worker sees it."""

    def __init__(self, source: Source, views: Views) -> None:
        self._source = source
        self._views = views

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
        return Decoded(
            views=torch.from_numpy(images),
            labels=torch.tensor(labels, dtype=torch.int64),
            captions=tuple(example.caption for example in examples),
            keys=tuple(example.key for example in examples),
            indices=torch.tensor([index for index, _, _ in kept], dtype=torch.int64),
            skipped=tuple(skipped),
            questions=tuple(example.questions for example in examples),
        )


def _as_it_is(batch: Any) -> Any:
    return batch
