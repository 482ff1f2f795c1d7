"""Encode a source once: from images to a latent set.

Notable choices:
    shard k covers source indices [k * n, (k + 1) * n), whatever is broken, whoever makes it;
    a shard is encoded in batches that begin at its first index, so that a shard made after an
    interruption has the bytes that it would have had, and decoding workers change nothing
    (another device or number of threads may change the last bits: other kernels run; another
    batch size may too, so it is part of the plan, and a set is not continued with another one);
    decoding runs ahead, in workers or a thread, and writing behind in a thread, so that the encoder
    is what takes the time;
    the tokenizer is copied into the set, which is then all that a model needs.

Axes: n examples, V variants, S image size, T latent positions, C latent channels.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from latentlm_core import files
from latentlm_core.data.base import Example, Image, SkipLog, SkippedItem, Source
from latentlm_core.data.decoding import Decoded, decode, one_ahead
from latentlm_core.data.manifest import LatentPlan, Manifest
from latentlm_core.data.media import center_crop, random_crop, to_tensor
from latentlm_core.data.partial import PartialSet, ShardRow
from latentlm_core.data.shard_file import Encoded, write_shard
from latentlm_core.errors import ArtifactError
from latentlm_core.progress import SILENT, Bar, Progress
from latentlm_core.runtime import evaluating, generator, to_device
from latentlm_core.tokenizers.base import Grid, PosteriorKind
from latentlm_core.tokenizers.sigma_vae import SigmaVAE

SHARD_BYTES = 256 * 2**20
"""The latents of a shard take at most this, unless one example takes more."""
SHARD_EXAMPLES = 4096
"""A shard covers at most this many items of the source."""


@dataclass(frozen=True, slots=True)
class LatentViews:
    """What is encoded of each example.

    Attributes:
        size: S.
        crops: random crops, drawn from the example's key; 0 takes the centre crop.
        flip: mirror images of all of these too.
    """

    size: int
    crops: int = 0
    flip: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the V variants."""
        crops = tuple(f"crop-{number}" for number in range(self.crops))
        flips = tuple(f"{name}-flip" for name in crops) if self.crops else ("flip",)
        return (crops or ("plain",)) + (flips if self.flip else ())

    def __call__(self, example: Example) -> Sequence[Image]:
        """V images (S, S, 3)."""
        images = [
            random_crop(example.image, self.size, generator("crop", example.key, number))
            for number in range(self.crops)
        ] or [center_crop(example.image, self.size)]
        return images + [image[:, ::-1] for image in images] if self.flip else images


