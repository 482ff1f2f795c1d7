"""Endless, deterministic batches of images for training a tokenizer.

Notable choices:
    batch k is a slice of the endless sequence of epochs' permutations, so it is a function of
    (seed, k) alone, may straddle two epochs, and needs no state to resume;
    the flip of a place in that sequence is decided by (seed, place);
    a broken image is replaced by the next one of the source that is whole;
    a source that fits into 256 MiB is decoded once and kept.

Axes: B images, H W image, M kept images, S image size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import tee
from typing import Self

import torch
from torch import Tensor

from latentlm_core.data.base import SkipLog, SkippedItem, Source
from latentlm_core.data.blocks import epoch_order
from latentlm_core.data.decoding import CenterView, Decoded, decode
from latentlm_core.data.media import to_tensor
from latentlm_core.draws import WHOLE, Rows, Share
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import derive_seed, to_device

MEMORY_BYTES = 256 * 2**20
"""Sources whose crops fit in this are kept in memory as uint8."""
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class MediaBatch:
    """Images ready for an encoder.

    Attributes:
        media: (B, 3, H, W) float32 in [-1, 1].
        labels: (B,) int64, -1 where there is none.
        keys: B keys.
        rows: of the whole batch that these are; None for all of them.
        num_sharers: processes that share the whole batch.
    """

    media: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    rows: Rows | None = None
    num_sharers: int = 1

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Self:
        """The batch on ``device``."""
        return replace(
            self, media=to_device(self.media, device), labels=to_device(self.labels, device)
        )

    def share(self, index: int, count: int) -> Self:
        """The examples that process ``index`` of ``count`` takes of a whole batch.

        Raises:
            ConfigError: there are fewer examples than processes.
        """
        if count == 1:
            return self
        rows = Rows.of_share(len(self), index, count)
        own = slice(rows.start, rows.stop)
        return replace(
            self,
            media=self.media[own],
            labels=self.labels[own],
            keys=self.keys[own],
            rows=rows,
            num_sharers=count,
        )


class MediaStream:
    """Batches of centre-cropped images; a ``training.tasks.BatchStream``.

    Args:
        source: images to train on.
        image_size: H and W.
        batch_size: B.
        seed: decides the order and the flips.
        flip: mirror half of the images.
        num_workers: decoding processes; the batches are the same for any number.
        held_out: images to validate on, if there are any.
        progress: hears of decoding into memory and of broken images.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        batch_size: int,
        seed: int,
        flip: bool = True,
        num_workers: int = 0,
        held_out: Source | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self._batch_size = batch_size
        self._seed = seed
        self._flip = flip
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._train = _Crops(source, image_size, num_workers, progress)
        self._validation = (
            _Crops(held_out, image_size, num_workers, progress) if held_out is not None else None
        )

    @property
    def num_examples(self) -> int:
        """Images in an epoch."""
        return len(self._train.source)

    @property
    def skipped(self) -> tuple[SkippedItem, ...]:
        """Broken training images that this stream has met, by their index in the source."""
        return self._train.log.items

    @property
    def skipped_held_out(self) -> tuple[SkippedItem, ...]:
        """Broken held-out images that this stream has met, by their index in their own source."""
        return self._validation.log.items if self._validation else ()

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[MediaBatch]:
        """A share of the batches of these numbers; nothing else is decoded.

        Raises:
            DataError: too many images are broken.
            ConfigError: a batch has fewer images than there are processes to share it.
        """
        rows = Rows.of_share(self._batch_size, *share)
        wanted, coming = tee(places_of(number, rows) for number in numbers)
        decoding = self._train.read(map(self._indices, wanted))
        for places, decoded in zip(coming, decoding, strict=True):
            media = to_tensor(decoded.views[:, 0])
            if self._flip:
                media = torch.where(self._flips(places)[:, None, None, None], media.flip(-1), media)
            yield MediaBatch(media, decoded.labels, decoded.keys, rows, share[1])

    def held_out(self) -> Iterator[MediaBatch]:
        """The held-out images in order, not flipped, without the broken ones.

        Raises:
            DataError: too many images are broken.
        """
        if self._validation is None:
            return
        for decoded in self._validation.read_all(self._batch_size):
            if len(decoded.keys):
                yield MediaBatch(to_tensor(decoded.views[:, 0]), decoded.labels, decoded.keys)

    def _indices(self, places: range) -> list[int]:
        """Source indices of some places of the endless sequence."""
        rounds = (divmod(place, self.num_examples) for place in places)
        return [self._order(epoch)[within] for epoch, within in rounds]

    def _permutation(self, epoch: int) -> Sequence[int]:
        return epoch_order(self._train.source, self._seed, epoch)

    def _flips(self, places: range) -> Tensor:
        return torch.tensor([derive_seed(self._seed, "flip", place) % 2 == 1 for place in places])


