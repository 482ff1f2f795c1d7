"""``latentlm bench tokenize`` and ``bench load``: what stands before a training step."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch

from latentlm_core.artifacts import load_tokenizer
from latentlm_core.data.caching import LatentViews
from latentlm_core.data.decoding import decode
from latentlm_core.data.media import to_tensor
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import vae_recipe
from latentlm_core.result import Result
from latentlm_core.runtime import evaluating, resolve_device, seeded_init, to_device
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.workflows.bench import (
    Conditions,
    Memory,
    each_batch,
    require_counts,
    take_turns,
)
from latentlm_core.workflows.bench_loop import (
    RECIPE,
    TrainingLoop,
    class_recipe,
    model_of,
    open_latents,
    stored_batches,
    time_loops,
)
from latentlm_core.workflows.workspace import find_export

STAGES = ("read", "encode", "decode")
"""Images out of the data set, cropped; their latents; images of these."""


def bench_tokenize(
    *,
    data: str = "embedded:shapes",
    split: str = "train",
    vae: str | None = None,
    recipe: str | None = None,
    batch_size: int = 64,
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Time the stages of tokenizing images, each alone, in turns.

    Args:
        data: a data set, as ``open_source`` takes it.
        split: train or test.
        vae: run, export or hub id of a sigma-VAE; by default the newest.
        recipe: instead, one whose networks are built with fresh weights.
        batch_size: images at once.
        repeats: rounds that count.
        warm_up: rounds before.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        images per second of each stage, and its share of the time of all.

    Raises:
        LatentLMError: anything that the user can mend; a batch that does not fit among it.
    """
    where = resolve_device(device)
    require_counts((batch_size,), repeats, warm_up)
    if vae is not None and recipe is not None:
        raise ConfigError("--vae and --recipe both name a tokenizer: leave one out.")
    options = {
        "data": data,
        "split": split,
        "vae": vae,
        "recipe": recipe,
        "batch_size": batch_size,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    tokenizer = _tokenizer(vae, recipe, where, progress)
    side = tokenizer.image_size
    source = open_source(data, split)
    indices = list(islice(range(len(source)), batch_size))
    conditions, memory = Conditions(where, options, progress), Memory(where)
    read = partial(_first, source, LatentViews(side), indices)
    views = read()
    if len(views) == 0:
        raise DataError(f"None of the first {len(indices)} images of {data} can be read.")

    def measure(_: int) -> dict[str, Any]:
        grid = tokenizer.grid((3, side, side))
        with evaluating(tokenizer):
            latents = tokenizer.encode(to_tensor(to_device(views, where))).mean
            timings = take_turns(
                (
                    read,
                    lambda: tokenizer.encode(to_tensor(to_device(views, where))),
                    lambda: tokenizer.decode(latents, grid),
                ),
                repeats,
                warm_up,
                where,
            )
        whole = sum(timing.median for timing in timings)
        staged = dict(zip(STAGES, timings, strict=True))
        return {
            "batch": len(views),
            **{
                f"{name}_images_per_second": each.rates(len(views)) for name, each in staged.items()
            },
            "shares": {name: round(each.median / whole, 4) for name, each in staged.items()},
            "peak_megabytes": memory.peak_megabytes,
        }

    row = each_batch((batch_size,), where, measure)[batch_size]
    figures = {
        name: {
            "images_per_second": row[f"{name}_images_per_second"]["median"],
            "share": row["shares"][name],
        }
        for name in STAGES
    }
    shown = {"batch": row["batch"], **figures, "peak_megabytes": row["peak_megabytes"]}
    return conditions.result("Tokenizing speed", shown, [row])


def bench_load(
    *,
    data: str | None = None,
    recipe: str = RECIPE,
    batch_size: int = 64,
    steps: int = 10,
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Time the reading of a latent set, alone and beside training steps.

    Args:
        data: folder or name of a latent set; by default the newest.
        recipe: whose steps wait for it.
        batch_size: sequences a batch.
        steps: batches a repeat.
        repeats: rounds that count.
        warm_up: rounds before.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        examples and megabytes per second, and the share of a step that waits.

    Raises:
        LatentLMError: anything that the user can mend; a batch that does not fit among it.
    """
    where = resolve_device(device)
    config = class_recipe(recipe)
    require_counts((batch_size,), repeats, warm_up, steps)
    options = {
        "data": data,
        "recipe": recipe,
        "batch_size": batch_size,
        "steps": steps,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    latents = open_latents(data, progress)
    conditions = Conditions(where, options, progress)
    manifest = latents.manifest
    alone, beside = (
        stored_batches(latents, config, batch_size, manifest.num_positions, place)
        for place in (torch.device("cpu"), where)
    )

    def measure(_: int) -> dict[str, Any]:
        loop = TrainingLoop(model_of(config, latents), config, where, beside)
        (reading,) = take_turns((partial(_read, alone, steps),), repeats, warm_up, where)
        (share,), (training,) = time_loops([loop], steps, repeats, warm_up, where)
        stored = sum(shard.num_bytes for shard in manifest.shards)
        megabytes = stored / len(latents) / latents.num_variants / 1e6
        return {
            "batch": batch_size,
            "examples_per_second": reading.rates(steps * batch_size),
            "megabytes_per_second": reading.rates(steps * batch_size * megabytes),
            "step_seconds": round(training.median / steps, 5),
            "data_wait_share": share,
        }

    row = each_batch((batch_size,), where, measure)[batch_size]
    figures = {
        "examples": len(latents),
        "examples_per_second": row["examples_per_second"]["median"],
        "megabytes_per_second": row["megabytes_per_second"]["median"],
        "step_seconds": row["step_seconds"],
        "data_wait_share": row["data_wait_share"],
    }
    return conditions.result(f"Reading of {manifest.name}", figures, [row])


def _tokenizer(
    vae: str | None, recipe: str | None, device: torch.device, progress: Progress
) -> SigmaVAE:
    if recipe is None:
        return load_tokenizer(find_export(vae, "sigma-vae", progress), device).model
    with seeded_init("bench"):
        return build_tokenizer(vae_recipe(recipe).tokenizer).to(device)


def _first(source: Any, views: LatentViews, indices: list[int]) -> torch.Tensor:
    """Crops (n, S, S, 3) uint8 of some images, read and decoded."""
    (decoded,) = decode(source, views, iter([indices]), 0)
    return decoded.views[:, 0]


def _read(batches: Iterator[Any], steps: int) -> None:
    for _ in range(steps):
        next(batches)
