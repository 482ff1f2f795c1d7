"""Blocks: items of a source that are read together, and an order that reads each block once.

A block is a row group of a parquet file, a stretch of an archive, a shard of latents. Where items
come in blocks, a permutation of all of them would read a block for every item; here the blocks of
an epoch are permuted, and then the items inside a window of neighbouring blocks. Both follow from
the seed, so a place of the order is arithmetic, and resuming at it costs the blocks of one window.

Axes: N items.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Protocol

import torch

from latentlm_core.data.base import AnySource
from latentlm_core.runtime import generator

WINDOW_BYTES = 128 * 2**20
"""Blocks inside which items are shuffled take about this (one block at least)."""
MAX_AHEAD = 256
"""Batches that are looked at ahead of their use."""


def _nothing(blocks: Sequence[int]) -> None:
    """What is told to whom it does not concern."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How N items lie in blocks.

    Attributes:
        items: the items of each block, block after block.
        num_bytes: of each block.
        numbers: what each block is called where it is read.
        files: the blocks of each file that is read forwards; such blocks stay together.
        window_bytes: of the blocks inside which items are shuffled.
        expect: is told of blocks that will be wanted soon.
    """

    items: tuple[range, ...]
    num_bytes: tuple[int, ...]
    numbers: tuple[int, ...]
    files: tuple[range, ...]
    window_bytes: int = WINDOW_BYTES
    expect: Callable[[Sequence[int]], None] = field(default=_nothing, compare=False)

    @classmethod
    def of_counts(cls, counts: Sequence[int], num_bytes: Sequence[int]) -> "Blocks":
        """Blocks that are read at random, by how many items and bytes each has."""
        ends = list(accumulate(counts))
        items = tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))
        each = range(len(counts))
        return cls(items, tuple(num_bytes), tuple(each), tuple(range(k, k + 1) for k in each))

    def holding(self, item: int) -> int:
        """The block in which an item lies."""
        return bisect_right(self.items, item, key=attrgetter("start")) - 1

    def part(self, kept: range) -> "Blocks":
        """The blocks of neighbouring items, which are counted from 0."""
        cut = [range(max(i.start, kept.start), min(i.stop, kept.stop)) for i in self.items]
        left = [k for k, items in enumerate(cut) if items]
        place = {k: new for new, k in enumerate(left)}
        files = [[place[k] for k in file if k in place] for file in self.files]
        return replace(
            self,
            items=tuple(range(cut[k].start - kept.start, cut[k].stop - kept.start) for k in left),
            num_bytes=tuple(self.num_bytes[k] for k in left),
            numbers=tuple(self.numbers[k] for k in left),
            files=tuple(range(file[0], file[-1] + 1) for file in files if file),
        )


class BlockOrder(Sequence[int]):
    """One epoch: files shuffled, then the items inside each window of blocks.

    Args:
        blocks: how the items lie.
        seed: of the run.
        epoch: which one.
    """

    def __init__(self, blocks: Blocks, seed: int, epoch: int) -> None:
        self._blocks = blocks
        self._key = (seed, "order", epoch)
        order = torch.randperm(len(blocks.files), generator=generator(*self._key)).tolist()
        self._windows = list(_windows(blocks, [k for file in order for k in blocks.files[file]]))
        sizes = [sum(len(blocks.items[k]) for k in window) for window in self._windows]
        self._starts = [0, *accumulate(sizes)]
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> int:  # type: ignore[override]  # no slices
        """The item at a position of the epoch."""
        window = bisect_right(self._starts, position) - 1
        return self._shuffled(window)[position - self._starts[window]]

    def _shuffle(self, window: int) -> list[int]:
        wanted = [k for blocks in self._windows[window : window + 2] for k in blocks]
        self._blocks.expect([self._blocks.numbers[k] for k in wanted])
        items = [item for k in self._windows[window] for item in self._blocks.items[k]]
        order = torch.randperm(len(items), generator=generator(*self._key, "window", window))
        return [items[place] for place in order.tolist()]


def _windows(blocks: Blocks, order: Sequence[int]) -> Iterator[list[int]]:
    window: list[int] = []
    size = 0
    for k in order:
        if window and size + blocks.num_bytes[k] > blocks.window_bytes:
            yield window
            window, size = [], 0
        window.append(k)
        size += blocks.num_bytes[k]
    if window:
        yield window


class BlockReader(Protocol):
    """What holds the blocks of a source."""

    @property
    def blocks(self) -> Blocks:
        """How its rows lie."""

    @property
    def memory_bytes(self) -> int:
        """What the blocks that it holds may take."""

    def expect(self, numbers: Sequence[int]) -> None:
        """Begin to read these blocks."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """Where the items of a source come from that is read in blocks (``SOURCE.streamed``).

    Attributes:
        reader: holds the blocks.
        rows: the row of each item.
    """

    reader: BlockReader
    rows: Sequence[int]

    def subset(self, indices: Sequence[int]) -> "Streamed":
        """Some of the items, in the order given."""
        if isinstance(indices, range) and isinstance(self.rows, range):
            return Streamed(self.reader, self.rows[indices.start : indices.stop : indices.step])
        return Streamed(self.reader, [self.rows[index] for index in indices])

    def blocks(self, indices: Sequence[int]) -> list[int]:
        """The blocks in which some items lie, in their order."""
        find = self.reader.blocks.holding
        return sorted({find(self.rows[index]) for index in indices})


def streamed(source: AnySource[object]) -> Streamed | None:
    """Where a source is read in blocks; None of one that is read item by item."""
    return getattr(source, "streamed", None)


def epoch_order(source: AnySource[object], seed: int, epoch: int) -> Sequence[int]:
    """The indices of a source in the order of an epoch."""
    found = streamed(source)
    if found is not None and isinstance(found.rows, range) and found.rows.step == 1:
        return BlockOrder(found.reader.blocks.part(found.rows), seed, epoch)
    return torch.randperm(len(source), generator=generator(seed, "order", epoch)).tolist()


def reading_ahead(source: AnySource[object], batches: Iterator[list[int]]) -> Iterator[list[int]]:
    """The same batches of indices; the blocks of those to come are read meanwhile.

    As far ahead as half of the memory of the blocks goes, which leaves the other half to what is
    in use.
    """
    found = streamed(source)
    if found is None:
        yield from batches
        return
    sizes = found.reader.blocks.num_bytes
    queue: deque[tuple[list[int], list[int]]] = deque()
    waiting = next(batches, None)
    while queue or waiting is not None:
        while waiting is not None and len(queue) < MAX_AHEAD:
            blocks = found.blocks(waiting)
            wanted = {k for _, others in queue for k in others} | set(blocks)
            if queue and sum(sizes[k] for k in wanted) > found.reader.memory_bytes // 2:
                break
            found.reader.expect(blocks)
            queue.append((waiting, blocks))
            waiting = next(batches, None)
        yield queue.popleft()[0]
