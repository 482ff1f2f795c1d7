"""A latent set: memory-mapped shards, their manifest, and the tokenizer that made them.

    manifest.json                what it was made of, the shards, the statistics
    shard-00000.safetensors      ``shard_file`` has the layout
    tokenizer/                   export of the tokenizer

Examples of one grid are gathered by ``read``; those that differ in length (speech, whose captions
are transcripts and whose labels are speakers) are read one at a time by ``read_one``.

Axes: V variants, n examples, T latent positions, C latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core import files
from latentlm_core.data.base import Question
from latentlm_core.data.blocks import Blocks
from latentlm_core.data.manifest import LatentSums, Manifest, ShardEntry, read_manifest
from latentlm_core.data.remote_latents import FetchedShards, is_remote, open_shards
from latentlm_core.data.shard_file import Shard
from latentlm_core.draws import Draws
from latentlm_core.errors import CorruptFileError
from latentlm_core.tokenizers.base import LatentPosteriorConfig, LatentStats, PosteriorKind

WINDOW_BYTES = 2 * 2**30
"""Shards inside which examples are shuffled take about this, where they are read in order."""

__all__ = ["LatentRecord", "LatentRecords", "LatentSet", "LatentSums", "Manifest", "ShardEntry"]


@dataclass(frozen=True, slots=True)
class LatentRecords:
    """Examples of a latent set.

    Attributes:
        mean: (n, T, C) float32 raw posterior means.
        log_variance: (n, T, C) float32 where the posterior is learned, else None.
        labels: (n,) int64, -1 where there is none.
        captions: n texts, None where there is none.
        keys: n keys of the source.
    """

    mean: Tensor
    log_variance: Tensor | None
    labels: Tensor
    captions: tuple[str | None, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LatentRecord:
    """One example of a latent set.

    Attributes:
        mean: (T, C) float32 raw posterior means.
        log_variance: (T, C) float32 where the posterior is learned, else None.
        label: -1 where there is none.
        caption: None where there is none.
        key: of the source.
        questions: what may be asked of it.
    """

    mean: Tensor
    log_variance: Tensor | None
    label: int
    caption: str | None
    key: str
    questions: tuple[Question, ...]


class LatentSet:
    """A complete latent set, read memory-mapped; cheap to send to another process.

    Make one with ``LatentSet.open``.

    Args:
        folder: where it is; of a set at a URL, what stands for it in the cache.
        manifest: of the set.
        in_order: examples are to be read shard by shard.

    Attributes:
        manifest: what it holds.
        blocks: its shards, where examples are to be read shard by shard; else None.
        posterior: how latents are drawn around the means.
    """

    def __init__(self, folder: Path, manifest: Manifest, in_order: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self.posterior: LatentPosteriorConfig = manifest.posterior
        self._shards = open_shards(folder, manifest, in_order)
        self.blocks = _blocks(manifest, self._shards) if in_order else None
        self._ends = torch.tensor([entry.count for entry in manifest.shards]).cumsum(0)

    @classmethod
    def open(cls, folder: Path, verify: bool = True, in_order: bool = False) -> "LatentSet":
        """Open a latent set.

        Args:
            folder: where it is.
            verify: hash every shard and the tokenizer's weights first (about 1 GB a second).
                Without it, sizes, shapes, types, offsets and labels are checked, latents are not.
                Shards of a set at a URL are hashed when they are first read in any case.
            in_order: examples are to be read shard by shard.

        Raises:
            ArtifactError: there is no complete latent set.
            DataError: it is of a newer format.
            CorruptFileError: a file is missing, or not what the manifest says.
            ConfigError: the set is at a URL, not read in order, and larger than the cache.
        """
        manifest = read_manifest(folder)
        local = () if is_remote(folder) else manifest.shards
        for entry in local:
            _check_size(folder / entry.file, entry.num_bytes)
        if verify:
            for entry in local:
                check_hash(folder / entry.file, entry.sha256)
            check_hash(
                folder / files.TOKENIZER_FOLDER / files.WEIGHTS_FILE, manifest.tokenizer_sha256
            )
        return cls(folder, manifest, in_order)

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentSet, (self.folder, self.manifest, self.blocks is not None)

    def __len__(self) -> int:
        """Number of examples."""
        return self.manifest.num_examples

    @property
    def num_variants(self) -> int:
        """V."""
        return len(self.manifest.variants)

    @property
    def is_ragged(self) -> bool:
        """Whether examples may differ in length."""
        return self.manifest.grid is None

    @property
    def has_captions(self) -> bool:
        """Whether any example has a caption."""
        return any(shard.has_captions for shard in self._shards)

    @property
    def has_questions(self) -> bool:
        """Whether any example has questions."""
        return any(shard.has_questions for shard in self._shards)

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64, latent positions of each example."""
        return torch.cat([shard.offsets.diff() for shard in self._shards])

    @cached_property
    def labels(self) -> Tensor:
        """(N,) int64, -1 where there is none."""
        return torch.cat([shard.labels for shard in self._shards])

    def caption(self, index: int) -> str | None:
        """Caption of an example, None where there is none.

        Raises:
            IndexError: there is no such example.
            CorruptFileError: it is no UTF-8.
        """
        shard, place = self._locate(index)
        return shard.captions[place] or None

    def questions(self, index: int) -> tuple[Question, ...]:
        """What may be asked of an example; nothing where it has no questions.

        Raises:
            IndexError: there is no such example.
            CorruptFileError: they are no questions and answers.
        """
        shard, place = self._locate(index)
        return shard.questions(place)

    def key(self, index: int) -> str:
        """Key of an example.

        Raises:
            IndexError: there is no such example.
            CorruptFileError: it is no UTF-8.
        """
        shard, place = self._locate(index)
        return shard.keys[place]

    def read_one(self, index: int, variant: int = 0) -> LatentRecord:
        """Copy one example, of a set of either kind.

        Args:
            index: 0 to ``len - 1``.
            variant: which variant of it.

        Raises:
            IndexError: there is no such example or variant.
            CorruptFileError: a text is no UTF-8, or its questions are none.
        """
        shard, place = self._locate(index)
        _check_range("variant", torch.tensor([variant]), self.num_variants)
        start, end = shard.offsets[place : place + 2].tolist()
        mean = shard.mean[variant, start:end].to(torch.float32, copy=True)
        log_variance = None
        if shard.log_variance is not None:
            log_variance = shard.log_variance[variant, start:end].to(torch.float32, copy=True)
        return LatentRecord(
            mean,
            log_variance,
            int(shard.labels[place]),
            shard.captions[place] or None,
            shard.keys[place],
            shard.questions(place),
        )

    def draw(self, record: LatentRecord, stats: LatentStats, source: torch.Generator) -> Tensor:
        """Normalised latents (T, C) of an example, drawn from its posterior: one sigma for all.

        Args:
            record: from ``read_one``.
            stats: normalisation.
            source: of the noise.
        """
        variance = None if record.log_variance is None else record.log_variance.unsqueeze(0)
        drawn = self.posterior.draw(record.mean.unsqueeze(0), variance, Draws(source))
        return stats.normalise(drawn.squeeze(0))

    def read(self, indices: Sequence[int], variants: Sequence[int] | int = 0) -> LatentRecords:
        """Gather examples of a set with a grid.

        Args:
            indices: n examples, 0 to ``len - 1`` each.
            variants: which variant of each, or one for all.

        Raises:
            DataError: examples differ in length.
            IndexError: there is no such example or variant.
            CorruptFileError: a text is no UTF-8.
        """
        num_positions = self.manifest.num_positions
        places = torch.as_tensor(indices, dtype=torch.int64)
        which = torch.as_tensor(variants, dtype=torch.int64).expand_as(places)
        _check_range("example", places, len(self))
        _check_range("variant", which, self.num_variants)
        number = torch.searchsorted(self._ends, places, right=True)
        shape = (len(places), num_positions, self.manifest.latent_channels)
        learned = self.posterior.kind is PosteriorKind.LEARNED
        mean = torch.empty(shape)
        log_variance = torch.empty(shape) if learned else None
        labels = torch.empty(len(places), dtype=torch.int64)
        texts: list[tuple[str | None, str]] = [(None, "")] * len(places)
        for k in sorted(set(number.tolist())):
            shard = self._shards[k]
            folded = (shard.count, num_positions)
            rows = (number == k).nonzero()[:, 0]
            local = places[rows] - (self._ends[k] - shard.count)
            mean[rows] = shard.mean.unflatten(1, folded)[which[rows], local].float()
            if log_variance is not None and shard.log_variance is not None:
                spread = shard.log_variance.unflatten(1, folded)
                log_variance[rows] = spread[which[rows], local].float()
            labels[rows] = shard.labels[local]
            for row, place in zip(rows.tolist(), local.tolist(), strict=True):
                texts[row] = (shard.captions[place] or None, shard.keys[place])
        captions, keys = zip(*texts, strict=True) if texts else ((), ())
        return LatentRecords(mean, log_variance, labels, captions, keys)

    def _locate(self, index: int) -> tuple[Shard, int]:
        """The shard of an example, and its place there."""
        _check_range("example", torch.tensor([index]), len(self))
        number = int(torch.searchsorted(self._ends, index, right=True))
        shard = self._shards[number]
        return shard, index - (int(self._ends[number]) - shard.count)


def _blocks(manifest: Manifest, shards: Sequence[Shard]) -> Blocks:
    entries = manifest.shards
    blocks = Blocks.of_counts([e.count for e in entries], [e.num_bytes for e in entries])
    if isinstance(shards, FetchedShards):
        return replace(blocks, window_bytes=WINDOW_BYTES, expect=shards.expect)
    return replace(blocks, window_bytes=WINDOW_BYTES)


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing.", hint="Run tokenize again.")
    if path.stat().st_size != num_bytes:
        raise CorruptFileError(
            f"{path} has {path.stat().st_size} bytes, and its manifest says {num_bytes}.",
            hint="Run tokenize again.",
        )


def check_hash(path: Path, sha256: str) -> None:
    """Compare a file of a latent set with its manifest.

    Raises:
        CorruptFileError: it is missing, or not what was hashed.
    """
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing.", hint="Run tokenize again.")
    if files.sha256_file(path) != sha256:
        raise CorruptFileError(
            f"{path} is damaged: its SHA-256 is not the one in the manifest.",
            hint="Run tokenize again.",
        )


def _check_range(what: str, places: Tensor, end: int) -> None:
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < end:
        raise IndexError(f"{what} out of range: {places.min()} to {places.max()} of {end}")
