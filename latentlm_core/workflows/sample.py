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

from latentlm_core.data.media import write_png
from latentlm_core.data.sources import resolve_class
from latentlm_core.diffusion import Solver
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.sampling import Engine, LatentLMEngine, make_engine
from latentlm_core.workflows.claimed_folder import Batch
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.memory import Fitting, cache_bytes
from latentlm_core.workflows.sample_folder import SampleFolder
from latentlm_core.workflows.sampling_plan import (
    Asked,
    SampleDtype,
    SampleMode,
    SamplingPlan,
    require_classes,
)
from latentlm_core.workflows.workspace import slug, workspace


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
    mode: SampleMode = "auto",
    dtype: SampleDtype = "auto",
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
        mode: how the decode step runs.
        dtype: of the weights; by default bfloat16 on a GPU that has it built in, else float32.
        out: folder; by default ``samples/`` and a name made of these settings.
        npz: also write ``samples.npz`` as ADM's evaluator reads it.
        batch_size: images drawn at once, or fewer if so many do not fit into memory.
        vae: another tokenizer with the same weights than the one in the model's export.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        what was drawn, and where it is.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    asked = Asked(
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        guidance_interval=guidance_interval,
        num_inference_steps=num_inference_steps,
        solver=solver,
        mode=mode,
        dtype=dtype,
    )
    plan = SamplingPlan.of(model, require_classes, asked, device, progress)
    labels = [resolve_class(plan.config.classes, word) for word in classes]
    count = num_samples * max(1, len(labels))
    processes = current()
    loaded = plan.load()
    settings = {
        "model_sha256": loaded.sha256,
        "data": loaded.config.provenance.get("data"),
        "classes": list(classes),
        "seed": seed,
        **plan.settings,
    }
    folder = SampleFolder(
        out or workspace() / "samples" / _name(plan, classes, seed),
        settings,
        loaded.config.classes,
        labels or range(len(loaded.config.classes)),
    )
    figures: dict[str, Any] = {"samples": count, **plan.figures, "seed": seed}
    files = {"samples": str(folder.path)}
    details = {"model": str(loaded.folder), **settings}
    if dry_run:
        return Result("Plan of samples", figures, files, details)
    with processes.main_first():
        drawing = Drawing.of(loaded, vae, plan.device, progress)
    num_latents = loaded.config.num_latents

    def make(size: int) -> Engine:
        num_steps = math.ceil(count / size) * num_latents
        return make_engine(loaded.model, plan.sampler, plan.mode, num_steps, progress)

    bytes_each = plan.num_branches * cache_bytes(loaded.model, num_latents)
    with folder.held(processes):
        processes.once(lambda: folder.write_rows(count))
        fitting = Fitting(make, min(batch_size, count), bytes_each, plan.device, progress)
        with folder.unmade(count, batch_size, processes, progress, "sampling") as (batches, bar):
            for batch in batches:
                _draw(folder, drawing, fitting, batch, seed)
                bar.advance(len(batch.missing))
        files["grid"] = str(processes.once(lambda: folder.draw_grid(count)))
        if npz:
            files["npz"] = str(processes.once(lambda: folder.write_npz(count)))
    engine = fitting.engine
    figures["mode"] = engine.mode if isinstance(engine, LatentLMEngine) else "eager"
    return Result("Samples drawn", figures, files, details)


def _draw(
    folder: SampleFolder, drawing: Drawing, fitting: Fitting[Engine], batch: Batch, seed: int
) -> None:
    """Draw a batch and write what is not there yet; a file appears when it is whole."""

    def draw(engine: Engine, size: int) -> None:
        for part in batch.parts(size):
            labels = [folder.label(index) for index in part.indices]
            images = drawing.images(engine, labels, part.indices, seed)
            for index, image in zip(part.indices, images, strict=True):
                if index in part.missing:
                    write_png(folder.file(index), image)

    fitting.run(draw)


def _name(plan: SamplingPlan, classes: Sequence[str], seed: int) -> str:
    """A folder name that says what differs between sets of samples."""
    named = f"class-{slug('-'.join(classes)) if classes else 'all'}"
    return "-".join(filter(None, [plan.run_name, named, *plan.words, f"seed{seed}"]))
