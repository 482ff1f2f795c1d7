"""A training step that does not fit into memory: what to change, in the words of its recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from latentlm_core.errors import TrainingError
from latentlm_core.recipes import DistillRecipe, LMRecipe, VAERecipe
from latentlm_core.runtime import machine
from latentlm_core.workflows.memory import lacks_memory


@contextmanager
def fitting_step(
    recipe: LMRecipe | VAERecipe | DistillRecipe, device: torch.device
) -> Iterator[None]:
    """Say what to change where memory runs out inside the block.

    What a step keeps grows with its batch, so twice as many batches of half the size take half of
    it, and make the same updates.

    Args:
        recipe: of the run that is in the block.
        device: where it trains.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        name, size = _batch_size(recipe)
        raise TrainingError(
            f"A step with {name} = {size} does not fit into the memory of {machine(device)}.",
            hint=_way_out(recipe, name, size),
        ) from error


def _batch_size(recipe: LMRecipe | VAERecipe | DistillRecipe) -> tuple[str, int]:
    """The option that says how much is in a batch, and its value."""
    data = recipe.data.to_dict() if recipe.data else {}
    (name,) = data.keys() & {"batch_size", "batch_elements"}
    return f"data.{name}", data[name]


def _way_out(recipe: LMRecipe | VAERecipe | DistillRecipe, name: str, size: int) -> str:
    trainer = recipe.trainer
    ways = []
    if size > 1:
        ways.append(
            f"start anew with --set {name}={size // 2} --set trainer.accumulate="
            f"{2 * trainer.accumulate}, which makes the same updates of half as much at a time"
        )
    if not trainer.recompute:
        ways.append("go on with --set trainer.recompute=true, which keeps less and computes more")
    said = ", or ".join(ways) or "take a smaller model or another --device"
    return f"{said[0].upper()}{said[1:]}."
