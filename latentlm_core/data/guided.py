"""Batches with what guidance needs: the same latents once more, without their condition.

Guidance mixes the head's output for a state with its output for the state that the same latents
have where nothing else is known. Every run of latents to predict is put a second time into a row
of its own, behind the tokens that stand for no condition, as sampling has it.

Axes: B rows, L fed positions, N latents to predict, C latent channels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from latentlm_core.data.documents import DocumentBuilder, pad
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.draws import WHOLE, Share
from latentlm_core.layout import Kind
from latentlm_core.runtime import to_device


@dataclass(frozen=True, slots=True)
class Guidance:
    """How latents are guided.

    Attributes:
        scale: s in u + s (c - u); 1 is off.
        schedule: constant, or linear from 1 at the first latent of a run to s at the last.
        unconditional: tokens that stand before latents of which nothing is known.
    """

    scale: float
    schedule: Literal["constant", "linear"]
    unconditional: tuple[int, ...]

    def apply(self, batch: SequenceBatch) -> "GuidedBatch":
        """A batch on the host with its guidance."""
        return self.of(batch, self._free(batch))

    def of(self, batch: SequenceBatch, free: "FreeRuns | None") -> "GuidedBatch":
        """A batch with the guidance that was made of it."""
        own = {field.name: getattr(batch, field.name) for field in fields(SequenceBatch)}
        return GuidedBatch(**own, free=free, guidance=self)

    def _free(self, batch: SequenceBatch) -> "FreeRuns | None":
        runs = latent_runs(batch)
        if self.scale == 1.0 or not runs:
            return None
        channels = batch.latents.shape[2]
        rows = [
            DocumentBuilder(channels).tokens(self.unconditional).latents(run).finish(str(number))
            for number, run in enumerate(runs)
        ]
        return FreeRuns(pad(rows), torch.cat([self._scales(len(run)) for run in runs]))

    def _scales(self, length: int) -> Tensor:
        if self.schedule == "constant":
            return torch.full((length,), self.scale)
        return 1.0 + (self.scale - 1.0) * torch.arange(length) / max(length - 1, 1)


@dataclass(frozen=True, slots=True)
class FreeRuns:
    """The latents of a batch without their condition.

    Attributes:
        batch: each run of latents in a row of its own, in the order of the batch, so that the N
            latents to predict are the same.
        scales: (N,) guidance scale of each.
    """

    batch: SequenceBatch
    scales: Tensor

    def to(self, device: torch.device) -> "FreeRuns":
        """The same on another device."""
        return FreeRuns(self.batch.to(device), to_device(self.scales, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedBatch(SequenceBatch):
    """Sequences to learn from, and what guidance needs beside them.

    Attributes:
        free: the same latents without their condition; None where nothing is guided.
        guidance: that made it.
    """

    free: FreeRuns | None
    guidance: Guidance

    def to(self, device: torch.device) -> "GuidedBatch":
        """The same batch on another device."""
        return self.guidance.of(SequenceBatch.to(self, device), self.free and self.free.to(device))

    def share(self, index: int, count: int) -> "GuidedBatch":
        """The rows that process ``index`` of ``count`` takes of a whole batch on the host.

        Raises:
            ConfigError: there are fewer rows than processes.
        """
        return self.guidance.apply(SequenceBatch.share(self, index, count))


class SequenceStream(Protocol):
    """A ``training.tasks.BatchStream`` of sequences."""

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[SequenceBatch]:
        """A share of the batches of these numbers."""

    def held_out(self) -> Iterator[SequenceBatch]:
        """The validation batches."""


class GuidedStream:
    """The batches of another stream with their guidance (a ``training.tasks.BatchStream``).

    Args:
        stream: of sequences.
        guidance: of their latents.
    """

    def __init__(self, stream: SequenceStream, guidance: Guidance) -> None:
        self._stream, self._guidance = stream, guidance

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[GuidedBatch]:
        """A share of the batches of these numbers."""
        return map(self._guidance.apply, self._stream.batches(numbers, share))

    def held_out(self) -> Iterator[GuidedBatch]:
        """The validation batches."""
        return map(self._guidance.apply, self._stream.held_out())


def latent_runs(batch: SequenceBatch) -> list[Tensor]:
    """The runs of latents (T, C) to predict, in the order of ``layout.latent_targets``.

    A run begins where its first latent is predicted from something else than a latent.
    """
    targets = batch.layout.latent_targets
    if not len(targets):
        return []
    values = batch.latents[:, 1:].flatten(0, 1)[targets]
    is_first = batch.layout.kind.flatten()[targets] != int(Kind.LATENT)
    return list(values.tensor_split(is_first.nonzero()[1:, 0]))
