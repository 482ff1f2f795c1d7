"""Random numbers of a batch that do not depend on how many processes share its rows.

Every process draws the numbers of the whole batch from the same generator, and keeps those of its
own rows. Numbers are cheap beside the network that they go into.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentlm_core.errors import ConfigError

Share = tuple[int, int]
"""(index, count): which of the processes that share a batch, and how many there are."""
WHOLE: Share = (0, 1)
"""A batch that is not shared."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some consecutive rows of a whole.

    Attributes:
        start: the first.
        stop: the one after the last.
        total: rows of the whole.
    """

    start: int
    stop: int
    total: int

    @classmethod
    def of_share(cls, total: int, index: int, count: int) -> "Rows":
        """Share ``index`` of ``count``, which are as equal as can be.

        Raises:
            ConfigError: there are more shares than rows.
        """
        if count > total:
            raise ConfigError(
                f"A batch of {total} rows cannot be shared by {count} processes.",
                hint="Take fewer processes, larger batches, or a greater trainer.accumulate.",
            )
        return cls(index * total // count, (index + 1) * total // count, total)

    def __len__(self) -> int:
        return self.stop - self.start

    def groups(self, size: int) -> "Rows":
        """The same part of a whole whose rows are counted in groups of ``size``."""
        return Rows(self.start // size, self.stop // size, self.total // size)


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers for one loss or one batch of latents, on the generator's device.

    Attributes:
        generator: the source.
        rows: those of the whole that numbers are wanted for; None for a whole.
    """

    generator: torch.Generator
    rows: Rows | None = None

    def normal(
        self, shape: Sequence[int], dim: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal numbers of ``shape``, whose axis ``dim`` are the rows."""
        device = self.generator.device
        drawn = torch.randn(
            self._whole(shape, dim), generator=self.generator, device=device, dtype=dtype
        )
        return self._own(drawn, dim)

    def integers(self, high: int, shape: Sequence[int], dim: int = 0) -> Tensor:
        """Integers from 0 to ``high - 1`` of ``shape``, whose axis ``dim`` are the rows."""
        whole, device = self._whole(shape, dim), self.generator.device
        return self._own(torch.randint(high, whole, generator=self.generator, device=device), dim)

    def groups(self, size: int) -> "Draws":
        """The same source, where a row of numbers is wanted for each group of ``size`` rows."""
        return Draws(self.generator, self.rows and self.rows.groups(size))

    def _whole(self, shape: Sequence[int], dim: int) -> Sequence[int]:
        if self.rows is None:
            return tuple(shape)
        return (*shape[:dim], self.rows.total, *shape[dim + 1 :])

    def _own(self, drawn: Tensor, dim: int) -> Tensor:
        if self.rows is None:
            return drawn
        return drawn.narrow(dim, self.rows.start, len(self.rows))
