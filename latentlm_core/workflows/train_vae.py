"""``latentlm train-vae``: images or recordings => a sigma-VAE."""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentlm_core.artifacts import TokenizerExport, save_tokenizer
from latentlm_core.data.sources import SPEECH_SETS
from latentlm_core.data.speech_stream import SpeechStream
from latentlm_core.data.stream import MediaStream
from latentlm_core.figures import loss_curves
from latentlm_core.files import write_json
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import vae_recipe, vae_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.training.gan_memory import AnyVAETask, forecast_gan_memory
from latentlm_core.training.hardware import autocast_dtype
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer
from latentlm_core.workflows.runs import (
    acknowledge,
    decisive,
    default_recipe,
    is_exported,
    provenance,
    run_name,
    validation_figures,
)
from latentlm_core.workflows.vae_jobs import make_job, skipped_items
from latentlm_core.workflows.workspace import EXPORT, workspace

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
        data: a data set, as ``open_source`` takes it, or ``open_speech`` for a recipe of speech.
        recipe: a name or a file; by default the one named like the data, else ``imagenet``, or
            ``speech-7.5hz`` for a set of recordings.
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
    otherwise = "speech-7.5hz" if data.partition(":")[0] in SPEECH_SETS else "imagenet"
    chosen = recipe or default_recipe(data, vae_recipe_names(), otherwise, progress)
    config = vae_recipe(chosen, overrides)
    folder = out or workspace() / "runs" / run_name("vae", data, recipe)
    where = resolve_device(device)
    acknowledge(data, progress)
    vae = build_tokenizer(config.tokenizer, config.trainer.seed)
    job = make_job(data, config, vae)
    plan = job.plan
    if dry_run:
        return Result("Plan of a sigma-VAE run", plan, {"run": str(folder)}, config.to_dict())

    task, stream = job.task(where, progress), job.stream(progress)
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
    files = {
        "export": str(folder / EXPORT),
        "curves": str(folder / "curves.png"),
        "reconstructions": str(folder / "reconstructions.png"),
        "log": str(result.metrics_path),
    }
    if not is_exported(result, folder):
        write_json(folder / "config.json", {"origin": data, "recipe": config.to_dict()})
        export = TokenizerExport(tokenizer=config.tokenizer, provenance=origin)
        save_tokenizer(folder / EXPORT, vae, export)
        loss_curves(read_metrics(result.metrics_path), folder / "curves.png")
        files |= job.show(folder, where)
    skipped = [item.to_dict() for item in skipped_items(stream)]
    figures = {
        "step": result.step,
        **plan,
        **validation_figures(result),
        "skipped": len(skipped),
    }
    return Result("sigma-VAE trained", figures, files, origin | {"skipped": skipped})


def _tell_gan_memory(
    task: AnyVAETask,
    stream: MediaStream | SpeechStream,
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