def places_of(number: int, rows: Rows) -> range:
    """Places in the endless sequence of some rows of a batch."""
    start = number * rows.total
    return range(start + rows.start, start + rows.stop)


class _Crops:
    """Centre crops of a source by index, out of memory where they fit."""

    def __init__(self, source: Source, size: int, num_workers: int, progress: Progress) -> None:
        self.source = source
        self.log = SkipLog(source, progress)
        self._view = CenterView(size)
        self._num_workers = num_workers
        self._progress = progress
        self._fits = len(source) * size * size * 3 <= MEMORY_BYTES
        self._kept: Decoded | None = None

    def read(self, batches: Iterator[list[int]]) -> Iterator[Decoded]:
        """Decode batches of indices; a broken item is replaced by the next whole one."""
        if self._fits:
            kept = self._keep()
            rows = _next_whole(kept.indices, len(self.source))
            for indices in batches:
                yield _take(kept, rows[torch.tensor(indices)])
            return
        asked: list[list[int]] = []
        for decoded in decode(self.source, self._view, _noting(batches, asked), self._num_workers):
            yield self._complete(asked.pop(0), decoded)

    def read_all(self, batch_size: int) -> Iterator[Decoded]:
        """Decode everything in order, without the broken items."""
        if self._fits:
            kept = self._keep()
            for rows in _slices(len(kept.keys), batch_size):
                yield _take(kept, torch.tensor(rows))
            return
        yield from self._decode_all(batch_size)

    def _keep(self) -> Decoded:
        if self._kept is None:
            label = f"reading {self.source.name}"
            with self._progress.bar(label, len(self.source), "images") as bar:
                parts = []
                for part in self._decode_all(_CHUNK):
                    parts.append(part)
                    bar.advance(len(part.keys) + len(part.skipped))
            self._kept = _join([part for part in parts if part.keys])
        return self._kept

    def _decode_all(self, batch_size: int) -> Iterator[Decoded]:
        batches = _slices(len(self.source), batch_size)
        for decoded in decode(self.source, self._view, batches, self._num_workers):
            self.log.extend(decoded.skipped)
            yield decoded

    def _complete(self, asked: list[int], decoded: Decoded) -> Decoded:
        self.log.extend(decoded.skipped)
        if not decoded.skipped:
            return decoded
        rows = {int(index): row for row, index in enumerate(decoded.indices)}
        parts = [
            _take(decoded, torch.tensor([rows[index]])) if index in rows else self._next(index)
            for index in asked
        ]
        return _join(parts)

    def _next(self, broken: int) -> Decoded:
        """The first whole item after ``broken``; the log ends the search where all are broken."""
        index = broken
        while True:
            index = (index + 1) % len(self.source)
            (decoded,) = decode(self.source, self._view, [[index]])
            if decoded.keys:
                return decoded
            self.log.extend(decoded.skipped)


def _noting(batches: Iterator[list[int]], asked: list[list[int]]) -> Iterator[list[int]]:
    """Pass batches on and remember them, for they are asked for ahead of their arrival."""
    for indices in batches:
        asked.append(indices)
        yield indices


def _slices(total: int, size: int) -> Iterator[list[int]]:
    return (list(range(i, min(i + size, total))) for i in range(0, total, size))


def _next_whole(indices: Tensor, total: int) -> Tensor:
    """For each of ``total`` indices, the row of the first whole item from there on, cyclic."""
    return torch.searchsorted(indices, torch.arange(total)) % len(indices)


def _take(decoded: Decoded, rows: Tensor) -> Decoded:
    places = rows.tolist()
    return Decoded(
        views=decoded.views[rows],
        labels=decoded.labels[rows],
        captions=tuple(decoded.captions[row] for row in places),
        keys=tuple(decoded.keys[row] for row in places),
        indices=decoded.indices[rows],
        skipped=(),
    )


def _join(parts: Sequence[Decoded]) -> Decoded:
    return Decoded(
        views=torch.cat([part.views for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        captions=tuple(caption for part in parts for caption in part.captions),
        keys=tuple(key for part in parts for key in part.keys),
        indices=torch.cat([part.indices for part in parts]),
        skipped=tuple(item for part in parts for item in part.skipped),
    )
