"""``latentlm train-vae``: images or recordings => a sigma-VAE."""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentlm_core.artifacts import load_tokenizer, save_tokenizer
from latentlm_core.data.sources import SPEECH_SETS
from latentlm_core.data.speech_stream import SpeechStream
from latentlm_core.data.stream import MediaStream
from latentlm_core.export_config import TokenizerExport
from latentlm_core.figures import loss_curves
from latentlm_core.processes import TRAINING_PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import VAERecipe, vae_recipe, vae_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.training.gan_memory import AnyVAETask, forecast_gan_memory
from latentlm_core.training.hardware import autocast_dtype
from latentlm_core.training.parallel import StepShare
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer, TrainResult
from latentlm_core.workflows.runs import (
    acknowledge,
    decisive,
    default_recipe,
    describe,
    is_complete,
    provenance,
    run_name,
    skipped_by_all,
    training_figures,
)
from latentlm_core.workflows.step_memory import fitting_step
from latentlm_core.workflows.vae_jobs import VAEJob, make_job, skipped_items
from latentlm_core.workflows.workspace import EXPORT, workspace

GIB = 2**30


@joined(TRAINING_PATIENCE)
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
    """Train a sigma-VAE, or go on with it, and export it; several processes train it together.

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
    processes = current()
    otherwise = "speech-7.5hz" if data.partition(":")[0] in SPEECH_SETS else "imagenet"
    chosen = recipe or default_recipe(data, vae_recipe_names(), otherwise, progress)
    config = vae_recipe(chosen, overrides)
    folder = out or workspace() / "runs" / run_name("vae", data, recipe)
    where = resolve_device(device)
    acknowledge(data, progress)
    vae = build_tokenizer(config.tokenizer, config.trainer.seed)
    with processes.main_first():
        job = make_job(data, config, vae)
    plan = job.plan
    if dry_run:
        return Result("Plan of a sigma-VAE run", plan, {"run": str(folder)}, config.to_dict())

    with processes.main_first():
        task = job.task(where, progress)
    stream = job.stream(progress)
    _tell_gan_memory(task, stream, where, config, progress)
    files = {
        "export": str(folder / EXPORT),
        "curves": str(folder / "curves.png"),
        "reconstructions": str(folder / "reconstructions.png"),
        "log": str(folder / "metrics.jsonl"),
    }

    def finish(result: TrainResult) -> None:
        if is_complete(result, folder):
            return
        origin = provenance(data, chosen, config.to_dict(), result, where)
        export = TokenizerExport(tokenizer=config.tokenizer, provenance=origin)
        save_tokenizer(folder / EXPORT, vae, export)
        files.update(processes.once(lambda: _show(job, folder, where)))
        describe(folder, data, config, result)

    trainer = Trainer(
        config.trainer,
        task,
        stream,
        {"generator": config.optimizer, "critic": config.critic_optimizer},
        folder,
        where,
        {"origin": data, "recipe": decisive(config)},
        progress,
        schema={"recipe": config},
    )
    with fitting_step(config, where):
        result = trainer.run(finish)
    skipped = skipped_by_all(skipped_items(stream))
    figures = {
        "step": result.step,
        **plan,
        **training_figures(result),
        "skipped": len(skipped),
    }
    story = provenance(data, chosen, config.to_dict(), result, where)
    return Result("sigma-VAE trained", figures, files, story | {"skipped": skipped})


def _show(job: VAEJob, folder: Path, device: torch.device) -> dict[str, str]:
    """Draw the run, and what its export makes of held-out examples; the paths of the latter."""
    loss_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
    return job.show(load_tokenizer(folder / EXPORT, device).model, folder, device)


def _tell_gan_memory(
    task: AnyVAETask,
    stream: MediaStream | SpeechStream,
    device: torch.device,
    config: VAERecipe,
    progress: Progress,
) -> None:
    """Forecast the memory of a process that holds the whole model and all of its activations."""
    trainer, processes = config.trainer, current()
    is_sharded = trainer.parallel == "fsdp" and processes.size > 1
    if task.critic is None or is_sharded or trainer.recompute or not processes.is_main:
        return
    for module in task.modules.values():
        module.to(device)
    share = StepShare.of(trainer.accumulate, processes)
    batch = next(iter(stream.batches([0], share.rows))).to(device)
    dtype = autocast_dtype(trainer.precision, device)
    forecast = forecast_gan_memory(task, batch, dtype)
    progress.note(
        f"Training takes at least {forecast.without_gan / GIB:.2f} GiB, and "
        f"{forecast.with_gan / GIB:.2f} GiB once the discriminator starts at step "
        f"{task.config.gan_start_step}."
    )
