"""``latentlm bench train``: steps and tokens per second, and what of the arithmetic is reached."""

from collections.abc import Sequence
from typing import Any

from latentlm_core.data.packing import LatentDataConfig
from latentlm_core.errors import ConfigError
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.cost import training_flops
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.training.hardware import autocast_dtype
from latentlm_core.training.peak import peak_flops
from latentlm_core.workflows.bench import (
    Conditions,
    Memory,
    each_batch,
    require_counts,
)
from latentlm_core.workflows.bench_loop import (
    RECIPE,
    TrainingLoop,
    class_recipe,
    encoded_batches,
    model_of,
    open_latents,
    stored_batches,
    time_loops,
)
from latentlm_core.workflows.bench_models import default_latents, sized_model


def bench_train(
    *,
    recipe: str = RECIPE,
    overrides: Sequence[str] = (),
    data: str | None = None,
    batches: Sequence[int] = (),
    num_latents: int | None = None,
    encode: bool = False,
    steps: int = 10,
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Time the training of a class-conditional model.

    Args:
        recipe: what is trained, and how.
        overrides: ``KEY=VALUE`` changes to it.
        data: folder or name of a latent set; by default latents that are drawn once.
        batches: sequences a step, each measured; by default the recipe's.
        num_latents: T, where there is no ``data``.
        encode: also train with images encoded at every step, as the published code does.
        steps: a repeat.
        repeats: rounds that count.
        warm_up: rounds before.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        steps and tokens per second, model FLOPs utilisation and the share of waiting, as
        ``training.pace`` defines them.

    Raises:
        LatentLMError: anything that the user can mend; a batch that does not fit among it.
    """
    where = resolve_device(device)
    config = class_recipe(recipe, overrides)
    assert isinstance(config.data, LatentDataConfig), "class_recipe says so"
    batches = batches or (config.data.batch_size,)
    require_counts(batches, repeats, warm_up, steps)
    if encode and data is None:
        raise ConfigError(
            "--encode needs the latent set whose images are encoded: name it by --data."
        )
    if data is not None and num_latents is not None:
        raise ConfigError("--data has a number of latents of its own: leave --latents out.")
    options = {
        "recipe": recipe,
        "overrides": list(overrides),
        "data": data,
        "batches": list(batches),
        "encode": encode,
        "steps": steps,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    latents = None if data is None else open_latents(data, progress)
    if latents is None:
        num_positions = num_latents or default_latents(recipe)
        size = sized_model(config.model, num_positions)
    else:
        num_positions, size = latents.manifest.num_positions, model_of(config, latents)
    conditions, memory = Conditions(where, options, progress), Memory(where)
    dtype = autocast_dtype(config.trainer.precision, where)
    peak = peak_flops(where, dtype)

    def measure(batch: int) -> dict[str, Any]:
        memory.restart()
        batched = stored_batches(latents, config, batch, num_positions, where)
        loops = [TrainingLoop(size, config, where, batched)]
        if encode and latents is not None:
            loops.append(TrainingLoop(size, config, where, encoded_batches(latents, batch, where)))
        shares, timings = time_loops(loops, steps, repeats, warm_up, where)
        layout = SequenceLayout.of_images(batch, num_positions)
        ours, flops = timings[0], training_flops(size, layout) * steps
        row: dict[str, Any] = {
            "batch": batch,
            "steps_per_second": ours.rates(steps),
            "images_per_second": ours.rates(steps * batch),
            "tokens_per_second": ours.rates(steps * layout.extent.positions),
            "flops_utilisation": round(flops / ours.median / peak, 4),
            "data_wait_share": shares[0],
            "peak_megabytes": memory.peak_megabytes,
        }
        if encode:
            row["encoding_images_per_second"] = timings[1].rates(steps * batch)
            row["ratio"] = round(timings[1].median / ours.median, 3)
        return row

    rows = each_batch(batches, where, measure, progress)
    about = {"precision": str(dtype).removeprefix("torch."), "tokens": num_positions}
    figures = {f"batch {batch}": _shown(row) for batch, row in rows.items()}
    found = {"peak_teraflops": round(peak / 1e12, 3)}
    return conditions.result(
        f"Training speed of {recipe}",
        {**about, **figures, **found},
        list(rows.values()),
        **about,
        **found,
    )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row a person wants to see."""
    rate = row["images_per_second"]
    shown = {name: row[name]["median"] for name in ("steps_per_second", "tokens_per_second")}
    shown |= {
        "images_per_second": rate["median"],
        "spread": f"{rate['min']:.4g} to {rate['max']:.4g}",
    }
    names = ("flops_utilisation", "data_wait_share", "peak_megabytes")
    shown |= {name: row[name] for name in names}
    if "ratio" in row:
        shown["encoding"] = row["encoding_images_per_second"]["median"]
        shown["ratio"] = row["ratio"]
    return shown
