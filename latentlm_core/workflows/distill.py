"""``latentlm train-lm --distill``: a LatentLM => the same with a head of a few evaluations.

It learns on the latents that its teacher learned on, in the teacher's normalisation; all but the
head, and what tells how to sample, is the teacher's export once more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentlm_core.artifacts import LoadedGenerator, load_generator, save_generator
from latentlm_core.config import build
from latentlm_core.data.guided import Guidance, GuidedStream
from latentlm_core.errors import ArtifactError, ConfigError
from latentlm_core.figures import loss_curves
from latentlm_core.files import TOKENIZER_FOLDER
from latentlm_core.models.few_step import FewStepConfig, FewStepHead
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.processes import TRAINING_PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import DistillRecipe, LMRecipe, distill_recipe, distill_recipe_names
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device, seeded_init
from latentlm_core.sampling import SamplerConfig
from latentlm_core.training.distill_task import DistillTask
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer, TrainResult
from latentlm_core.workflows.lm_jobs import ClassJob, MultimodalJob, SpeechJob, make_job
from latentlm_core.workflows.runs import (
    acknowledge,
    decisive,
    describe,
    is_complete,
    provenance,
    training_figures,
)
from latentlm_core.workflows.step_memory import fitting_step
from latentlm_core.workflows.training_data import TrainingData
from latentlm_core.workflows.workspace import EXPORT, find_export, run_name_of, workspace

Job = ClassJob | SpeechJob | MultimodalJob

UNDROPPED: dict[str, dict[str, Any]] = {
    "classes": {"label_drop": 0.0},
    "speech": {"condition_drop": 0.0, "curriculum_batches": 0},
    "multimodal": {"condition_drop": 0.0},
}
"""What batches are made differently from the teacher's, by the kind of its data."""


