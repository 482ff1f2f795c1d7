"""Documents of tokens and latents, and how they are packed into the rows of a batch.

A document says of each element what it is, and whether and how it is to be predicted from what
stands before it. Packing turns documents into a ``SequenceLayout`` and decides nothing about them:
attention and positions never cross documents, so a document learns packed what it learns alone.

Axes: n elements of a document, B rows, L fed positions, C latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from latentlm_core.data.packing import SequenceBatch
from latentlm_core.errors import DataError
from latentlm_core.layout import Kind, SequenceLayout


@dataclass(frozen=True, slots=True)
class Document:
    """A sequence of tokens and latents.

    Attributes:
        ids: (n,) int64 tokens; of a latent the token that is predicted beside it, if one is.
        latents: (n, C) float32 normalised latents, zero where there is a token.
        kind: (n,) ``Kind`` of each element.
        learn: (n,) ``Kind`` of what is predicted of each element; a union where it is both.
        span: (n,) number of the run of latents within the document, -1 outside.
        position: (n,) float32 rotary position; 0, 1, 2, ... unless tokens were placed elsewhere.
        key: what it is called in error reports.
    """

    ids: Tensor
    latents: Tensor
    kind: Tensor
    learn: Tensor
    span: Tensor
    position: Tensor
    key: str

    def __len__(self) -> int:
        return len(self.ids)


class DocumentBuilder:
    """Puts a document together, piece by piece.

    Args:
        latent_channels: C.
    """

    def __init__(self, latent_channels: int) -> None:
        self._channels = latent_channels
        self._pieces: list[tuple[Tensor, ...]] = []
        self._num_spans = 0
        self._position = 0

    def tokens(
        self, ids: Sequence[int], learn: bool = False, ahead: Sequence[float] | None = None
    ) -> Self:
        """Append tokens.

        Args:
            ids: the tokens.
            learn: whether they are predicted.
            ahead: how far each stands ahead of what is appended next, which then has the position
                that the first of them would have had; by default they stand one after the other.
        """
        values = torch.tensor(ids, dtype=torch.int64)
        latents = torch.zeros(len(ids), self._channels)
        what = Kind.TEXT if learn else Kind.NOTHING
        if ahead is None:
            self._append(values, latents, Kind.TEXT, what, -1, self._advance(len(ids)))
        else:
            position = self._position + torch.tensor(ahead, dtype=torch.float32)
            self._append(values, latents, Kind.TEXT, what, -1, position)
        return self

    def latents(self, values: Tensor, go_on: int | None = None, learn: bool = True) -> Self:
        """Append a run of latents.

        Args:
            values: (T, C).
            go_on: the mark that is predicted beside each, where the model is to say how many there
                are; None where their number is known.
            learn: whether they are predicted.
        """
        ids = torch.full((len(values),), go_on or 0)
        beside = Kind.NOTHING if go_on is None else Kind.TEXT
        what = Kind.LATENT | beside if learn else Kind.NOTHING
        position = self._advance(len(values))
        self._append(ids, values, Kind.LATENT, what, self._num_spans, position)
        self._num_spans += 1
        return self

    def finish(self, key: str) -> Document:
        """The document."""
        ids, latents, kind, learn, span, position = (
            torch.cat(part) for part in zip(*self._pieces, strict=True)
        )
        return Document(ids, latents, kind, learn, span, position, key)

    def _advance(self, count: int) -> Tensor:
        """The next ``count`` positions."""
        start, self._position = self._position, self._position + count
        return torch.arange(start, self._position, dtype=torch.float32)

    def _append(
        self, ids: Tensor, latents: Tensor, kind: Kind, learn: Kind, span: int, position: Tensor
    ) -> None:
        kinds, learns, spans = (torch.full_like(ids, int(what)) for what in (kind, learn, span))
        self._pieces.append((ids, latents, kinds, learns, spans, position))


def pack(documents: Sequence[Document], row_length: int) -> SequenceBatch:
    """Lay documents into as few rows as first fit finds, the longest documents first.

    Args:
        documents: at least one.
        row_length: L + 1, elements in a row at most; rows are no longer than they need to be.

    Returns:
        the batch; its keys are those of the documents, in the order given.

    Raises:
        DataError: a document is longer than a row.
    """
    return _lay_out(_first_fit(documents, row_length), documents)


def pad(documents: Sequence[Document]) -> SequenceBatch:
    """Give every document a row of its own, in the order given."""
    return _lay_out([[number] for number in range(len(documents))], documents)


def _lay_out(rows: Sequence[Sequence[int]], documents: Sequence[Document]) -> SequenceBatch:
    """Put the documents of these numbers into each row."""
    length = max(sum(len(documents[number]) for number in row) for row in rows)
    shape, channels = (len(rows), length), documents[0].latents.shape[1]
    ids, kind, learn = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    span, document = (torch.full(shape, -1) for _ in range(2))
    latents, position = torch.zeros(*shape, channels), torch.zeros(shape)
    row_of = [0] * len(documents)
    for row, members in enumerate(rows):
        start = num_spans = 0
        for place_in_row, number in enumerate(members):
            member, row_of[number] = documents[number], row
            place = (row, slice(start, start + len(member)))
            ids[place], latents[place], kind[place] = member.ids, member.latents, member.kind
            learn[place] = member.learn
            learn[row, start] = 0  # nothing stands before the first element
            position[place] = member.position
            document[place] = place_in_row
            span[place] = torch.where(member.span >= 0, member.span + num_spans, -1)
            num_spans += int(member.span.max()) + 1
            start += len(member)
    fed = slice(None, -1)
    layout = SequenceLayout.make(
        kind[:, fed], document[:, fed], position[:, fed], span[:, fed], learn[:, 1:]
    )
    keys = tuple(document.key for document in documents)
    return SequenceBatch(ids, latents, layout, keys, tuple(row_of))


def _first_fit(documents: Sequence[Document], row_length: int) -> list[list[int]]:
    """Numbers of the documents in each row."""
    rows: list[list[int]] = []
    room: list[int] = []
    longest_first = sorted(range(len(documents)), key=lambda n: len(documents[n]), reverse=True)
    for number in longest_first:
        document = documents[number]
        if len(document) > row_length:
            raise DataError(
                f"{document.key} has {len(document)} elements, more than the {row_length} of a row."
            )
        row = next((r for r, left in enumerate(room) if len(document) <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(number)
        room[row] -= len(document)
    return rows
