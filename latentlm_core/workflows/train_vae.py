"""``latentlm train-vae``: images => a sigma-VAE."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentlm_core.artifacts import TokenizerExport, save_tokenizer
from latentlm_core.data.media import to_tensor
from latentlm_core.data.sources import Source, Subset, open_with_held_out
from latentlm_core.data.stream import MediaStream
from latentlm_core.evaluation.image_sets import image_source
from latentlm_core.figures import comparison_grid, loss_curves
from latentlm_core.files import write_json
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import LMRecipe, VAERecipe, vae_recipe, vae_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import evaluating, machine, resolve_device, versions
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.lpips import load_lpips
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.training.gan_memory import forecast_gan_memory
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer, TrainResult
from latentlm_core.training.vae_task import VAETask
from latentlm_core.workflows.workspace import EXPORT, slug, workspace

NUM_PICTURED = 32
"""Held-out images that are shown beside their reconstructions."""
GIB = 2**30


def train_vae(
    *,
    data: str,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Train a sigma-VAE, or go on with it, and export it.

    Args:
        data: a data set, as ``data.sources.open_source`` takes it.
        recipe: a name or a file; by default the one named like the data, else ``imagenet``.
        overrides: ``KEY=VALUE`` changes to the recipe.
        out: run folder; by default ``runs/vae-DATA``.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        figures of the last validation, and where things are.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    train, held_out = open_with_held_out(data)
    chosen = recipe or default_recipe(data, progress)
    config = vae_recipe(chosen, overrides)
    folder = out or workspace() / "runs" / _run_name(data, recipe)
    where = resolve_device(device)
    vae = build_tokenizer(config.tokenizer, config.trainer.seed)
    plan = _plan(config, vae, train, held_out)
    if dry_run:
        return Result("Plan of a sigma-VAE run", plan, {"run": str(folder)}, config.to_dict())

    perceptual = (
        load_lpips(config.loss.perceptual_net, progress=progress).to(where)
        if config.loss.perceptual_weight
        else None
    )
    task = VAETask(vae, config.loss, perceptual, config.trainer.seed)
    stream = MediaStream(
        train,
        vae.image_size,
        config.data.batch_size,
        config.trainer.seed,
        flip=config.data.flip,
        num_workers=config.data.num_workers,
        held_out=held_out,
        progress=progress,
    )
    _tell_gan_memory(task, stream, where, progress)
    result = Trainer(
        config.trainer,
        task,
        stream,
        {"generator": config.optimizer, "critic": config.critic_optimizer},
        folder,
        where,
        {"origin": data, "recipe": decisive(config)},
        progress,
    ).run()
    write_json(folder / "config.json", {"origin": data, "recipe": config.to_dict()})

    provenance = run_provenance(data, chosen, config.to_dict(), result, where)
    export = TokenizerExport(tokenizer=config.tokenizer, provenance=provenance)
    save_tokenizer(folder / EXPORT, vae, export)
    pictures = _draw(folder, vae, held_out, where)
    figures = {"step": result.step, **plan, **validation_figures(result)}
    files = {"export": str(folder / EXPORT), **pictures, "log": str(result.metrics_path)}
    return Result("sigma-VAE trained", figures, files, provenance)


def default_recipe(data: str, progress: Progress) -> str:
    """The recipe named like the data set, else the paper's."""
    name = data.partition(":")[0]
    known = {"embedded": "tiny"} | {recipe: recipe for recipe in vae_recipe_names()}
    chosen = known.get(name, "imagenet")
    progress.note(f"Using the recipe {chosen}")
    return chosen


def decisive(recipe: VAERecipe | LMRecipe) -> dict[str, Any]:
    """What a resumed run must have in common with its start, besides trainer and optimizers."""
    indifferent: dict[str, Any] = {
        "trainer": True,
        "optimizer": True,
        "critic_optimizer": True,
        "sampler": True,
        "data": {"num_workers"},
    }
    return recipe.model_dump(mode="json", exclude=indifferent)


def run_provenance(
    data: str, recipe: str, config: dict[str, Any], result: TrainResult, device: torch.device
) -> dict[str, Any]:
    """What an export says about the run that it comes from."""
    return {
        "data": data,
        "recipe": recipe,
        "config": config,
        "step": result.step,
        "samples_seen": result.samples_seen,
        "figures": result.figures,
        "machine": machine(device),
        "versions": versions(),
    }


def validation_figures(result: TrainResult) -> dict[str, float | None]:
    """The last validation's figures, and how long the run took."""
    validation = {
        name.removeprefix("validation/"): value
        for name, value in result.figures.items()
        if name.startswith("validation/")
    }
    return {**validation, "training_seconds": round(result.seconds, 1)}


def _run_name(data: str, recipe: str | None) -> str:
    return f"vae-{slug(data)}" + (f"-{slug(Path(recipe).stem)}" if recipe else "")


def _plan(config: VAERecipe, vae: SigmaVAE, train: Source, held_out: Source) -> dict[str, Any]:
    samples = config.trainer.total_steps * config.trainer.accumulate * config.data.batch_size
    grid = vae.grid((3, vae.image_size, vae.image_size))
    return {
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "latents": f"{'x'.join(map(str, grid))} of {vae.latent_channels}",
        "training_images": len(train),
        "held_out_images": len(held_out),
        "epochs": round(samples / len(train), 2),
    }


def _tell_gan_memory(
    task: VAETask, stream: MediaStream, device: torch.device, progress: Progress
) -> None:
    if task.critic is None:
        return
    for module in task.modules.values():
        module.to(device)
    forecast = forecast_gan_memory(task, next(iter(stream.batches(0))).to(device))
    progress.note(
        f"Training takes at least {forecast.without_gan / GIB:.2f} GiB, and "
        f"{forecast.with_gan / GIB:.2f} GiB once the discriminator starts at step "
        f"{task.config.gan_start_step}."
    )


def _draw(folder: Path, vae: SigmaVAE, held_out: Source, device: torch.device) -> dict[str, str]:
    """Loss curves, and held-out images from all over the set beside their reconstructions."""
    curves, pairs = folder / "curves.png", folder / "reconstructions.png"
    loss_curves(read_metrics(folder / "metrics.jsonl"), curves)
    count = min(NUM_PICTURED, len(held_out))
    spread = Subset(held_out, [place * len(held_out) // count for place in range(count)])
    images = next(image_source(spread, vae.image_size).batches(count))
    media = to_tensor(images).to(device)
    with evaluating(vae):
        rebuilt = vae.decode(vae.encode(media).mode(), vae.grid(media.shape))
    comparison_grid(media.cpu(), rebuilt.cpu(), pairs)
    return {"curves": str(curves), "reconstructions": str(pairs)}