@joined(TRAINING_PATIENCE)
def distill(
    *,
    teacher: str,
    data: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Distill the head of a LatentLM, or go on with it, and export the model with it.

    Several processes train it together.

    Args:
        teacher: run, export or hub id of a LatentLM.
        data: what it learned from, as ``train_lm`` takes it; by default the newest latent set.
        recipe: a name or a file; by default the one named like the teacher's, else ``few-step``.
        overrides: ``KEY=VALUE`` changes to the recipe.
        out: run folder; by default ``runs/TEACHER-few-step``.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        figures of the last validation, and where things are.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    processes = current()
    where = resolve_device(device)
    with processes.main_first():
        export = find_export(teacher, "generator", progress)
    loaded = load_generator(export, where)
    model, size, taught = _require_teacher(loaded)
    with processes.main_first():
        learned = TrainingData.open(data, not dry_run, progress)
    chosen = recipe or _default_recipe(loaded, progress)
    batches = taught.data.to_dict()
    config = distill_recipe(chosen, batches | UNDROPPED[taught.data.kind], overrides)
    few_step = _few_step(config, loaded)
    acknowledge(learned.source, progress)
    with processes.main_first():
        job = make_job(
            learned,
            taught.model_copy(update={"data": config.data, "trainer": config.trainer}),
        )
    _require_its_data(learned, job, loaded)

    folder = out or workspace() / "runs" / f"{run_name_of(teacher, loaded.folder)}-few-step"
    with seeded_init("few-step head", config.trainer.seed):
        student = FewStepHead.of_teacher(model.head)
    plan = {
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "steps": ", ".join(map(str, few_step.steps)),
        "guidance_scale": few_step.guidance_scale,
        "teacher": str(loaded.folder),
        "examples": sum(map(len, learned.sets.values())),
        **job.plan,
    }
    if dry_run:
        return Result("Plan of a distillation", plan, {"run": str(folder)}, config.to_dict())

    head, model.head = model.head, student
    task = DistillTask(model, head, config.distill, few_step.guidance_interval)
    origin = job.origin | {"teacher": loaded.sha256}
    curves = folder / "curves.png"

    def finish(result: TrainResult) -> None:
        if is_complete(result, folder):
            return
        story = provenance(learned.source, chosen, config.to_dict(), result, where)
        taught_by = {"sha256": loaded.sha256, "provenance": loaded.config.provenance}
        exported = loaded.config.model_copy(
            update={
                "model": size.model_copy(update={"few_step": few_step}),
                "weights_sha256": None,
                "sampler": _sampler(few_step),
                "provenance": story | {"teacher": taught_by},
            }
        )
        inside = loaded.folder / TOKENIZER_FOLDER
        save_generator(folder / EXPORT, model, exported, inside, loaded.text)
        processes.once(lambda: loss_curves(read_metrics(result.metrics_path), curves))
        describe(folder, origin, config, result)

    trainer = Trainer(
        config.trainer,
        task,
        GuidedStream(job.stream, _guidance(few_step, job)),
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
    return Result("few-step head distilled", figures, files, story)


def _require_teacher(loaded: LoadedGenerator) -> tuple[LatentLM, LatentLMConfig, LMRecipe]:
    """The model, its configuration and its recipe, where its head can be distilled.

    Raises:
        ArtifactError: saying why not.
    """
    config = loaded.config
    model, size = loaded.model, config.model
    if not isinstance(model, LatentLM) or not isinstance(size, LatentLMConfig):
        raise ArtifactError(
            f"{loaded.folder} is a {size.kind}, and --distill is for the heads of LatentLMs."
        )
    if size.few_step is not None:
        raise ArtifactError(
            f"{loaded.folder} has a few-step head already.", hint="Distill its teacher instead."
        )
    if config.tokenizer_sha256 is None:
        raise ArtifactError(f"{loaded.folder} has learned no latents that a head could draw.")
    described = config.provenance.get("config")
    if not isinstance(described, dict):
        raise ArtifactError(f"{loaded.folder} does not say by which recipe it was trained.")
    return model, size, build(LMRecipe, described, f"the recipe in {loaded.folder}")


def _default_recipe(loaded: LoadedGenerator, progress: Progress) -> str:
    name = str(loaded.config.provenance.get("recipe"))
    chosen = name if name in distill_recipe_names() else "few-step"
    progress.note(f"Using the recipe {chosen}")
    return chosen


def _few_step(config: DistillRecipe, loaded: LoadedGenerator) -> FewStepConfig:
    """What the head is made for.

    Raises:
        ConfigError: the guidance cannot be that of such a model.
    """
    own, asked = loaded.config.sampler, config.distill
    schedule = asked.guidance_schedule or own.guidance_schedule
    if schedule != "constant" and loaded.config.task != "classes":
        raise ConfigError(
            "Only images of classes can have a guidance schedule that is not constant."
        )
    scale = own.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    return FewStepConfig(
        steps=asked.steps,
        guidance_scale=scale,
        guidance_schedule=schedule,
        guidance_interval=own.guidance_interval,
    )


def _sampler(few_step: FewStepConfig) -> SamplerConfig:
    """How the model draws where the user says nothing."""
    return SamplerConfig(
        num_inference_steps=max(few_step.steps),
        guidance_scale=few_step.guidance_scale,
        guidance_schedule=few_step.guidance_schedule,
        guidance_interval=few_step.guidance_interval,
        solver="few-step",
    )


def _guidance(few_step: FewStepConfig, job: Job) -> Guidance:
    if isinstance(job, ClassJob):
        unconditional: tuple[int, ...] = (job.stream.null_id,)
    else:
        marks = job.text.marks
        unconditional = (marks.bos, marks.null, marks.bod)
    return Guidance(few_step.guidance_scale, few_step.guidance_schedule, unconditional)


def _require_its_data(learned: TrainingData, job: Job, loaded: LoadedGenerator) -> None:
    """Refuse latents or texts that the teacher does not know.

    Raises:
        ArtifactError: naming what differs.
    """
    config, latents = loaded.config, learned.latents
    text = None if job.text is None else job.text.sha256
    tokenizer = None if latents is None else latents.manifest.tokenizer_sha256
    differing = {
        "tokenizer": tokenizer != config.tokenizer_sha256,
        "normalisation": job.stream.stats != config.stats,
        "text tokenizer": text != config.text_sha256,
        "network": job.size != config.model,
    }
    found = [what for what, differs in differing.items() if differs]
    if found:
        raise ArtifactError(
            f"{learned.name} is not what {loaded.folder} learned from: another "
            f"{' and another '.join(found)}.",
            hint="Name with --data what it was trained on.",
        )
