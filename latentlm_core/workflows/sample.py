"""``latentlm sample``: a model => images.

A sample is decided by (seed, its index) and its class: its file is the same whatever the batch
size, and asking for more later only adds files. A folder remembers its settings, so the same
command goes on where it was interrupted and another one is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from latentlm_core.artifacts import LoadedGenerator, load_generator
from latentlm_core.config import build
from latentlm_core.data.media import write_png
from latentlm_core.data.sources import resolve_class
from latentlm_core.diffusion import Solver
from latentlm_core.files import locked
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.sampling import Engine, SamplerConfig, make_engine
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.sample_folder import SampleFolder
from latentlm_core.workflows.workspace import EXPORT, find_export, slug, workspace


def sample(
    *,
    model: str | None = None,
    classes: Sequence[str] = (),
    num_samples: int = 16,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_schedule: Literal["constant", "linear"] | None = None,
    num_inference_steps: int | None = None,
    solver: Solver | None = None,
    out: Path | None = None,
    npz: bool = False,
    batch_size: int = 64,
    vae: str | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Draw images.

    Args:
        model: run, export or hub id of a generator; by default the newest.
        classes: names or numbers, taken in turn; by default all of the model's.
        num_samples: images of each class that is named, or in all if none is.
        seed: of the whole; each sample's own seed follows from it and the sample's index.
        guidance_scale: 1 is off; by default the model's own, as with the next three.
        guidance_schedule: constant or linear.
        num_inference_steps: solver steps per latent.
        solver: dpmsolver++ or ddpm.
        out: folder; by default ``samples/`` and a name made of these settings.
        npz: also write ``samples.npz`` as ADM's evaluator reads it.
        batch_size: images drawn at once.
        vae: another tokenizer with the same weights than the one in the model's export.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        what was drawn, and where it is.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    where = resolve_device(device)
    loaded = load_generator(find_export(model, "generator", progress), where)
    config = sampler_config(
        loaded.config.sampler, guidance_scale, guidance_schedule, num_inference_steps, solver
    )
    loaded.config.require_classes()
    labels = [resolve_class(loaded.config.classes, word) for word in classes]
    count = num_samples * max(1, len(labels))
    settings = {
        "model_sha256": loaded.sha256,
        "data": loaded.config.provenance.get("data"),
        "classes": list(classes),
        "seed": seed,
        "sampler": config.to_dict(),
    }
    folder = SampleFolder(
        out or workspace() / "samples" / _name(model, loaded, classes, config, seed),
        settings,
        loaded.config.classes,
        labels or range(len(loaded.config.classes)),
    )
    figures: dict[str, Any] = {
        "samples": count,
        "model": str(loaded.folder),
        "guidance_scale": config.guidance_scale,
        "steps": config.num_inference_steps,
        "seed": seed,
    }
    files = {"samples": str(folder.path)}
    details = {"model": str(loaded.folder), **settings}
    engine = make_engine(loaded.model, config)
    if dry_run:
        return Result("Plan of samples", figures, files, details)
    drawing = Drawing.of(loaded, vae, where, progress)
    with locked(folder.path):
        folder.claim()
        folder.write_rows(count)
        _draw_missing(folder, drawing, engine, count, seed, batch_size, progress)
        files["grid"] = str(folder.draw_grid(count))
        if npz:
            files["npz"] = str(folder.write_npz(count))
    return Result("Samples drawn", figures, files, details)


def sampler_config(
    default: SamplerConfig,
    guidance_scale: float | None,
    guidance_schedule: str | None,
    num_inference_steps: int | None,
    solver: str | None,
) -> SamplerConfig:
    """The model's own settings with the user's in their place.

    Raises:
        ConfigError: a setting is out of range.
    """
    asked = {
        "guidance_scale": guidance_scale,
        "guidance_schedule": guidance_schedule,
        "num_inference_steps": num_inference_steps,
        "solver": solver,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return build(SamplerConfig, default.to_dict() | given, "sampling")


def _draw_missing(
    folder: SampleFolder,
    drawing: Drawing,
    engine: Engine,
    count: int,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> None:
    """Draw the samples whose files are not there yet; a file appears when it is whole."""
    missing = folder.missing(count)
    with progress.bar("sampling", count, "images", count - len(missing)) as bar:
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            labels = [folder.label(index) for index in indices]
            images = drawing.images(engine, labels, indices, seed)
            for index, image in zip(indices, images, strict=True):
                write_png(folder.file(index), image)
            bar.advance(len(indices))


def _name(
    model: str | None,
    loaded: LoadedGenerator,
    classes: Sequence[str],
    config: SamplerConfig,
    seed: int,
) -> str:
    """A folder name that says what differs between sets of samples."""
    default = SamplerConfig()
    parts = [
        run_name_of(model, loaded),
        f"class-{slug('-'.join(classes)) if classes else 'all'}",
        f"cfg{config.guidance_scale:g}",
        config.guidance_schedule if config.guidance_schedule != default.guidance_schedule else "",
        f"steps{config.num_inference_steps}",
        config.solver if config.solver != default.solver else "",
        f"seed{seed}",
    ]
    return "-".join(part for part in parts if part)


def run_name_of(model: str | None, loaded: LoadedGenerator) -> str:
    """The run's name, or how the user named a model from elsewhere."""
    run = loaded.folder.parent if loaded.folder.name == EXPORT else loaded.folder
    return slug(model) if model and not run.is_relative_to(workspace()) else slug(run.name)
