"""Encode a source of speech once: from recordings to a latent set of examples of different lengths.

Notable choices:
    a clip is padded with zeros to whole latent positions before anything else, and the networks are
    causal: its latents do not depend on the clips beside it in a batch, up to rounding;
    the clips of a window are encoded longest first, in batches of about one length; windows begin
    at fixed places of a shard and hold the memory down however large the shard is;
    the windows to come are read and resampled by threads while one is encoded;
    recordings that ``check_clip`` refuses count as broken: left out and listed in the manifest;
    the transcript is stored as caption, the speaker as label.

Axes: B clips, S audio samples, T latent positions, C latent channels.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from latentlm_core.data.audio import MAX_SKIPPED_SHARE, ClipLimits, check_clip, prepare
from latentlm_core.data.base import Samples, SkippedItem, SpeechSource
from latentlm_core.data.blocks import reading_ahead
from latentlm_core.data.manifest import RAGGED_VERSION, LatentPlan, Manifest
from latentlm_core.data.partial import Part, Run, make_set, weights_digest
from latentlm_core.data.pipeline import Landing, Throughput, ahead, num_readers, one_behind
from latentlm_core.data.shard_file import Encoded
from latentlm_core.errors import DataError
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import to_device
from latentlm_core.tokenizers.sigma_vae import SigmaVAE

SHARD_CLIPS = 1024
"""A shard covers this many items of the source: what an interruption costs at most."""
WINDOW_CLIPS = 128
"""Items that are read together and sorted by length."""
WINDOWS_AHEAD = 2
"""Windows that are in memory beside the one that is encoded."""


def encode_speech(
    source: SpeechSource,
    tokenizer: SigmaVAE,
    folder: Path,
    *,
    spec: str,
    split: str,
    tokenizer_export: Path,
    limits: ClipLimits,
    max_batch_seconds: int = 60,
    dtype: Literal["float32", "float16"] = "float32",
    device: torch.device | str = "cpu",
    shard_size: int = SHARD_CLIPS,
    progress: Progress = SILENT,
    throughput: Throughput | None = None,
) -> Manifest:
    """Make a latent set, or go on with one, or return the one that is there already.

    Args:
        source: what to encode.
        tokenizer: encodes it; is moved to ``device``.
        folder: where the set goes.
        spec: name of the source, for the manifest.
        split: which part of it the source is, for the manifest.
        tokenizer_export: folder of the tokenizer's export; its copy becomes part of the set.
        limits: what a recording must be like to be taken.
        max_batch_seconds: audio that is encoded at once, padding included (one clip at least).
        dtype: of the stored latents.
        device: where the encoder runs.
        shard_size: items that a shard covers.
        progress: hears of clips done and of broken ones.
        throughput: learns how long it took, and what was waited for.

    Raises:
        DataError: the folder has another set, too many clips are broken, or a latent is not
            finite.
        CorruptFileError: the manifest that is there is damaged.
        ArtifactError: the tokenizer is one of images, its export is not there, or the file system
            refused.
        BusyError: another process is writing the folder.
    """
    network = tokenizer.speech
    where = torch.device(device)
    plan = LatentPlan(
        format_version=RAGGED_VERSION,
        data=spec,
        split=split,
        classes=source.classes,
        tokenizer=tokenizer.config.to_dict(),
        tokenizer_sha256=weights_digest(tokenizer_export),
        grid=None,
        latent_channels=tokenizer.latent_channels,
        dtype=dtype,
        variants=("plain",),
        num_source=len(source),
        shard_size=shard_size,
        batch_size=max_batch_seconds,
        limits=limits.to_dict(),
    )
    reader = _Reader(source, network.sample_rate, network.hop_length, limits)
    return make_set(
        folder,
        plan,
        source,
        tokenizer,
        tokenizer_export,
        _SpeechEncoder(reader, tokenizer, max_batch_seconds * network.sample_rate, where),
        run_size=WINDOW_CLIPS,
        unit="clips",
        device=where,
        progress=progress,
        max_skipped_share=MAX_SKIPPED_SHARE,
        throughput=throughput,
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A clip that is ready to be encoded.

    Attributes:
        index: its place in the source.
        samples: (T * hop_length,), padded with zeros.
        num_positions: T.
        label: of the speaker, -1 where it is not known.
        caption: the transcript, None where there is none.
        key: of the source.
    """

    index: int
    samples: Samples
    num_positions: int
    label: int
    caption: str | None
    key: str


