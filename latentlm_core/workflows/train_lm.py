"""``latentlm train-lm``: latents and texts => a LatentLM, or a baseline."""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentlm_core.artifacts import Generator, build_generator, save_generator
from latentlm_core.data.mixture import MultimodalDataConfig
from latentlm_core.export_config import GeneratorExport
from latentlm_core.figures import loss_curves
from latentlm_core.files import TOKENIZER_FOLDER
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.pretrained import read_backbone
from latentlm_core.processes import TRAINING_PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import lm_recipe, lm_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device, seeded_init
from latentlm_core.training.lm_task import DiTTask, LMLossConfig, LMTask
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer, TrainResult
from latentlm_core.workflows.lm_jobs import make_job
from latentlm_core.workflows.lm_start import begin_with
from latentlm_core.workflows.runs import (
    acknowledge,
    decisive,
    default_recipe,
    describe,
    is_complete,
    provenance,
    run_name,
    training_figures,
)
from latentlm_core.workflows.step_memory import fitting_step
from latentlm_core.workflows.training_data import TrainingData
from latentlm_core.workflows.workspace import EXPORT, workspace


@joined(TRAINING_PATIENCE)
def train_lm(
    *,
    data: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    init: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Train a LatentLM or a baseline, or go on with it, and export it.

    Several processes train it together.

    Args:
        data: folder or name of a latent set, by default the newest; or a mix of sets and texts, as
            ``data.mixture`` reads it.
        recipe: a name or a file; by default the one named like the set's data, else the paper's.
        overrides: ``KEY=VALUE`` changes to the recipe.
        init: a language model to begin with, as ``read_backbone`` takes it; its sizes and its text
            tokenizer take the place of the recipe's.
        out: run folder; by default ``runs/lm-LATENTS``.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        figures of the last validation, and where things are.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    processes = current()
    with processes.main_first():
        learned = TrainingData.open(data, not dry_run, progress)
    chosen = recipe or default_recipe(
        learned.source, _recipes(learned), _paper_recipe(learned), progress
    )
    with processes.main_first():
        start = None if init is None else read_backbone(init)
    config = lm_recipe(chosen, overrides)
    if start is not None:
        config = begin_with(start, config, overrides, progress)
    folder = out or workspace() / "runs" / run_name("lm", learned.name, recipe)
    where = resolve_device(device)
    acknowledge(learned.source, progress)
    with processes.main_first():
        job = make_job(learned, config)
    size = job.size
    with seeded_init("generator", config.trainer.seed), torch.device("meta" if dry_run else "cpu"):
        model = build_generator(size)
    if start is not None and isinstance(model, LatentLM) and job.text and not dry_run:
        start.load_into(model, job.text.num_text_ids)
    plan = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": sum(map(len, learned.sets.values())),
        **job.plan,
    }
    if dry_run:
        return Result(f"Plan of a {size.kind} run", plan, {"run": str(folder)}, config.to_dict())

    origin = job.origin | ({} if start is None else {"init": start.provenance()})
    curves = folder / "curves.png"

    def finish(result: TrainResult) -> None:
        if is_complete(result, folder):
            return
        latents = learned.latents
        export = GeneratorExport(
            model=size,
            stats=job.stream.stats,
            tokenizer_sha256=None if latents is None else latents.manifest.tokenizer_sha256,
            sampler=config.sampler,
            provenance=provenance(learned.source, chosen, config.to_dict(), result, where),
            **job.facts,
        )
        tokenizer = None if latents is None else latents.folder / TOKENIZER_FOLDER
        save_generator(folder / EXPORT, model, export, tokenizer, job.text)
        processes.once(lambda: loss_curves(read_metrics(result.metrics_path), curves))
        describe(folder, origin, config, result)

    trainer = Trainer(
        config.trainer,
        _task(model, config.loss),
        job.stream,
        {"model": config.optimizer},
        folder,
        where,
        {"origin": origin, "recipe": decisive(config)},
        progress,
        schema={"recipe": config},
    )
    with fitting_step(config, where):
        result = trainer.run(finish)
    figures = {"step": result.step, **plan, **training_figures(result)}
    files = {
        "export": str(folder / EXPORT),
        "curves": str(curves),
        "log": str(result.metrics_path),
    }
    story = provenance(learned.source, chosen, config.to_dict(), result, where)
    return Result(f"{size.kind} trained", figures, files, story)


def _task(model: Generator, loss: LMLossConfig) -> LMTask | DiTTask:
    return DiTTask(model, loss) if isinstance(model, DiT) else LMTask(model, loss)


def _recipes(data: TrainingData) -> tuple[str, ...]:
    """The named recipes that may be taken for some data: of a mix, those of text and images."""
    names = lm_recipe_names()
    if not data.is_mix:
        return names
    return tuple(n for n in names if isinstance(lm_recipe(n).data, MultimodalDataConfig))


def _paper_recipe(data: TrainingData) -> str:
    """The recipe of the paper for some data."""
    if data.is_mix or data.latents is None:
        return "multimodal-1.3b"
    return "tts-24l" if data.latents.is_ragged else "latentlm-l"
