"""Encode a source once: from images to a latent set.

Notable choices:
    a shard is encoded in batches that begin at its first index, so that a shard made after an
    interruption has the bytes that it would have had, and decoding workers change nothing
    (another device or number of threads may change the last bits: other kernels run; another
    batch size may too, so it is part of the plan, and a set is not continued with another one);
    decoding runs ahead, in threads or processes, and writing behind (``partial``), so that the
    encoder is what takes the time; on a GPU a batch is copied there and begun before the latents
    of the one before it are waited for (``ImageEncoder``).

Axes: n examples, V variants, S image size, T latent positions, C latent channels.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from latentlm_core.data.base import Example, Image, Source
from latentlm_core.data.decoding import Decoded, decode
from latentlm_core.data.manifest import LatentPlan, Manifest
from latentlm_core.data.media import center_crop, random_crop, to_tensor
from latentlm_core.data.partial import Part, Run, make_set, weights_digest
from latentlm_core.data.pipeline import Landing, Throughput, num_readers, one_behind
from latentlm_core.data.shard_file import Encoded
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import generator, to_device
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
        flip: store mirror images as well.
        crops: store this many random crops instead of the centre crop.
        batch_size: views that are encoded at once (one example's at least).
        dtype: of the stored latents.
        device: where the encoder runs.
        num_workers: decoding processes; 0 decodes in threads, as many as are of use.
        shard_size: items that a shard covers; by default what fits ``SHARD_BYTES``.
        progress: hears of images done and of broken ones.
        throughput: learns how long it took, and what was waited for.

    Raises:
        DataError: the folder has another set, too many images are broken, or a latent is not
            finite.
        CorruptFileError: the manifest that is there is damaged.
        ArtifactError: the export is not there, or the file system refused.
        BusyError: another process is writing the folder.
    """
    where = torch.device(device)
    views = LatentViews(tokenizer.image_size, crops, flip)
    grid = tokenizer.grid((3, views.size, views.size))
    plan = LatentPlan(
        data=spec,
        split=split,
        classes=source.classes,
        tokenizer=tokenizer.config.to_dict(),
        tokenizer_sha256=weights_digest(tokenizer_export),
        grid=grid,
        latent_channels=tokenizer.latent_channels,
        dtype=dtype,
        variants=views.names,
        num_source=len(source),
        shard_size=shard_size or _shard_size(tokenizer, grid, len(views.names), dtype),
        batch_size=batch_size,
    )

    return make_set(
        folder,
        plan,
        source,
        tokenizer,
        tokenizer_export,
        ImageEncoder(source, tokenizer, views, where, num_workers),
        run_size=max(1, batch_size // len(views.names)),
        unit="images",
        device=where,
        progress=progress,
        throughput=throughput,
    )


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """From runs of a source to what became of them (``partial.make_set``).

    Attributes:
        source: images.
        tokenizer: on ``device``.
        views: what is encoded of each example.
        device: where the encoder runs.
        num_workers: decoding processes; 0 decodes in threads.
    """

    source: Source
    tokenizer: SigmaVAE
    views: LatentViews
    device: torch.device
    num_workers: int = 0

    def __call__(self, runs: Sequence[Run], throughput: Throughput) -> Generator[Part, None, None]:
        """Encode runs while those to come are read."""
        with closing(self.read(runs)) as batches:
            yield from self.encode(runs, throughput.reading(batches))

    def read(self, runs: Sequence[Run]) -> Generator[Decoded, None, None]:
        """Decode runs, ahead of who takes them."""
        return decode(
            self.source,
            self.views,
            (list(run.indices) for run in runs),
            self.num_workers,
            num_readers(),
            pinned=self.device.type == "cuda",
        )

    def encode(self, runs: Iterable[Run], batches: Iterable[Decoded]) -> Iterator[Part]:
        """Encode what was decoded of runs."""
        begun = ((run, batch, self._begin(batch)) for run, batch in zip(runs, batches, strict=True))
        for run, batch, landing in one_behind(begun, self.device):
            pieces = ((run.indices[0], _encoded(batch, landing)),) if batch.keys else ()
            yield Part(run.shard, pieces, batch.skipped)

    def _begin(self, batch: Decoded) -> Landing:
        """Posteriors of a batch by variant, (V, n * T, C) each, on their way."""
        if not batch.keys:
            return Landing()
        num_variants = batch.views.shape[1]
        media = to_tensor(to_device(batch.views, self.device).flatten(0, 1))
        posterior = self.tokenizer.encode(media)
        variance = posterior.log_variance
        return Landing(
            _by_variant(posterior.mean, num_variants),
            None if variance is None else _by_variant(variance, num_variants),
        )


def _encoded(batch: Decoded, landing: Landing) -> Encoded:
    mean, log_variance = landing.wait()
    assert mean is not None
    return Encoded(
        mean=mean,
        log_variance=log_variance,
        lengths=torch.full((len(batch.keys),), mean.shape[1] // len(batch.keys)),
        labels=batch.labels,
        captions=batch.captions,
        keys=batch.keys,
        questions=batch.questions,
    )


def _by_variant(latents: Tensor, num_variants: int) -> Tensor:
    """(n * V, T, C) => (V, n * T, C), float32."""
    folded = latents.float().reshape(-1, num_variants, *latents.shape[1:])
    return folded.transpose(0, 1).flatten(1, 2)


def _shard_size(tokenizer: SigmaVAE, grid: Grid, num_variants: int, dtype: str) -> int:
    """Items whose latents fill a shard."""
    tensors = 2 if tokenizer.config.posterior.kind is PosteriorKind.LEARNED else 1
    width = 4 if dtype == "float32" else 2
    values = tensors * num_variants * math.prod(grid) * tokenizer.latent_channels
    return min(max(SHARD_BYTES // (values * width), 1), SHARD_EXAMPLES)
