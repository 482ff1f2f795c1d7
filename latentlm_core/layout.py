"""What sits where in a packed sequence, and what each state must predict.

A layout is data, made on the host when a batch is made. Attention, embedding, heads and losses
read it and none of them works it out again. It knows tokens and latents, not images or speech.

Axes: B rows, L packed positions that are fed in. Ids and latents have one position more, L + 1:
the state at position i predicts what stands at position i + 1.
"""

from dataclasses import dataclass, fields, replace
from enum import IntFlag, StrEnum
from typing import Any

import torch
from torch import Tensor

from latentlm_core.runtime import to_device


class Kind(IntFlag):
    """What a position holds, or what it must predict.

    A state may have to predict both: the next latent, and that the latents go on.
    """

    NOTHING = 0
    """Padding; as a prediction: no loss."""
    TEXT = 1
    """A token id."""
    LATENT = 2
    """A continuous latent."""


class MaskRule(StrEnum):
    """Who attends to whom within a document."""

    CAUSAL = "causal"
    """Each position to itself and what is before it (LatentLM)."""
    FREE_SPANS = "free-spans"
    """Causal, and freely within a latent span (Transfusion)."""


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """How attention is restricted, in the cheapest form that says it.

    Attributes:
        is_causal: the plain lower triangle, no ``allowed`` needed.
        allowed: (B or 1, 1, L, L) bool, True where a query (row) may see a key (column).
    """

    is_causal: bool = False
    allowed: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a layout holds, in numbers that the host knows: what a model computes follows.

    Attributes:
        positions: that are fed, padding left out.
        causal_pairs: of positions of a document where one is the other or before it.
        ahead_pairs: of latents of a span where one is after the other.
    """

    positions: int
    causal_pairs: int
    ahead_pairs: int

    @classmethod
    def of(cls, document: Tensor, span: Tensor) -> "Extent":
        """Of documents and spans (B, L) on the host, each of which lies in one piece."""
        documents, spans = _run_lengths(document), _run_lengths(span)
        pairs, ahead = documents * (documents + 1) // 2, spans * (spans - 1) // 2
        return cls(int(documents.sum()), int(pairs.sum()), int(ahead.sum()))


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The plan of B packed rows.

    Attributes:
        kind: (B, L) ``Kind`` of what is fed in.
        document: (B, L) attention never crosses documents; -1 is padding.
        position: (B, L) restarts in each document; rotary embedding reads it. It may be fractional:
            text that goes with latents can stand where these are expected.
        span: (B, L) id of the latent span, -1 outside.
        predict: (B, L) ``Kind`` of what the state must predict; a union where it is both.
        text_targets: (N,) flat indices into B * L where ``predict`` has TEXT.
        latent_targets: (M,) flat indices into B * L where ``predict`` has LATENT.
        is_packed: whether some row holds more than one document, so that a mask is needed.
        extent: how much it holds.
    """

    kind: Tensor
    document: Tensor
    position: Tensor
    span: Tensor
    predict: Tensor
    text_targets: Tensor
    latent_targets: Tensor
    is_packed: bool
    extent: Extent

    @classmethod
    def make(
        cls, kind: Tensor, document: Tensor, position: Tensor, span: Tensor, predict: Tensor
    ) -> "SequenceLayout":
        """A layout on the host, with what follows from its five maps (B, L) worked out."""
        flat = predict.flatten()
        real = document.masked_fill(document < 0, int(document.max()))
        return cls(
            kind,
            document,
            position,
            span,
            predict,
            (flat & int(Kind.TEXT)).nonzero()[:, 0],
            (flat & int(Kind.LATENT)).nonzero()[:, 0],
            is_packed=bool((real != real[:, :1]).any()),
            extent=Extent.of(document, span),
        )

    @classmethod
    def of_images(cls, num_rows: int, num_latents: int) -> "SequenceLayout":
        """Class-conditional images: [class, x_1 ... x_{n-1}] predicts x_1 ... x_n (all n)."""
        shape = (num_rows, num_latents)
        position = torch.arange(num_latents).expand(shape)
        return cls.make(
            kind=torch.where(position == 0, int(Kind.TEXT), int(Kind.LATENT)),
            document=torch.zeros(shape, dtype=torch.int64),
            position=position,
            span=torch.where(position == 0, -1, 0),
            predict=torch.full(shape, int(Kind.LATENT)),
        )

    def mask(self, rule: MaskRule = MaskRule.CAUSAL) -> AttentionMask:
        """The attention mask of these rows under ``rule``."""
        if rule is MaskRule.CAUSAL and not self.is_packed:
            return AttentionMask(is_causal=True)
        length = self.kind.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.kind.device).tril()
        allowed = causal.expand(self.kind.shape[0], -1, -1)
        if rule is MaskRule.FREE_SPANS:
            same_span = self.span.unsqueeze(2) == self.span.unsqueeze(1)
            allowed = allowed | (same_span & (self.span >= 0).unsqueeze(1))
        same_document = self.document.unsqueeze(2) == self.document.unsqueeze(1)
        return AttentionMask(allowed=(allowed & same_document).unsqueeze(1))

    def rows(self, start: int, stop: int) -> "SequenceLayout":
        """The layout of some of the rows."""
        maps = (self.kind, self.document, self.position, self.span, self.predict)
        return SequenceLayout.make(*(part[start:stop] for part in maps))

    def to(self, device: torch.device) -> "SequenceLayout":
        """The same layout on another device."""
        moved: dict[str, Any] = {
            field.name: to_device(value.contiguous(), device)  # what is expanded cannot be pinned
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def _run_lengths(ids: Tensor) -> Tensor:
    """Lengths of the runs of equal ids (B, L) within a row, negative ids left out."""
    rows = torch.arange(len(ids)).unsqueeze(1) * (ids.max() + 1)
    numbers = torch.where(ids < 0, -1, ids + rows).flatten()
    ends = torch.cat([numbers.diff() != 0, torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    return ends.diff(prepend=torch.tensor([-1]))[numbers[ends] >= 0]
