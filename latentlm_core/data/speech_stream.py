"""Endless, deterministic batches of segments of recordings, for training a tokenizer.

Notable choices:
    batch k is a slice of the endless sequence of epochs' permutations, so it is a function of
    (seed, k) alone, may straddle two epochs, and needs no state to resume;
    where in its recording a segment begins is decided by (seed, place in that sequence);
    a recording is brought to its rate and loudness as a whole, then cut; what is shorter than a
    segment is followed by silence;
    a recording that is broken or unfit is replaced by the next one of the source that is not;
    a source that fits into 512 MiB of 16-bit samples is read once and kept; one that does not is
    cut to 16 bits as well, so both ways give the same batches.

Axes: B recordings, S samples of a segment.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import tee

import numpy as np
import torch

from latentlm_core.data.audio import (
    MAX_SKIPPED_SHARE,
    USUAL_LIMITS,
    ClipLimits,
    Pcm,
    check_clip,
    from_pcm,
    prepare,
    to_pcm,
)
from latentlm_core.data.base import SkipLog, SkippedItem, SpeechSource
from latentlm_core.data.blocks import epoch_order, reading_ahead
from latentlm_core.data.stream import MediaBatch, places_of
from latentlm_core.draws import WHOLE, Rows, Share
from latentlm_core.errors import DataError
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import derive_seed

MEMORY_BYTES = 512 * 2**20
"""Sources whose recordings fit in this are kept in memory."""
_NUM_PROBED = 32


class SpeechStream:
    """Batches of segments as media (B, 1, S); a ``training.tasks.BatchStream``.

    Labels are the speakers.

    Args:
        source: recordings to train on.
        sample_rate: of the media, in Hz.
        segment_samples: S.
        batch_size: B.
        seed: decides the order and the places of the segments.
        held_out: recordings to validate on, if there are any.
        limits: what a recording must be like.
        progress: hears of reading into memory and of what is skipped.
    """

    def __init__(
        self,
        source: SpeechSource,
        sample_rate: int,
        segment_samples: int,
        batch_size: int,
        seed: int,
        held_out: SpeechSource | None = None,
        limits: ClipLimits = USUAL_LIMITS,
        progress: Progress = SILENT,
    ) -> None:
        self._segment_samples = segment_samples
        self._batch_size = batch_size
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._train = _Recordings(source, sample_rate, limits, progress)
        self._validation = (
            _Recordings(held_out, sample_rate, limits, progress) if held_out is not None else None
        )

    @property
    def num_examples(self) -> int:
        """Recordings in an epoch."""
        return len(self._train.source)

    @property
    def skipped(self) -> tuple[SkippedItem, ...]:
        """Unfit training recordings that this stream has met, by their index in the source."""
        return self._train.log.items

    @property
    def skipped_held_out(self) -> tuple[SkippedItem, ...]:
        """Unfit held-out recordings that this stream has met, by their index in their source."""
        return self._validation.log.items if self._validation else ()

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[MediaBatch]:
        """A share of the batches of these numbers; nothing else is read.

        Raises:
            DataError: too many recordings are unfit.
            ConfigError: a batch has fewer recordings than there are processes to share it.
        """
        rows = Rows.of_share(self._batch_size, *share)
        self._train.keep_if_small()
        wanted, coming = tee(places_of(number, rows) for number in numbers)
        indices = self._train.ahead(list(map(self._index, places)) for places in wanted)
        for places, batch in zip(coming, indices, strict=True):
            taken = list(map(self._train.whole_from, batch))
            offsets = [
                derive_seed(self._seed, "offset", place) % self._num_offsets(item)
                for place, item in zip(places, taken, strict=True)
            ]
            yield replace(self._batch(taken, offsets), rows=rows, num_sharers=share[1])

    def held_out(self) -> Iterator[MediaBatch]:
        """The first segment of each held-out recording in order, without the unfit ones.

        Raises:
            DataError: too many recordings are unfit.
        """
        if self._validation is None:
            return
        self._validation.keep_if_small()
        taken: list[_Prepared] = []
        for index in range(len(self._validation.source)):
            item = self._validation.read(index)
            taken += [item] if item is not None else []
            if len(taken) == self._batch_size:
                yield self._batch(taken, [0] * len(taken))
                taken = []
        if taken:
            yield self._batch(taken, [0] * len(taken))

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, self.num_examples)
        return self._order(epoch)[within]

    def _permutation(self, epoch: int) -> Sequence[int]:
        return epoch_order(self._train.source, self._seed, epoch)

    def _num_offsets(self, item: "_Prepared") -> int:
        return max(len(item.pcm) - self._segment_samples, 0) + 1

    def _batch(self, taken: Sequence["_Prepared"], offsets: Sequence[int]) -> MediaBatch:
        segments = np.zeros((len(taken), 1, self._segment_samples), np.float32)
        for row, item, offset in zip(segments, taken, offsets, strict=True):
            pcm = item.pcm[offset : offset + self._segment_samples]
            row[0, : len(pcm)] = from_pcm(pcm)
        labels = torch.tensor([item.speaker for item in taken], dtype=torch.int64)
        return MediaBatch(torch.from_numpy(segments), labels, tuple(item.key for item in taken))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A recording at the rate and loudness of the stream; speaker -1 where it is not known."""

    pcm: Pcm
    speaker: int
    key: str


class _Recordings:
    """Prepared recordings of a source by index, out of memory where they fit."""

    def __init__(
        self, source: SpeechSource, sample_rate: int, limits: ClipLimits, progress: Progress
    ) -> None:
        self.source = source
        self.log = SkipLog(source, progress, share=MAX_SKIPPED_SHARE)
        self._sample_rate = sample_rate
        self._limits = limits
        self._progress = progress
        self._kept: dict[int, _Prepared] | None = None
        self._is_decided = False
        self._unfit: set[int] = set()

    def keep_if_small(self) -> None:
        """Read everything into memory, unless a sample of it says that it would not fit."""
        if self._is_decided:
            return
        self._is_decided = True
        if not self._fits():
            return
        kept = {}
        label = f"reading {self.source.name}"
        with self._progress.bar(label, len(self.source), "recordings") as bar:
            for index in range(len(self.source)):
                item = self.read(index)
                if item is not None:
                    kept[index] = item
                bar.advance()
        self._kept = kept

    def ahead(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """The same batches of indices, see ``reading_ahead``."""
        return batches if self._kept is not None else reading_ahead(self.source, batches)

    def whole_from(self, index: int) -> _Prepared:
        """The recording, or the first one after it that is fit; the log ends an endless search."""
        while (item := self.read(index)) is None:
            index = (index + 1) % len(self.source)
        return item

    def read(self, index: int) -> _Prepared | None:
        """None where it is unfit, which the log hears of."""
        if index in self._unfit:
            return None
        if self._kept is not None:
            return self._kept[index]
        try:
            clip = self.source[index]
            check_clip(clip, self._limits)
        except DataError as error:
            self._unfit.add(index)
            self.log.add(SkippedItem(index=index, reason=str(error)))
            return None
        speaker = -1 if clip.speaker is None else clip.speaker
        return _Prepared(to_pcm(prepare(clip, self._sample_rate)), speaker, clip.key)

    def _fits(self) -> bool:
        """Whether all of it would, by the mean of some recordings from all over the source."""
        total = len(self.source)
        probed = sorted({number * total // _NUM_PROBED for number in range(_NUM_PROBED)})
        sizes = [item.pcm.nbytes for item in map(self.read, probed) if item is not None]
        return sum(sizes) * total <= MEMORY_BYTES * len(sizes)
