"""Stages that overlap: reading ahead of the encoder, encoding, and what the encoder waits for.

Notable choices:
    what is read comes in the order in which it is asked for, whatever the number of threads;
    how far ahead is found out: each time that nothing is ready, one piece more is asked for, and a
    thread more begins. Where the encoder is what takes the time, one thread or two read, and leave
    it the processors;
    what is ahead is bounded, so memory stays flat;
    an error reaches who takes, as itself, in the place of its piece.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

MAX_READERS = 8
"""Threads; decoders let go of the interpreter for most of their time, but not for all of it."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def num_readers() -> int:
    """Threads that may read: one for each processor that this process may use, within reason."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return min(len(os.sched_getaffinity(0)), MAX_READERS)
    return min(os.cpu_count() or 1, MAX_READERS)


def ahead(
    make: Callable[[Item], Made], items: Iterable[Item], num_threads: int, depth: int
) -> Generator[Made, None, None]:
    """``map(make, items)`` by threads, ahead of who takes the results.

    Closing this ends the threads: what they make is finished, what they were to make is not begun.

    Args:
        make: is called in threads, so it runs no kernels of PyTorch: each thread would have a pool
            of its own for them, and these would compete for the processors.
        items: may be endless; they are taken in the thread that takes the results.
        num_threads: at most.
        depth: results that are ready or in the making, at most.
    """
    makers = ThreadPoolExecutor(num_threads, "ahead")
    coming, waiting, wanted = iter(items), deque[Future[Made]](), 1

    def ask() -> None:
        missing = islice(coming, wanted - len(waiting))
        waiting.extend(makers.submit(make, item) for item in missing)

    try:
        ask()
        while waiting:
            if wanted < depth and not waiting[0].done():
                wanted += 1
                ask()
            made = waiting.popleft().result()
            ask()
            yield made
    finally:
        makers.shutdown(cancel_futures=True)


def one_behind(items: Iterable[Item], device: torch.device) -> Iterator[Item]:
    """The same items; of a GPU each when the one after it is begun, so that it always has work."""
    if device.type != "cuda":
        yield from items
        return
    held: list[Item] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


class Landing:
    """Tensors on their way to the host, which does not wait for them yet.

    Args:
        tensors: of any one device; None stays None.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = [
            None if tensor is None else tensor.to("cpu", non_blocking=tensor.is_cuda)
            for tensor in tensors
        ]
        devices = {tensor.device for tensor in tensors if tensor is not None}
        self._events = [
            torch.cuda.current_stream(device).record_event()
            for device in devices
            if device.type == "cuda"
        ]

    def wait(self) -> list[Tensor | None]:
        """The tensors on the host, when they are there."""
        for event in self._events:
            event.synchronize()
        return self._tensors


@dataclass(slots=True)
class Throughput:
    """How fast items were encoded, and how long the encoder stood still.

    Attributes:
        items: that were encoded, the broken ones among them.
        seconds: from the first to the last one written.
        waited_to_read: seconds of these, until a batch was there. Of a GPU at most: it may still
            have been at work on the batch before.
        waited_to_write: until a shard could be handed over, and at the end until it was written.
    """

    items: int = 0
    seconds: float = 0.0
    waited_to_read: float = 0.0
    waited_to_write: float = 0.0
    _start: float = field(default=0.0, repr=False)

    def start(self) -> None:
        """Measure from now on."""
        self._start = time.perf_counter()

    def count(self, items: int) -> None:
        """So many items more have been encoded by now."""
        self.items += items
        self.seconds = time.perf_counter() - self._start

    def reading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; the time until each is there counts."""
        coming = iter(batches)
        while True:
            start = time.perf_counter()
            batch = list(islice(coming, 1))
            self.waited_to_read += time.perf_counter() - start
            if not batch:
                return
            yield batch[0]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The time in the block counts."""
        start = time.perf_counter()
        yield
        self.waited_to_write += time.perf_counter() - start

    def merge(self, others: Sequence["Throughput"]) -> None:
        """Become that of some processes at once; one that had nothing to do does not count."""
        busy = [other for other in others if other.items] or [self]
        self.items = sum(other.items for other in busy)
        self.seconds = max(other.seconds for other in busy)
        self.waited_to_read = sum(other.waited_to_read for other in busy) / len(busy)
        self.waited_to_write = sum(other.waited_to_write for other in busy) / len(busy)

    @property
    def shares(self) -> dict[str, float]:
        """In which the encoder waited, of the time."""
        return {
            "data_wait_share": round(self.waited_to_read / self.seconds, 4),
            "write_wait_share": round(self.waited_to_write / self.seconds, 4),
        }