def encode_source(
    source: Source,
    tokenizer: SigmaVAE,
    folder: Path,
    *,
    spec: str,
    split: str,
    tokenizer_export: Path,
    flip: bool = False,
    crops: int = 0,
    batch_size: int = 64,
    dtype: Literal["float32", "float16"] = "float32",
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    shard_size: int | None = None,
    progress: Progress = SILENT,
) -> Manifest:
    """Make a latent set, or go on with one, or return the one that is there already.

    Args:
        source: what to encode.
        tokenizer: encodes it; is moved to ``device``.
        folder: where the set goes.
        spec: name of the source, for the manifest.
        split: which part of it the source is, for the manifest.
        tokenizer_export: folder of the tokenizer's export; its copy becomes part of the set.
        flip: store mirror images as well.
        crops: store this many random crops instead of the centre crop.
        batch_size: views that are encoded at once (one example's at least).
        dtype: of the stored latents.
        device: where the encoder runs.
        num_workers: decoding processes; 0 decodes in a thread, one batch ahead.
        shard_size: items that a shard covers; by default what fits ``SHARD_BYTES``.
        progress: hears of images done and of broken ones.

    Raises:
        DataError: the folder has another set, too many images are broken, or a latent is not
            finite.
        CorruptFileError: the manifest that is there is damaged.
        ArtifactError: the export is not there, or the file system refused.
        BusyError: another process is writing the folder.
    """
    views = LatentViews(tokenizer.image_size, crops, flip)
    grid = tokenizer.grid((3, views.size, views.size))
    plan = LatentPlan(
        data=spec,
        split=split,
        classes=source.classes,
        tokenizer=tokenizer.config.to_dict(),
        tokenizer_sha256=_weights_digest(tokenizer_export),
        grid=grid,
        latent_channels=tokenizer.latent_channels,
        dtype=dtype,
        variants=views.names,
        num_source=len(source),
        shard_size=shard_size or _shard_size(tokenizer, grid, len(views.names), dtype),
        batch_size=batch_size,
    )
    with files.locked(folder):
        partial = PartialSet(folder, plan)
        if partial.missing:
            partial.begin()
        _keep_tokenizer(tokenizer_export, folder / files.TOKENIZER_FOLDER, plan.tokenizer_sha256)
        if partial.missing:
            batches = _batches(partial, max(1, batch_size // len(views.names)))
            decoded = decode(source, views, (indices for _, indices in batches), num_workers)
            decoded = decoded if num_workers else one_ahead(decoded)
            log = SkipLog(source, progress)
            for row in partial.rows.values():
                log.extend(row.skipped)
            done = plan.num_source - sum(len(indices) for _, indices in batches)
            with (
                evaluating(tokenizer.to(device)),
                progress.bar(f"encoding {source.name}", plan.num_source, "images", done) as bar,
            ):
                _make_missing(partial, batches, decoded, tokenizer, torch.device(device), log, bar)
        return partial.finish()


def _batches(partial: PartialSet, size: int) -> list[tuple[int, list[int]]]:
    """(shard, source indices) of everything that is missing, shard by shard."""
    return [
        (number, list(covered[first : first + size]))
        for number in partial.missing
        for covered in (partial.plan.covers(number),)
        for first in range(0, len(covered), size)
    ]


def _make_missing(
    partial: PartialSet,
    batches: Sequence[tuple[int, list[int]]],
    decoded: Iterator[Decoded],
    tokenizer: SigmaVAE,
    device: torch.device,
    log: SkipLog,
    bar: Bar,
) -> None:
    """Encode batch after batch; a thread writes a shard while the next one is encoded."""
    pending: Future[None] | None = None
    parts: list[Encoded] = []
    skipped: list[SkippedItem] = []
    with ThreadPoolExecutor(1) as writer:
        for (number, indices), batch in zip(batches, decoded, strict=True):
            log.extend(batch.skipped)
            skipped += batch.skipped
            if batch.keys:
                parts.append(_encode(tokenizer, batch, device))
            if indices[-1] == partial.plan.covers(number)[-1]:
                if pending:
                    pending.result()
                pending = writer.submit(_finish_shard, partial, number, parts, tuple(skipped))
                parts, skipped = [], []
            bar.advance(len(indices))
        if pending:
            pending.result()


def _encode(tokenizer: SigmaVAE, batch: Decoded, device: torch.device) -> Encoded:
    views = to_device(batch.views, device)
    posterior = tokenizer.encode(to_tensor(views.flatten(0, 1)))
    shape = (*views.shape[:2], *posterior.mean.shape[1:])
    mean = posterior.mean.reshape(shape).float().cpu()
    log_variance = posterior.log_variance
    if log_variance is not None:
        log_variance = log_variance.reshape(shape).float().cpu()
    return Encoded(mean, log_variance, batch.labels, batch.captions, batch.keys)


def _finish_shard(
    partial: PartialSet, number: int, parts: Sequence[Encoded], skipped: tuple[SkippedItem, ...]
) -> None:
    entry = write_shard(partial.folder, partial.plan, number, _join(partial.plan, parts))
    partial.add(number, ShardRow(entry=entry, skipped=skipped))


def _join(plan: LatentPlan, parts: Sequence[Encoded]) -> Encoded:
    nothing = torch.empty(0, len(plan.variants), plan.num_positions, plan.latent_channels)
    learned = plan.posterior.kind is PosteriorKind.LEARNED
    variances = [part.log_variance for part in parts if part.log_variance is not None]
    return Encoded(
        mean=torch.cat([nothing, *(part.mean for part in parts)]),
        log_variance=torch.cat([nothing, *variances]) if learned else None,
        labels=torch.cat([torch.empty(0, dtype=torch.int64), *(part.labels for part in parts)]),
        captions=tuple(caption for part in parts for caption in part.captions),
        keys=tuple(key for part in parts for key in part.keys),
    )


def _weights_digest(export: Path) -> str:
    path = export / files.WEIGHTS_FILE
    if not path.is_file():
        raise ArtifactError(f"{export} is no export of a tokenizer: it has no {path.name}.")
    return files.sha256_file(path)


def _keep_tokenizer(export: Path, copy: Path, digest: str) -> None:
    """Copy the export into the set, unless it is there."""
    weights = copy / files.WEIGHTS_FILE
    if weights.is_file() and files.sha256_file(weights) == digest:
        return
    with files.write_folder(copy) as part:
        for path in sorted(export.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, part / path.name)


def _shard_size(tokenizer: SigmaVAE, grid: Grid, num_variants: int, dtype: str) -> int:
    """Items whose latents fill a shard."""
    tensors = 2 if tokenizer.config.posterior.kind is PosteriorKind.LEARNED else 1
    width = 4 if dtype == "float32" else 2
    values = tensors * num_variants * math.prod(grid) * tokenizer.latent_channels
    return min(max(SHARD_BYTES // (values * width), 1), SHARD_EXAMPLES)
