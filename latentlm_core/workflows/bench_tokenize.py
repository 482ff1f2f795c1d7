"""``latentlm bench tokenize``: the whole of it, its stages, and a loop that does one after another.

Notable choices: the plain loop reads a batch, encodes it, waits for its latents, and writes a shard
when it has one; both ways write the same bytes with the same code, so their ratio is what it is
worth that stages overlap. How near the pipeline comes to its slowest stage alone is what is left to
gain. Shards are of half a repeat here, so that one can be written while the other is encoded.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core.artifacts import load_tokenizer
from latentlm_core.data.base import SkipLog, Source
from latentlm_core.data.caching import ImageEncoder, LatentViews
from latentlm_core.data.decoding import Decoded, decode
from latentlm_core.data.manifest import LatentPlan
from latentlm_core.data.media import to_tensor
from latentlm_core.data.partial import (
    Part,
    PartialSet,
    finish_shard,
    whole_shards,
    write_behind,
)
from latentlm_core.data.pipeline import Throughput
from latentlm_core.data.sources import Subset, open_source
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import vae_recipe
from latentlm_core.result import Result
from latentlm_core.runtime import evaluating, resolve_device, seeded_init, to_device
from latentlm_core.tokenizers.base import Grid
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.workflows.bench import (
    Conditions,
    Memory,
    each_batch,
    require_counts,
    take_turns,
)
from latentlm_core.workflows.workspace import find_export

STAGES = ("read", "encode", "write")
"""Images out of the data set, cropped; their latents; these on the disk, synced and hashed."""


def bench_tokenize(
    *,
    data: str = "embedded:shapes",
    split: str = "train",
    vae: str | None = None,
    recipe: str | None = None,
    batch_size: int = 64,
    steps: int = 8,
    num_workers: int = 0,
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Time the tokenizing of images against a plain loop, and its stages alone, in turns.

    Args:
        data: a data set, as ``open_source`` takes it; a small one is read over and over.
        split: train or test.
        vae: run, export or hub id of a sigma-VAE; by default the newest.
        recipe: instead, one whose networks are built with fresh weights.
        batch_size: images at once.
        steps: batches a repeat, which lie in memory while stages are timed alone.
        num_workers: processes that decode images; 0 decodes in threads of this one.
        repeats: rounds that count.
        warm_up: rounds before.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        images per second of the whole, of a plain loop, and of each stage alone; how they compare;
        and what the encoder waited for.

    Raises:
        LatentLMError: anything that the user can mend; a batch that does not fit among it.
    """
    where = resolve_device(device)
    require_counts((batch_size,), repeats, warm_up, steps)
    if vae is not None and recipe is not None:
        raise ConfigError("--vae and --recipe both name a tokenizer: leave one out.")
    options = {
        "data": data,
        "split": split,
        "vae": vae,
        "recipe": recipe,
        "batch_size": batch_size,
        "steps": steps,
        "num_workers": num_workers,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    tokenizer = _tokenizer(vae, recipe, where, progress)
    source = open_source(data, split)
    conditions, memory = Conditions(where, options, progress), Memory(where)

    def measure(batch: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, evaluating(tokenizer):
            images = Subset(source, [place % len(source) for place in range(steps * batch)])
            encoder = ImageEncoder(
                images, tokenizer, LatentViews(tokenizer.image_size), where, num_workers
            )
            ways = Ways(encoder, Path(folder, "set"), batch, steps)
            found = _compare(ways, repeats, warm_up)
        return {"batch": batch, **found, "peak_megabytes": memory.peak_megabytes}

    (row,) = each_batch((batch_size,), where, measure, progress).values()
    names = ("ratio", "share_of_slowest", "slowest", "data_wait_share", "write_wait_share")
    figures = {
        "batch": row["batch"],
        **{
            f"{name}_images_per_second": row[f"{name}_images_per_second"]["median"]
            for name in ("pipeline", "plain", *STAGES, "decode")
        },
        **{name: row[name] for name in names},
        "peak_megabytes": row["peak_megabytes"],
    }
    return conditions.result("Tokenizing speed", figures, [row])


class Ways:
    """Ways to tokenize some batches, and the stages of it.

    Args:
        encoder: of the images.
        folder: where shards go.
        batch: images at once.
        steps: batches.
    """

    def __init__(self, encoder: ImageEncoder, folder: Path, batch: int, steps: int) -> None:
        self.encoder = encoder
        plan = _plan(encoder.source, encoder.tokenizer, batch, batch * -(-steps // 2))
        self._set = PartialSet(folder, plan)
        self._set.begin()
        self.runs = self._set.runs(batch, range(plan.num_shards))

    def overlapping(self) -> Throughput:
        """As ``encode_source`` does it."""
        throughput, log = Throughput(), SkipLog(self.encoder.source)
        throughput.start()
        with (
            closing(self.encoder(self.runs, throughput)) as parts,
            SILENT.bar("", len(self.encoder.source), "images") as bar,
        ):
            write_behind(self._set, parts, log, bar, throughput)
        return throughput

    def one_by_one(self) -> None:
        """One thing after the other."""
        source, views = self.encoder.source, self.encoder.views
        batches = decode(source, views, (list(run.indices) for run in self.runs))
        each = zip(self.runs, batches, strict=True)
        self.write(part for run, batch in each for part in self.encoder.encode((run,), (batch,)))

    def read(self) -> list[Decoded]:
        """Decode and crop alone, with the pipeline's workers."""
        return list(self.encoder.read(self.runs))

    def encode(self, batches: Iterable[Decoded]) -> list[Part]:
        """Encode alone."""
        return list(self.encoder.encode(self.runs, batches))

    def write(self, parts: Iterable[Part]) -> None:
        """Write alone, where the parts are there."""
        for shard in whole_shards(self._set.plan, parts):
            finish_shard(self._set, shard)


def _compare(ways: Ways, repeats: int, warm_up: int) -> dict[str, Any]:
    """Images a second of everything, and how they compare.

    Raises:
        DataError: no image can be read.
    """
    encoder, source = ways.encoder, ways.encoder.source
    batches = ways.read()
    if not any(batch.keys for batch in batches):
        raise DataError(f"None of the first {len(source)} images of {source.name} can be read.")
    parts = ways.encode(batches)
    latents, grid = _latents(encoder, next(batch for batch in batches if batch.keys))
    paces: list[Throughput] = []
    works: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: paces.append(ways.overlapping()),
        "plain": ways.one_by_one,
        "read": ways.read,
        "encode": lambda: ways.encode(batches),
        "write": lambda: ways.write(parts),
        "decode": lambda: encoder.tokenizer.decode(latents, grid),
    }
    turns = take_turns(list(works.values()), repeats, warm_up, encoder.device)
    timings = dict(zip(works, turns, strict=True))
    counts = {name: len(latents) if name == "decode" else len(source) for name in works}
    slowest = max(STAGES, key=lambda name: timings[name].median)
    whole = timings["pipeline"].median
    waits = [throughput.shares for throughput in paces[warm_up:]]
    return {
        **{
            f"{name}_images_per_second": timing.rates(counts[name])
            for name, timing in timings.items()
        },
        "ratio": round(timings["plain"].median / whole, 3),
        "slowest": slowest,
        "share_of_slowest": round(timings[slowest].median / whole, 3),
        **{name: statistics.median(wait[name] for wait in waits) for name in waits[0]},
    }


def _latents(encoder: ImageEncoder, batch: Decoded) -> tuple[Tensor, Grid]:
    """(n, T, C) of a batch, on the device, and their grid."""
    tokenizer, views = encoder.tokenizer, batch.views[:, 0]
    media = to_tensor(to_device(views, encoder.device))
    return tokenizer.encode(media).mean, tokenizer.grid(tuple(media.shape[1:]))


def _plan(source: Source, tokenizer: SigmaVAE, batch: int, shard_size: int) -> LatentPlan:
    size = tokenizer.image_size
    return LatentPlan(
        data=source.name,
        split="train",
        classes=source.classes,
        tokenizer=tokenizer.config.to_dict(),
        tokenizer_sha256="0" * 64,
        grid=tokenizer.grid((3, size, size)),
        latent_channels=tokenizer.latent_channels,
        dtype="float32",
        variants=("plain",),
        num_source=len(source),
        shard_size=shard_size,
        batch_size=batch,
    )


def _tokenizer(
    vae: str | None, recipe: str | None, device: torch.device, progress: Progress
) -> SigmaVAE:
    if recipe is None:
        return load_tokenizer(find_export(vae, "sigma-vae", progress), device).model
    with seeded_init("bench"):
        return build_tokenizer(vae_recipe(recipe).tokenizer).to(device)
