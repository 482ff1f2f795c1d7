"""Which example stands where in an endless run.

The order is a permutation per epoch that follows from the seed; the held-out examples are drawn
once, from the seed too. A place of the run is a number, so resuming is starting at a number.
"""

from functools import lru_cache

import torch
from torch import Tensor

from latentlm_core.data.blocks import BlockOrder, Blocks
from latentlm_core.errors import DataError
from latentlm_core.runtime import generator

MAX_HELD_OUT = 2048
"""Examples that are held out at most."""


class EpochOrder:
    """Examples epoch by epoch, each epoch shuffled anew.

    Args:
        num_examples: of the set.
        held_out: share of them that is never trained on, of which there are at most 2,048.
        seed: of the run.
        batch_size: at least so many must be left to train on.
        name: of the set, for messages.
        blocks: how the examples lie, where they are to be read block by block: then the first ones
            are held out, and an epoch is a ``BlockOrder``.

    Attributes:
        held_out: indices that are held out, in their order.
        train: indices that are trained on, in their order.

    Raises:
        DataError: there are too few examples for one batch.
    """

    def __init__(
        self,
        num_examples: int,
        held_out: float,
        seed: int,
        batch_size: int,
        name: str,
        blocks: Blocks | None = None,
    ) -> None:
        order = torch.randperm(num_examples, generator=generator(seed, "held-out"))
        if blocks is not None:
            order = torch.arange(num_examples)
        num_held_out = min(int(num_examples * held_out), MAX_HELD_OUT)
        self.held_out = order[:num_held_out].sort().values
        self.train = order[num_held_out:].sort().values
        self._seed = seed
        self._blocks = None if blocks is None else blocks.part(range(num_held_out, num_examples))
        self._order = lru_cache(maxsize=2)(self._permutation)
        if len(self.train) < batch_size:
            raise DataError(
                f"The latent set {name} has {len(self.train)} examples to train on, fewer than "
                f"one batch of {batch_size}."
            )

    def __getitem__(self, place: int) -> int:
        """The example at a place of the endless sequence."""
        epoch, position = divmod(place, len(self.train))
        return int(self.train[self._order(epoch)[position]])

    def _permutation(self, epoch: int) -> Tensor | BlockOrder:
        if self._blocks is not None:
            return BlockOrder(self._blocks, self._seed, epoch)
        return torch.randperm(len(self.train), generator=generator(self._seed, "order", epoch))