@dataclass(frozen=True, slots=True)
class _Window:
    """A run of the source, read."""

    clips: list[_Prepared]
    skipped: tuple[SkippedItem, ...]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A batch that is being encoded; or what was broken in a window, and no clips."""

    shard: int
    clips: Sequence[_Prepared]
    landing: Landing
    skipped: tuple[SkippedItem, ...] = ()


@dataclass(frozen=True, slots=True)
class _SpeechEncoder:
    """From runs of a source to what became of them (``partial.make_set``)."""

    reader: "_Reader"
    tokenizer: SigmaVAE
    max_samples: int
    device: torch.device

    def __call__(self, runs: Sequence[Run], throughput: Throughput) -> Generator[Part, None, None]:
        asked = reading_ahead(self.reader.source, (list(run.indices) for run in runs))
        with closing(ahead(self.reader, asked, num_readers(), WINDOWS_AHEAD)) as windows:
            begun = self._begin(runs, throughput.reading(windows))
            for batch in one_behind(begun, self.device):
                yield Part(batch.shard, tuple(_pieces(batch)), batch.skipped)

    def _begin(self, runs: Sequence[Run], windows: Iterator[_Window]) -> Iterator[_Begun]:
        for run, window in zip(runs, windows, strict=True):
            if window.skipped:
                yield _Begun(run.shard, (), Landing(), window.skipped)
            for clips in _by_length(window.clips, self.max_samples):
                yield _Begun(run.shard, clips, self._encode(clips))

    def _encode(self, clips: Sequence[_Prepared]) -> Landing:
        """Posteriors of a batch (B, T, C), on their way."""
        audio = np.zeros((len(clips), 1, len(clips[0].samples)), np.float32)
        for row, clip in enumerate(clips):
            audio[row, 0, : len(clip.samples)] = clip.samples
        posterior = self.tokenizer.encode(to_device(torch.from_numpy(audio), self.device))
        variance = posterior.log_variance
        return Landing(posterior.mean.float(), None if variance is None else variance.float())


@dataclass(frozen=True, slots=True)
class _Reader:
    """From indices of a source to a window; numpy alone, for it works in threads (``ahead``)."""

    source: SpeechSource
    sample_rate: int
    hop_length: int
    limits: ClipLimits

    def __call__(self, indices: Sequence[int]) -> _Window:
        clips, skipped = [], []
        for index in indices:
            try:
                clips.append(self._prepare(index))
            except DataError as error:
                skipped.append(SkippedItem(index=index, reason=str(error)))
        return _Window(clips, tuple(skipped))

    def _prepare(self, index: int) -> _Prepared:
        clip = self.source[index]
        check_clip(clip, self.limits)
        samples = prepare(clip, self.sample_rate)
        if not len(samples):
            raise DataError(f"{clip.key} has no samples at {self.sample_rate} Hz.")
        num_positions = -(-len(samples) // self.hop_length)
        padding = num_positions * self.hop_length - len(samples)
        return _Prepared(
            index,
            np.pad(samples, (0, padding)),
            num_positions,
            -1 if clip.speaker is None else clip.speaker,
            clip.text,
            clip.key,
        )


def _by_length(clips: Sequence[_Prepared], max_samples: int) -> Iterator[list[_Prepared]]:
    """Batches, longest first, of at most ``max_samples`` when padded (of one clip at least)."""
    batch: list[_Prepared] = []
    for clip in sorted(clips, key=lambda clip: (-len(clip.samples), clip.index)):
        if batch and (len(batch) + 1) * len(batch[0].samples) > max_samples:
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def _pieces(batch: _Begun) -> Iterator[tuple[int, Encoded]]:
    """Each clip of a batch on its own, cut to its own T, with its place in the source."""
    if not batch.clips:
        return
    mean, log_variance = batch.landing.wait()
    assert mean is not None
    for row, clip in enumerate(batch.clips):
        own = slice(row, row + 1), slice(clip.num_positions)
        yield (
            clip.index,
            Encoded(
                mean=mean[own],
                log_variance=None if log_variance is None else log_variance[own],
                lengths=torch.tensor([clip.num_positions]),
                labels=torch.tensor([clip.label]),
                captions=(clip.caption,),
                keys=(clip.key,),
            ),
        )
