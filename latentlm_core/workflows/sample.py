"""``latentlm sample``: a model => images.

A sample is decided by (seed, its index) and its class: its file is the same whatever the batch
size, and asking for more later only adds files. A folder remembers its settings, so the same
command goes on where it was interrupted and another one is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentlm_core.artifacts import LoadedGenerator, load_generator
from latentlm_core.config import build
from latentlm_core.data.media import image_grid, read_image, write_png
from latentlm_core.data.sources import resolve_class
from latentlm_core.diffusion import Solver
from latentlm_core.errors import ArtifactError
from latentlm_core.evaluation.npz import write_arrays
from latentlm_core.files import locked, read_json, write_file, write_json, write_text
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.sampling import Engine, SamplerConfig, make_engine
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.workspace import EXPORT, find_export, slug, workspace

MAX_GRID = 256
"""Samples that the grid shows at most."""


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
    labels = sample_labels(loaded.config.classes, classes, num_samples)
    folder = out or workspace() / "samples" / _name(loaded, classes, config, seed)
    figures: dict[str, Any] = {
        "samples": len(labels),
        "model": str(loaded.folder),
        "guidance_scale": config.guidance_scale,
        "steps": config.num_inference_steps,
        "seed": seed,
    }
    details = {
        "model": str(loaded.folder),
        "model_sha256": loaded.sha256,
        "data": loaded.config.provenance.get("data"),
        "classes": list(classes),
        "seed": seed,
        "sampler": config.to_dict(),
    }
    files = {"samples": str(folder)}
    if dry_run:
        return Result("Plan of samples", figures, files, details)
    engine = make_engine(loaded.model, config)
    drawing = Drawing.of(loaded, vae, where, progress)
    with locked(folder):
        _claim(folder, details)
        _draw_missing(folder, drawing, engine, labels, seed, batch_size, progress)
        _write_records(folder, loaded, labels, details)
        files |= _draw_grid(folder, labels)
        if npz:
            files["npz"] = str(_write_npz(folder, labels))
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


def sample_labels(known: Sequence[str], classes: Sequence[str], num_samples: int) -> list[int]:
    """The class of each sample: the named ones in turn, so that every prefix is balanced.

    Raises:
        DataError: a class is unknown.
    """
    if classes:
        labels = [resolve_class(known, word) for word in classes]
        return labels * num_samples
    return [index % len(known) for index in range(num_samples)]


def _draw_missing(
    folder: Path,
    drawing: Drawing,
    engine: Engine,
    labels: Sequence[int],
    seed: int,
    batch_size: int,
    progress: Progress,
) -> None:
    """Draw the samples whose files are not there yet; a file appears when it is whole."""
    missing = [index for index in range(len(labels)) if not _path(folder, index).is_file()]
    done = len(labels) - len(missing)
    with progress.bar("sampling", len(labels), "images", done) as bar:
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            images = drawing.images(engine, labels, indices, seed)
            for index, image in zip(indices, images, strict=True):
                write_png(_path(folder, index), image)
            bar.advance(len(indices))


def _claim(folder: Path, details: dict[str, Any]) -> None:
    """Take a folder for these settings; samples of other settings never mix with them."""
    path = folder / "settings.json"
    wanted = {name: value for name, value in details.items() if name != "model"}
    if path.exists():
        found = read_json(path)
        if found != wanted:
            differing = [name for name in wanted if found.get(name) != wanted[name]]
            raise ArtifactError(
                f"{folder} holds samples of other settings ({', '.join(differing)} differ).",
                hint="Use another --out.",
            )
    elif any(folder.glob("*.png")):
        raise ArtifactError(f"{folder} holds images that are not ours.", hint="Use another --out.")
    write_json(path, wanted)


def _write_records(
    folder: Path, loaded: LoadedGenerator, labels: Sequence[int], details: dict[str, Any]
) -> None:
    rows = [
        {
            "file": _path(folder, index).name,
            "index": index,
            "class": label,
            "class_name": loaded.config.classes[label],
            **{name: value for name, value in details.items() if name != "classes"},
        }
        for index, label in enumerate(labels)
    ]
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _draw_grid(folder: Path, labels: Sequence[int]) -> dict[str, str]:
    """A grid with one column a class, if there are several and they fit, else near a square."""
    shown = min(len(labels), MAX_GRID)
    images = [read_image(_path(folder, index), str(_path(folder, index))) for index in range(shown)]
    num_classes = len(set(labels))
    columns = num_classes if 1 < num_classes <= 20 else max(1, round(shown**0.5))
    path = folder / "grid.png"
    write_png(path, image_grid(images, columns))
    return {"grid": str(path)}


def _write_npz(folder: Path, labels: Sequence[int]) -> Path:
    """ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,)."""
    paths = [_path(folder, index) for index in range(len(labels))]
    images = np.stack([read_image(path, str(path)) for path in paths])
    arrays: dict[str, np.ndarray[Any, Any]] = {"arr_0": images, "arr_1": np.array(labels)}
    target = folder / "samples.npz"
    write_file(target, lambda part: write_arrays(part, arrays))
    return target


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _name(loaded: LoadedGenerator, classes: Sequence[str], config: SamplerConfig, seed: int) -> str:
    folder = loaded.folder.parent if loaded.folder.name == EXPORT else loaded.folder
    named = slug("-".join(classes)) if classes else "all"
    scale = f"{config.guidance_scale:g}"
    return (
        f"{slug(folder.name)}-class-{named}-cfg{scale}-steps{config.num_inference_steps}-seed{seed}"
    )
