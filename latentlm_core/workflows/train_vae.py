"""``latentlm train-vae``: images => a sigma-VAE."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentlm_core.artifacts import TokenizerExport, save_tokenizer
from latentlm_core.data.media import to_tensor
from latentlm_core.data.sources import Source, open_with_held_out, spread
from latentlm_core.data.stream import MediaStream
from latentlm_core.evaluation.image_sets import image_source
from latentlm_core.figures import comparison_grid, loss_curves
from latentlm_core.files import write_json
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import VAERecipe, vae_recipe, vae_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import evaluating, resolve_device
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.lpips import load_lpips
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.training.gan_memory import forecast_gan_memory
from latentlm_core.training.hardware import autocast_dtype
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer
from latentlm_core.training.vae_task import VAETask
from latentlm_core.workflows.runs import (
    decisive,
    default_recipe,
    is_exported,
    provenance,
    run_name,
    validation_figures,
)
from latentlm_core.workflows.workspace import EXPORT, workspace

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
    chosen = recipe or default_recipe(data, vae_recipe_names(), "imagenet", progress)
    config = vae_recipe(chosen, overrides)
    folder = out or workspace() / "runs" / run_name("vae", data, recipe)
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
    dtype = autocast_dtype(config.trainer.precision, where)
    _tell_gan_memory(task, stream, where, dtype, progress)
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
    origin = provenance(data, chosen, config.to_dict(), result, where)
    pictures = {name: str(folder / f"{name}.png") for name in ("curves", "reconstructions")}
    if not is_exported(result, folder):
        write_json(folder / "config.json", {"origin": data, "recipe": config.to_dict()})
        export = TokenizerExport(tokenizer=config.tokenizer, provenance=origin)
        save_tokenizer(folder / EXPORT, vae, export)
        _draw(folder, vae, held_out, where)
    skipped = [item.to_dict() for item in (*stream.skipped, *stream.skipped_held_out)]
    figures = {
        "step": result.step,
        **plan,
        **validation_figures(result),
        "skipped_images": len(skipped),
    }
    files = {"export": str(folder / EXPORT), **pictures, "log": str(result.metrics_path)}
    return Result("sigma-VAE trained", figures, files, origin | {"skipped": skipped})


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
    task: VAETask,
    stream: MediaStream,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    if task.critic is None:
        return
    for module in task.modules.values():
        module.to(device)
    forecast = forecast_gan_memory(task, next(iter(stream.batches(0))).to(device), dtype)
    progress.note(
        f"Training takes at least {forecast.without_gan / GIB:.2f} GiB, and "
        f"{forecast.with_gan / GIB:.2f} GiB once the discriminator starts at step "
        f"{task.config.gan_start_step}."
    )


def _draw(folder: Path, vae: SigmaVAE, held_out: Source, device: torch.device) -> None:
    """Loss curves, and held-out images from all over the set beside their reconstructions."""
    loss_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
    shown = image_source(spread(held_out, NUM_PICTURED), vae.image_size)
    images = next(shown.batches(NUM_PICTURED))
    media = to_tensor(images).to(device)
    with evaluating(vae):
        rebuilt = vae.decode(vae.encode(media).mode(), vae.grid(media.shape))
    comparison_grid(media.cpu(), rebuilt.cpu(), folder / "reconstructions.png")
