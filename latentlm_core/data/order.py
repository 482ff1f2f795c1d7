"""Which example stands where in an endless run, and batches made ahead of their use.

The order is a permutation per epoch that follows from the seed; the held-out examples are drawn
once, from the seed too. A place of the run is a number, so resuming is starting at a number.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from latentlm_core.errors import DataError
from latentlm_core.runtime import generator

MAX_HELD_OUT = 2048
"""Examples that are held out at most."""

Batch = TypeVar("Batch")


class EpochOrder:
    """Examples epoch by epoch, each epoch shuffled anew.

    Args:
        num_examples: of the set.
        held_out: share of them that is never trained on, of which there are at most 2,048.
        seed: of the run.
        batch_size: at least so many must be left to train on.
        name: of the set, for messages.

    Attributes:
        held_out: indices that are held out, in their order.
        train: indices that are trained on, in their order.

    Raises:
        DataError: there are too few examples for one batch.
    """

    def __init__(
        self, num_examples: int, held_out: float, seed: int, batch_size: int, name: str
    ) -> None:
        order = torch.randperm(num_examples, generator=generator(seed, "held-out"))
        num_held_out = min(int(num_examples * held_out), MAX_HELD_OUT)
        self.held_out = order[:num_held_out].sort().values
        self.train = order[num_held_out:].sort().values
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)
        if len(self.train) < batch_size:
            raise DataError(
                f"The latent set {name} has {len(self.train)} examples to train on, fewer than "
                f"one batch of {batch_size}."
            )

    def __getitem__(self, place: int) -> int:
        """The example at a place of the endless sequence."""
        epoch, position = divmod(place, len(self.train))
        return int(self._order(epoch)[position])

    def _permutation(self, epoch: int) -> Tensor:
        order = torch.randperm(len(self.train), generator=generator(self._seed, "order", epoch))
        return self.train[order]


def batches_from(make: Callable[[int], Batch], start: int, read_ahead: int) -> Iterator[Batch]:
    """Batches ``start``, ``start + 1``, ... without end.

    Args:
        make: makes a batch of a number.
        start: the first number.
        read_ahead: batches that a thread makes while a GPU computes; 0 makes each when it is
            asked for, which is faster where the CPU computes (two pools of threads would compete).
    """
    if not read_ahead:
        yield from map(make, count(start))
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting = deque(reader.submit(make, start + k) for k in range(read_ahead))
        for number in count(start + read_ahead):
            batch = waiting.popleft().result()
            waiting.append(reader.submit(make, number))
            yield batch
