"""``latentlm bench load``: the reading of latents, alone and beside training steps."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.workflows.bench import (
    Conditions,
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

    def measure(batch: int) -> dict[str, Any]:
        alone, beside = (
            stored_batches(latents, config, batch, manifest.num_positions, place)
            for place in (torch.device("cpu"), where)
        )
        loop = TrainingLoop(model_of(config, latents), config, where, beside)
        (reading,) = take_turns((partial(_read, alone, steps),), repeats, warm_up, where)
        (share,), (training,) = time_loops([loop], steps, repeats, warm_up, where)
        stored = sum(shard.num_bytes for shard in manifest.shards)
        megabytes = stored / len(latents) / latents.num_variants / 1e6
        return {
            "batch": batch,
            "examples_per_second": reading.rates(steps * batch),
            "megabytes_per_second": reading.rates(steps * batch * megabytes),
            "step_seconds": round(training.median / steps, 5),
            "data_wait_share": share,
        }

    (row,) = each_batch((batch_size,), where, measure, progress).values()
    figures = {
        "examples": len(latents),
        "examples_per_second": row["examples_per_second"]["median"],
        "megabytes_per_second": row["megabytes_per_second"]["median"],
        "step_seconds": row["step_seconds"],
        "data_wait_share": row["data_wait_share"],
    }
    return conditions.result(f"Reading of {manifest.name}", figures, [row])


def _read(batches: Iterator[Any], steps: int) -> None:
    for _ in range(steps):
        next(batches)
