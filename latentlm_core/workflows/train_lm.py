"""``latentlm train-lm``: latents => a LatentLM or a DiT."""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentlm_core.artifacts import (
    Generator,
    GeneratorExport,
    build_generator,
    save_generator,
)
from latentlm_core.data.shards import LatentSet
from latentlm_core.figures import loss_curves
from latentlm_core.files import TOKENIZER_FOLDER, write_json
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import lm_recipe, lm_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device, seeded_init
from latentlm_core.training.lm_task import DiTTask, LMLossConfig, LMTask
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer
from latentlm_core.workflows.lm_jobs import make_job
from latentlm_core.workflows.runs import (
    decisive,
    default_recipe,
    is_exported,
    provenance,
    run_name,
    validation_figures,
)
from latentlm_core.workflows.workspace import EXPORT, find_latents, workspace

READ_AHEAD = 4
"""Batches that are made while a GPU computes."""


def train_lm(
    *,
    data: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Train a LatentLM or a DiT on a latent set, or go on with it, and export it.

    Args:
        data: folder or name of a latent set; by default the newest.
        recipe: a name or a file; by default the one named like the set's data, else
            ``latentlm-l``.
        overrides: ``KEY=VALUE`` changes to the recipe.
        out: run folder; by default ``runs/lm-LATENTS``.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        figures of the last validation, and where things are.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    latents = LatentSet.open(find_latents(data, progress), verify=not dry_run)
    manifest = latents.manifest
    otherwise = "tts-24l" if latents.is_ragged else "latentlm-l"
    chosen = recipe or default_recipe(manifest.data, lm_recipe_names(), otherwise, progress)
    config = lm_recipe(chosen, overrides)
    folder = out or workspace() / "runs" / run_name("lm", manifest.name, recipe)
    where = resolve_device(device)
    read_ahead = READ_AHEAD if where.type == "cuda" else 0
    job = make_job(latents, config, read_ahead)
    size = job.size
    with seeded_init("generator", config.trainer.seed), torch.device("meta" if dry_run else "cpu"):
        model = build_generator(size)
    plan = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": len(latents),
        **job.plan,
    }
    if dry_run:
        return Result(f"Plan of a {size.kind} run", plan, {"run": str(folder)}, config.to_dict())

    origin = {
        "latents": manifest.name,
        "data": manifest.data,
        "statistics": manifest.statistics.to_dict(),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "text_sha256": None if job.text is None else job.text.sha256,
    }
    result = Trainer(
        config.trainer,
        _task(model, config.loss),
        job.stream,
        {"model": config.optimizer},
        folder,
        where,
        {"origin": origin, "recipe": decisive(config)},
        progress,
    ).run()
    story = provenance(manifest.data, chosen, config.to_dict(), result, where)
    curves = folder / "curves.png"
    if not is_exported(result, folder):
        write_json(folder / "config.json", {"origin": origin, "recipe": config.to_dict()})
        export = GeneratorExport(
            model=size,
            stats=job.stream.stats,
            classes=manifest.classes,
            tokenizer_sha256=manifest.tokenizer_sha256,
            sampler=config.sampler,
            provenance=story,
            **job.facts,
        )
        tokenizer = latents.folder / TOKENIZER_FOLDER
        save_generator(folder / EXPORT, model, export, tokenizer, job.text)
        loss_curves(read_metrics(result.metrics_path), curves)
    figures = {"step": result.step, **plan, **validation_figures(result)}
    files = {
        "export": str(folder / EXPORT),
        "curves": str(curves),
        "log": str(result.metrics_path),
    }
    return Result(f"{size.kind} trained", figures, files, story)


def _task(model: Generator, loss: LMLossConfig) -> LMTask | DiTTask:
    return LMTask(model, loss) if isinstance(model, LatentLM) else DiTTask(model, loss)
