"""Where results live, and how one is found again when it is not named.

    runs/NAME/       config.json, metrics.jsonl, checkpoints/, export/, pictures
    latents/NAME/    a latent set
    samples/NAME/    images, samples.jsonl, grid.png

under the working folder or ``LATENTLM_HOME``.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from latentlm_core.data.remote import is_url
from latentlm_core.data.remote_latents import fetch_latents
from latentlm_core.errors import ArtifactError
from latentlm_core.export_config import export_kind
from latentlm_core.hub import download, is_hub_id
from latentlm_core.importing import import_vibevoice, is_import_of, is_vibevoice
from latentlm_core.progress import Progress

EXPORT = "export"


def workspace() -> Path:
    """The folder that holds ``runs``, ``latents`` and ``samples``."""
    return Path(os.environ.get("LATENTLM_HOME", "."))


def slug(text: str) -> str:
    """``text`` as a file name: its letters, digits and dots, joined by single dashes."""
    last = text.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.]+", "-", last).strip("-.") or "unnamed"


def find_place(spec: str, *kinds: str) -> Path | None:
    """Where a result lies: as named, in the workspace, or under one of these kinds there."""
    home = workspace()
    places = (Path(spec), home / spec, *(home / kind / spec for kind in kinds))
    return next((place for place in places if os.path.exists(place)), None)


def find_export(spec: str | None, kind: str, progress: Progress) -> Path:
    """The export that a user means.

    Args:
        spec: a run folder, an export folder (in the working folder or the workspace), a hub id
            (``hf:ORG/NAME`` says that it is one), or None for the newest of that kind. A folder or
            a hub id may also be one of VibeVoice's, whose acoustic tokenizer is imported once.
        kind: ``sigma-vae`` or ``generator``.
        progress: is told which one was picked.

    Raises:
        ArtifactError: there is none, or it is of another kind.
    """
    if spec is None:
        newest = _newest(
            (run / EXPORT for run in _entries("runs")),
            lambda folder: export_kind(folder) == kind,
            "config.json",
        )
        if newest is None:
            command = "train-vae" if kind == "sigma-vae" else "train-lm"
            raise ArtifactError(
                f"There is no finished {kind} under {workspace() / 'runs'}.",
                hint=f"Name one, or make one with: latentlm {command}",
            )
        progress.note(f"Using the newest {kind}: {newest.parent}")
        return newest
    folder = find_place(spec, "runs") or Path(spec)
    if not os.path.exists(folder) and is_hub_id(spec):
        folder = download(spec)
    for candidate in (folder / EXPORT, folder):
        if export_kind(candidate) is not None:
            return candidate
    if is_vibevoice(folder):
        return _imported(spec, folder, kind, progress)
    if os.path.isfile(folder / "metrics.jsonl"):
        raise ArtifactError(
            f"The run {folder} is not finished, so it has no export yet.",
            hint="The command that started it goes on with it.",
        )
    raise ArtifactError(f"{folder} is neither a run, an export nor a hub id.")


def run_name_of(spec: str | None, export: Path) -> str:
    """The name of the run of an export, or how the user named one from elsewhere."""
    run = export.parent if export.name == EXPORT else export
    return slug(spec) if spec and not run.is_relative_to(workspace()) else slug(run.name)


def find_latents(spec: str | None, progress: Progress) -> Path:
    """The latent set that a user means: a folder, a name under ``latents``, a URL, or the newest.

    Raises:
        ArtifactError: there is none.
        LatentLMError: what is at the URL cannot be used.
    """
    if spec is not None and is_url(spec):
        return fetch_latents(spec)
    return _find(spec, "latents", "manifest.json", "tokenize", progress)


def find_samples(spec: str | None, progress: Progress) -> Path:
    """The samples that a user means: a folder, a file, a name under ``samples``, or the newest.

    Raises:
        ArtifactError: there are none.
    """
    return _find(spec, "samples", "samples.jsonl", "sample", progress)


def _imported(spec: str, folder: Path, kind: str, progress: Progress) -> Path:
    """The export that the tokenizer of VibeVoice in ``folder`` became, now or before."""
    if kind != "sigma-vae":
        raise ArtifactError(
            f"{folder} holds a model of VibeVoice, of which only the tokenizer can be used.",
            hint=f"Use it as a tokenizer: --vae {spec}",
        )
    run = workspace() / "runs" / f"{slug(spec)}-imported"
    if not (run / EXPORT).exists():
        progress.note(f"Importing the acoustic tokenizer of {folder} into {run}")
        import_vibevoice(folder, run / EXPORT)
    elif not is_import_of(run / EXPORT, folder):
        raise ArtifactError(
            f"{run / EXPORT} was not made of the files that {folder} has now.",
            hint=f"Remove or rename {run}, and they are imported anew.",
        )
    else:
        progress.note(f"Using {run}, imported before")
    return run / EXPORT


def _find(spec: str | None, kind: str, mark: str, command: str, progress: Progress) -> Path:
    if spec is not None:
        return _named(spec, kind)
    newest = _newest(_entries(kind), lambda folder: True, mark)
    if newest is None:
        raise ArtifactError(
            f"There are no {kind} under {workspace() / kind}.",
            hint=f"Make some with: latentlm {command}",
        )
    progress.note(f"Using the newest {kind}: {newest}")
    return newest


def _named(spec: str, kind: str) -> Path:
    place = find_place(spec, kind)
    if place is None:
        raise ArtifactError(f"There is no {spec}, nor {workspace() / kind / spec}.")
    return place


def _entries(kind: str) -> Iterable[Path]:
    folder = workspace() / kind
    return sorted(folder.iterdir()) if folder.is_dir() else ()


def _newest(folders: Iterable[Path], fits: Callable[[Path], bool], mark: str) -> Path | None:
    """The fitting folder whose ``mark``, the file that is written last, is the youngest."""
    found = [f for f in folders if (f / mark).is_file() and fits(f)]
    return max(found, key=lambda folder: (folder / mark).stat().st_mtime, default=None)
