"""``latentlm sample``: a model => images.

A sample is decided by (seed, its index) and its class: its file is the same whatever the batch
size, and asking for more later only adds files. A folder remembers its settings, so the same
command goes on where it was interrupted and another one is refused. Several processes take the
batches in turn, and their files have the bits that those of one would have.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from latentlm_core.artifacts import LoadedGenerator, load_generator
from latentlm_core.config import build
from latentlm_core.data.media import write_png
from latentlm_core.data.sources import resolve_class
from latentlm_core.diffusion import Solver
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.sampling import Engine, SamplerConfig, make_engine
from latentlm_core.workflows.claimed_folder import Batch
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.sample_folder import SampleFolder
from latentlm_core.workflows.workspace import EXPORT, find_export, slug, workspace


@joined(PATIENCE)
def sample(
    *,
    model: str | None = None,
    classes: Sequence[str] = (),
    num_samples: int = 16,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_schedule: Literal["constant", "linear"] | None = None,
    guidance_interval: tuple[float, float] | None = None,
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
        guidance_scale: 1 is off; by default the model's own, as with the next four.
        guidance_schedule: constant or linear.
        guidance_interval: shares of the last timestep between which guidance acts.
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
    processes = current()
    where = resolve_device(device)
    with processes.main_first():
        export = find_export(model, "generator", progress)
    loaded = load_generator(export, where)
    config = sampler_config(
        loaded.config.sampler,
        guidance_scale,
        guidance_schedule,
        num_inference_steps,
        solver,
        guidance_interval,
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
    num_steps = math.ceil(count / batch_size) * loaded.config.num_latents
    engine = make_engine(loaded.model, config, num_steps=num_steps, progress=progress)
    if dry_run:
        return Result("Plan of samples", figures, files, details)
    with processes.main_first():
        drawing = Drawing.of(loaded, vae, where, progress)
    with folder.held(processes):
        processes.once(lambda: folder.write_rows(count))
        with folder.unmade(count, batch_size, processes, progress, "sampling") as batches:
            for batch in batches:
                _draw(folder, drawing, engine, batch, seed)
        files["grid"] = str(processes.once(lambda: folder.draw_grid(count)))
        if npz:
            files["npz"] = str(processes.once(lambda: folder.write_npz(count)))
    return Result("Samples drawn", figures, files, details)


def sampler_config(
    default: SamplerConfig,
    guidance_scale: float | None,
    guidance_schedule: str | None,
    num_inference_steps: int | None,
    solver: str | None,
    guidance_interval: tuple[float, float] | None,
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
        "guidance_interval": guidance_interval,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return build(SamplerConfig, default.to_dict() | given, "sampling")


def _draw(folder: SampleFolder, drawing: Drawing, engine: Engine, batch: Batch, seed: int) -> None:
    """Draw a batch and write what is not there yet; a file appears when it is whole."""
    labels = [folder.label(index) for index in batch.indices]
    images = drawing.images(engine, labels, batch.indices, seed)
    for index, image in zip(batch.indices, images, strict=True):
        if index in batch.missing:
            write_png(folder.file(index), image)


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
        interval_name(config),
        f"steps{config.num_inference_steps}",
        config.solver if config.solver != default.solver else "",
        f"seed{seed}",
    ]
    return "-".join(part for part in parts if part)


def interval_name(config: SamplerConfig) -> str:
    """What a folder's name says of where guidance acts; nothing where it acts everywhere."""
    interval = config.guidance_interval
    return f"within{interval[0]:g}-{interval[1]:g}" if interval else ""


def run_name_of(model: str | None, loaded: LoadedGenerator) -> str:
    """The run's name, or how the user named a model from elsewhere."""
    run = loaded.folder.parent if loaded.folder.name == EXPORT else loaded.folder
    return slug(model) if model and not run.is_relative_to(workspace()) else slug(run.name)
