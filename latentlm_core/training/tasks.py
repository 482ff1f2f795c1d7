"""What the trainer needs to know of a thing that is trained.

A task is the only difference between training a tokenizer, a LatentLM or a baseline. A loss is a
set of ``Term``s, each a sum and a count, never a mean: the trainer divides by the count of the
whole (accumulated, shared) batch, so the result does not depend on how it is split.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from latentlm_core.draws import WHOLE, Share


@dataclass(frozen=True, slots=True)
class Term:
    """A part of a loss: ``total / count`` is its mean.

    Attributes:
        total: scalar, differentiable sum over ``count`` elements.
        count: number of elements, a host number (known when the batch is made).
    """

    total: Tensor
    count: int


Terms = dict[str, Term]


@dataclass(frozen=True, slots=True)
class Turn:
    """One optimiser's share of a step. A VAE with a critic has two turns, all else has one.

    Attributes:
        name: of the optimiser in checkpoints and logs.
        module: whose parameters this turn updates.
        loss: (batch, generator) => terms; the generator is on the batch's device, and the same for
            every share of a batch. Names of terms are unique over the turns of a task. Gradients
            that a turn leaves in the modules of other turns are discarded.
        weights: factor of each term in the objective; a term without one is only logged.
        counts: batch => the count of each weighted term, known before its loss is computed. It
            lets a step that is split into several batches free each one's graph before the next;
            without it all graphs of the step are held until the last count is known.
        start: the first step that has this turn; its learning rate counts from there.
    """

    name: str
    module: nn.Module
    loss: Callable[[Any, torch.Generator], Terms]
    weights: Mapping[str, float]
    counts: Callable[[Any], Mapping[str, int]] | None = None
    start: int = 0


class Task(Protocol):
    """A thing that can be trained."""

    @property
    def name(self) -> str:
        """Short name for logs and the progress bar."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Everything with state, by the name it has in checkpoints."""

    @property
    def exported(self) -> nn.Module:
        """The module whose averaged (EMA) weights are the result of the run."""

    def turns(self, step: int) -> Sequence[Turn]:
        """The turns of this step, in order (the critic joins at its start step)."""

    def validate(self, batch: Any, generator: torch.Generator) -> Terms:
        """Terms of a held-out batch; names may go beyond those of training."""

    def health(self, figures: Mapping[str, float]) -> Sequence[str]:
        """Warnings that the logged figures call for (an encoder that escapes its noise)."""


@dataclass(frozen=True, slots=True)
class ElementErrors:
    """The errors of one batch that a term is the sum of, one by one.

    Attributes:
        values: (K,).
        rows: (K,) int64, the row of the batch that each belongs to.
        timesteps: (K,) int64; None where there is no noise.
        edges: of the bands of timesteps, from 0 to T.
    """

    values: Tensor
    rows: Tensor
    timesteps: Tensor | None = None
    edges: tuple[int, ...] = ()

    def bands(self, which: Tensor) -> tuple[str, ...]:
        """The bands that the errors of a mask (K,) lie in, as ``t0-249``."""
        if self.timesteps is None:
            return ()
        chosen = self.timesteps[which]
        return tuple(
            f"t{low}-{high - 1}"
            for low, high in pairwise(self.edges)
            if ((chosen >= low) & (chosen < high)).any()
        )


@runtime_checkable
class GivesErrors(Protocol):
    """A task that tells errors one by one, so that those which are not finite can be named."""

    def element_errors(self, batch: Any, generator: torch.Generator) -> Mapping[str, ElementErrors]:
        """The errors of a batch by the name of their term, from a generator as a loss gets it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step asks of a model, or of several that share it.

    Attributes:
        tokens: tokens and latents that are fed, padding left out.
        flops: operations, forward and backward, that the model needs.
    """

    tokens: int = 0
    flops: int = 0


@runtime_checkable
class TellsWork(Protocol):
    """A task that tells its work, so that a run's speed can be set against its device's."""

    def work(self, batch: Any) -> Work:
        """Of a step with this batch; the host knows it without asking the device."""


class Batch(Protocol):
    """Some examples, ready for a task."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Stable name of each example, for messages; may be empty."""

    def __len__(self) -> int:
        """Number of examples."""

    def to(self, device: torch.device) -> Self:
        """The batch on ``device``, copied without making the host wait where possible."""

    def share(self, index: int, count: int) -> Self:
        """The rows that process ``index`` of ``count`` takes, consecutive and as equal as can be.

        Terms and gradients of all shares add up to those of the whole, whose only share it is.

        Raises:
            ConfigError: there are fewer rows than processes.
        """


class BatchStream(Protocol):
    """A deterministic source of batches: batch k is a function of (seed, k) alone."""

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[Batch]:
        """The batches of these numbers, in this order, each made when it is asked for.

        Args:
            numbers: may have no end.
            share: what ``Batch.share`` is asked for, of each of them.
        """

    def held_out(self) -> Iterator[Batch]:
        """The finite set of validation batches, the same each time; may be empty."""
