"""From latent sets to batches of sequences.

A batch is a function of (seed, its number) and of nothing else: the order is a permutation per
epoch, sigma's noise is drawn anew at each read from a generator of that batch, and so are the
variant (a stored flip, say) and the dropped labels. Resuming is starting at a number.

The same draw z is what the model reads and what it must predict (the published trainer does so:
train_hf.py:279-304).

Axes: B rows, T latent positions, C latent channels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.data.order import EpochOrder
from latentlm_core.data.shards import LatentSet
from latentlm_core.draws import WHOLE, Draws, Rows, Share
from latentlm_core.errors import DataError
from latentlm_core.layout import SequenceLayout
from latentlm_core.runtime import generator, to_device
from latentlm_core.tokenizers.base import LatentStats


class LatentDataConfig(Config):
    """How batches are made of a latent set of class-conditional images."""

    kind: Literal["classes"] = "classes"
    """Sequences of a class and the latents of an image."""
    batch_size: int = Field(default=256, ge=1)
    """Sequences a batch (a micro-batch, where gradients are accumulated)."""
    label_drop: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of sequences whose class is replaced by the null class, so that guidance works."""
    held_out: float = Field(default=0.02, ge=0.0, le=0.5)
    """Share of the examples that is never trained on (at most 2,048): validation loss."""
    per_channel_stats: bool = False
    """Normalise each channel by its own statistics; the published code uses one scale for all."""


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Sequences to learn from.

    Attributes:
        ids: (B, L + 1) token ids.
        latents: (B, L + 1, C) float32 normalised latents, drawn from their posteriors.
        layout: of the L fed positions.
        keys: what the examples are called, for error reports.
        row_of: the row of each example; None where each has a row of its own.
        rows: of the whole batch that these are; None for all of them.
        targets: of the whole batch's latents to predict that these are; None for all of them.
    """

    ids: Tensor
    latents: Tensor
    layout: SequenceLayout
    keys: tuple[str, ...]
    row_of: tuple[int, ...] | None = None
    rows: Rows | None = None
    targets: Rows | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "SequenceBatch":
        """The same batch on another device."""
        return replace(
            self,
            ids=to_device(self.ids, device),
            latents=to_device(self.latents, device),
            layout=self.layout.to(device),
        )

    def share(self, index: int, count: int) -> "SequenceBatch":
        """The rows that process ``index`` of ``count`` takes of a whole batch on the host.

        Raises:
            ConfigError: there are fewer rows than processes.
        """
        if count == 1:
            return self
        num_rows, length = self.layout.kind.shape
        rows = Rows.of_share(num_rows, index, count)
        ends = torch.tensor([rows.start * length, rows.stop * length])
        start, stop = torch.searchsorted(self.layout.latent_targets, ends).tolist()
        row_of = self.row_of or range(num_rows)
        own = [n for n, row in enumerate(row_of) if rows.start <= row < rows.stop]
        return SequenceBatch(
            self.ids[rows.start : rows.stop],
            self.latents[rows.start : rows.stop],
            self.layout.rows(rows.start, rows.stop),
            tuple(self.keys[n] for n in own),
            tuple(row_of[n] - rows.start for n in own),
            rows,
            Rows(start, stop, len(self.layout.latent_targets)),
        )


class LatentStream:
    """Class-conditional sequences from one latent set (a ``training.tasks.BatchStream``).

    Args:
        latents: the set; its manifest gives posterior and statistics.
        config: batch size, dropped labels, held-out share.
        seed: of the run.

    Raises:
        DataError: the set has no labels, or too few examples for one batch.
    """

    def __init__(self, latents: LatentSet, config: LatentDataConfig, seed: int) -> None:
        self.latents = latents
        self.config = config
        self.seed = seed
        self.stats: LatentStats = latents.manifest.stats(
            latents.posterior, per_channel=config.per_channel_stats
        )
        self.num_classes = len(latents.manifest.classes)
        if self.num_classes == 0:
            raise DataError(
                f"The latent set {latents.manifest.name} has no classes, which a "
                "class-conditional model needs."
            )
        self._order = EpochOrder(
            *(len(latents), config.held_out, seed, config.batch_size, latents.manifest.name),
            latents.blocks,
        )

    @property
    def null_id(self) -> int:
        """The token that stands for no class: the last of the vocabulary."""
        return self.num_classes

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[SequenceBatch]:
        """A share of the batches of these numbers."""
        return (self.batch(number).share(*share) for number in numbers)

    def batch(self, number: int) -> SequenceBatch:
        """Training batch ``number`` of the endless run."""
        size = self.config.batch_size
        source = generator(self.seed, "batch", number)
        indices = [self._order[place] for place in range(number * size, (number + 1) * size)]
        variants = torch.randint(self.latents.num_variants, (size,), generator=source)
        return self._draw(indices, variants.tolist(), source, self.config.label_drop)

    def held_out(self) -> Iterator[SequenceBatch]:
        """The validation batches: plain variants, no dropped labels, fixed draws."""
        if not len(self._order.held_out):
            return
        for number, indices in enumerate(torch.split(self._order.held_out, self.config.batch_size)):
            source = generator(self.seed, "held-out batch", number)
            yield self._draw(indices.tolist(), 0, source, label_drop=0.0)

    def _draw(
        self,
        indices: Sequence[int],
        variants: Sequence[int] | int,
        source: torch.Generator,
        label_drop: float,
    ) -> SequenceBatch:
        records = self.latents.read(indices, variants)
        raw = self.latents.posterior.draw(records.mean, records.log_variance, Draws(source))
        latents = self.stats.normalise(raw)
        dropped = torch.rand(len(indices), generator=source) < label_drop
        unlabelled = records.labels < 0
        batch, num_latents, channels = latents.shape
        ids = torch.zeros(batch, num_latents + 1, dtype=torch.int64)
        ids[:, 0] = torch.where(dropped | unlabelled, self.null_id, records.labels)
        start = latents.new_zeros(batch, 1, channels)
        return SequenceBatch(
            ids,
            torch.cat([start, latents], dim=1),
            SequenceLayout.of_images(batch, num_latents),
            records.keys,
        )
