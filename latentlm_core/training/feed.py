"""Batches on their way to the device.

On a GPU a thread makes them some steps ahead, puts them into pinned memory and starts their copy,
so that a step finds its batch there. On a CPU each is made when it is asked for, which is faster:
two pools of threads would compete for the processors.

Notable choices:
- the thread decides nothing: batch k is a function of (seed, k), and what was made ahead is thrown
  away when the run stops or goes elsewhere, so a run goes on with the batch after the last one that
  it trained on;
- a stream is asked by one thread at a time, for it may hold the place of a file. Who wants a batch
  of its own (a bad step once more, validation) waits for the thread's to be made;
- an error in the thread reaches the trainer as itself, in the place of the batch.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from latentlm_core.training.parallel import StepShare
from latentlm_core.training.tasks import Batch, BatchStream

AHEAD = 4
"""Steps whose batches are made while a GPU computes."""

Item = TypeVar("Item")


class Feed:
    """One process's parts of the batches of a run, on the device; to be closed.

    Args:
        stream: the batches.
        share: what this process takes of each step's.
        device: where they are wanted.
        ahead: steps that a thread makes ahead; None: as the device wants it.
    """

    def __init__(
        self, stream: BatchStream, share: StepShare, device: torch.device, ahead: int | None = None
    ) -> None:
        self._stream, self._share, self._device = stream, share, device
        self._ahead = steps_ahead(device) if ahead is None else ahead
        self._lock = threading.Lock()
        self._steps = made_ahead(list[Batch], 0)

    def close(self) -> None:
        """End the thread, if there is one."""
        self._steps.close()

    def seek(self, step: int) -> None:
        """Go on with the batches of a step, counted in those of the run."""
        self._steps.close()
        self._steps = made_ahead(self._maker(step), self._ahead)

    def take(self) -> list[Batch]:
        """The parts of the next step's batch."""
        return next(self._steps)

    def again(self, step: int) -> list[Batch]:
        """Those of any step, made anew; what ``take`` gives next is not changed by it."""
        return self._maker(step)()

    def held_out(self) -> Iterator[Batch]:
        """The stream's held-out batches, on the host."""
        batches = iter(self._stream.held_out())
        while True:
            with self._lock:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _maker(self, step: int) -> Callable[[], list[Batch]]:
        """What makes the parts of this step, when it is called again those of the next one."""
        batches = self._stream.batches(self._share.numbers(step), self._share.rows)

        def make() -> list[Batch]:
            with self._lock:
                parts = [next(batches) for _ in self._share.indices]
            return [part.to(self._device) for part in parts]

        return make


def steps_ahead(device: torch.device) -> int:
    """How many steps ahead of a device batches are worth making."""
    return AHEAD if device.type == "cuda" else 0


def made_ahead(make: Callable[[], Item], ahead: int) -> Generator[Item, None, None]:
    """What calls of ``make`` return, without end; a thread calls it ``ahead`` times ahead.

    Closing this ends the thread: what it makes is finished, what it was to make is not begun.
    """
    if not ahead:
        while True:
            yield make()
    maker = ThreadPoolExecutor(1, "batches")
    try:
        waiting = deque(maker.submit(make) for _ in range(ahead))
        while True:
            made = waiting.popleft().result()
            waiting.append(maker.submit(make))
            yield made
    finally:
        maker.shutdown(cancel_futures=True)
