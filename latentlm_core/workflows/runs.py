"""What both kinds of training runs share: names, provenance, figures."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from latentlm_core.data.base import SkippedItem
from latentlm_core.data.sources import attribution
from latentlm_core.errors import CorruptFileError
from latentlm_core.files import CONFIG_FILE, read_json, write_json
from latentlm_core.processes import current
from latentlm_core.progress import Progress
from latentlm_core.recipes import DistillRecipe, LMRecipe, VAERecipe
from latentlm_core.runtime import machine, versions
from latentlm_core.training.trainer import TrainResult
from latentlm_core.workflows.workspace import EXPORT, slug


def default_recipe(data: str, known: tuple[str, ...], otherwise: str, progress: Progress) -> str:
    """The recipe named like a data set, or like one of its kind, else the paper's."""
    name = data.partition(":")[0]
    name = {"embedded": "tiny", "spoken-digits": "digit-strings"}.get(name, name)
    chosen = name if name in known else otherwise
    progress.note(f"Using the recipe {chosen}")
    return chosen


def acknowledge(data: str, progress: Progress) -> None:
    """Name those whose work a data set is, where its licence asks for it."""
    whose = attribution(data)
    if whose is not None:
        progress.note(f"{data}: {whose}")


def run_name(kind: str, data: str, recipe: str | None) -> str:
    """The folder of a run under ``runs``; a recipe that was asked for is part of it."""
    return f"{kind}-{slug(data)}" + (f"-{slug(Path(recipe).stem)}" if recipe else "")


def decisive(recipe: VAERecipe | LMRecipe | DistillRecipe) -> dict[str, Any]:
    """What a resumed run must have in common with its start, besides trainer and optimizers."""
    indifferent: dict[str, Any] = {
        "trainer": True,
        "optimizer": True,
        "critic_optimizer": True,
        "sampler": True,
        "data": {"num_workers"},
    }
    return recipe.model_dump(mode="json", exclude=indifferent)


def is_complete(result: TrainResult, folder: Path) -> bool:
    """Whether all that a run leaves was there before this call."""
    described: int | None = current().once(lambda: _described_step(folder))
    return result.resumed_from == result.step == described


def describe(
    folder: Path, origin: Any, recipe: VAERecipe | LMRecipe | DistillRecipe, result: TrainResult
) -> None:
    """Write what a run was, when all else is written: a run without it was not complete."""
    described = {"origin": origin, "recipe": recipe.to_dict(), "step": result.step}
    current().once(lambda: write_json(folder / CONFIG_FILE, described))


def _described_step(folder: Path) -> Any:
    """The step that a run's description and its export are of; None where one is missing."""
    if not (folder / EXPORT / CONFIG_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return None
    with suppress(CorruptFileError):
        described = read_json(folder / CONFIG_FILE)
        return described.get("step") if isinstance(described, dict) else None
    return None


def skipped_by_all(items: Iterable[SkippedItem]) -> list[dict[str, Any]]:
    """What the processes of a run left out; several may have met the same item."""
    parts = current().gather(list(items))
    return [item.to_dict() for item in dict.fromkeys(item for part in parts for item in part)]


def provenance(
    data: str, recipe: str, config: dict[str, Any], result: TrainResult, device: torch.device
) -> dict[str, Any]:
    """What an export says about the run that it comes from."""
    return {
        "data": data,
        "attribution": attribution(data),
        "recipe": recipe,
        "config": config,
        "step": result.step,
        "samples_seen": result.samples_seen,
        "figures": result.figures,
        "machine": machine(device),
        "versions": versions(),
    }


def training_figures(result: TrainResult) -> dict[str, float | None]:
    """The last validation's figures, how long the run took, and how fast this call trained."""
    validation = {
        name.removeprefix("validation/"): value
        for name, value in result.figures.items()
        if name.startswith("validation/")
    }
    speed = {name: value and float(f"{value:.4g}") for name, value in result.speed.items()}
    return {**validation, "training_seconds": round(result.seconds, 1), **speed}
