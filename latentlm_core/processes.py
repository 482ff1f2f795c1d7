"""The processes of a command: who they are, and how they agree.

``torchrun`` starts W processes that all call the same workflow. Each takes its share of the work
by index, the main one (rank 0) writes what is written once, and what they must agree on goes
through the few functions here. A command without torchrun is one process: each function is then
the identity, and nothing of ``torch.distributed`` is touched.

Notable choices:
- host values and tensors on the CPU go through gloo, tensors on a GPU through NCCL; both are one
  default group;
- work that is shared (``shared``, ``merged``) comes back in the order of its items, so what is made
  of it does not depend on how many processes there are;
- an error in one process ends the command: torchrun stops the others, and one that waits for it
  fails with ``LostProcessError``.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count, islice
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from latentlm_core.errors import ConfigError, LostProcessError
from latentlm_core.progress import Bar, Progress

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest where each works on its own share until all is done."""
TRAINING_PATIENCE = timedelta(hours=2)
"""The same where they take each step together, and one may download a data set first."""

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: of this process, from 0.
        size: W, how many there are.
        local_rank: of this process on its machine.
        local_size: how many there are on its machine.
        group: of torch.distributed that they are; None for the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: "dist.ProcessGroup | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            dist.barrier(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's ``tensor``, the same bits in each."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, value: Made) -> list[Made]:
        """Every process's ``value`` (anything that pickles), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def agree(self, value: Made) -> Made:
        """The main process's ``value``, in each."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def once(self, make: Callable[[], Made]) -> Made:
        """What ``make``, called in the main process alone, returns (if it pickles), in each."""
        return self.agree(make() if self.is_main else None)  # type: ignore[return-value]

    def in_main(self, context: AbstractContextManager[object]) -> AbstractContextManager[object]:
        """``context`` in the main process; nothing in the others."""
        return context if self.is_main else nullcontext()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in one of each other machine, then in the rest.

        What it downloads or writes is there for those who come later.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()

    def sharing(self, count: int) -> "Processes":
        """This process among the ``count`` consecutive ones that share a batch with it.

        Ranks 0 to ``count - 1`` are such a group, then the next ``count``, and so on. All W
        processes ask for one together.
        """
        if count == self.size:
            return self
        if count == 1:
            return ALONE
        group = _consecutive(count, dist.group.WORLD)
        return Processes(dist.get_rank(group), count, self.local_rank, self.local_size, group)

    def own(self, items: Iterable[Item]) -> Iterator[Item]:
        """Every W-th item, from this process's rank on."""
        return islice(items, self.rank, None, self.size)

    def shared(self, make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """``map(make, items)`` with the items shared out in turn; each process gets all results.

        Args:
            make: called in one process for each item; what it returns must pickle.
            items: the same in each process.
        """
        return self.merged(map(make, self.own(items)))

    def merged(self, mine: Iterable[Made]) -> Iterator[Made]:
        """What all processes made of their ``own`` items (if it pickles), in the items' order."""
        if self.size == 1:
            yield from mine
            return
        mine = iter(mine)
        while True:
            turn = self.gather(list(islice(mine, 1)))
            for made in turn:
                if not made:
                    return
                yield made[0]

    @contextmanager
    def bar(
        self, progress: Progress, label: str, total: int, unit: str, done: int = 0
    ) -> Iterator[Bar]:
        """A bar of work that processes share by ``own``: it shows what all of them have done.

        The block ends when it has ended in each process.
        """
        with progress.bar(label, total, unit, done) as bar:
            if self.size == 1:
                yield bar
                return
            counted = _CountedBar(bar)
            yield counted
            self.wait()
            counted.advance(0)


@cache
def _consecutive(count: int, world: "dist.ProcessGroup") -> "dist.ProcessGroup":
    """This process's group of ``count``, made once for each ``world``."""
    own, _ = dist.new_subgroups(count)
    return own


_num_counted = count()


class _CountedBar:
    """A bar whose count is kept by the store that the processes have in common."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._store = dist.distributed_c10d._get_default_store()
        self._key = f"latentlm/bar/{next(_num_counted)}"
        self._shown = 0

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Count ``amount``, and show what has been counted by all."""
        done = self._store.add(self._key, amount)
        self._bar.advance(done - self._shown, **figures)
        self._shown = done


ALONE = Processes()
"""One process."""


def current() -> Processes:
    """This process among those that ``joined`` brought together; ``ALONE`` outside of it."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, local_size)


@contextmanager
def joined(patience: timedelta | None = None) -> Iterator[Processes]:
    """Inside the block (or the function, as a decorator) torchrun's processes know of one another.

    Args:
        patience: how long one waits for the others before it gives up; by default as long as torch
            lets it, which is minutes.

    Raises:
        ConfigError: the processes do not find one another.
        LostProcessError: another process ended, or gave up, while this one needed it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or current().size > 1:
        yield current()
        return
    import torch.distributed.nn  # later, its default arguments would keep the group for good
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    backend = "cpu:gloo"
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, timeout=patience, world_size=size, rank=rank, store=store)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"The processes do not find one another: {_reason(error)}.") from error
    try:
        yield current()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcessError(f"Another process has ended: {_reason(error)}.") from error
        raise
    finally:
        dist.destroy_process_group()


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def refuse_several(what: str) -> None:
    """Refuse to do in several processes what is made for one.

    Raises:
        ConfigError: torchrun started more than one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} is one process: start it without torchrun.")
