"""Validation shared by processes: the figures are those of one process, to the last bit."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch

from latentlm_core.processes import Processes
from latentlm_core.runtime import evaluating, generator
from latentlm_core.training.runlog import Means
from latentlm_core.training.step import Stepper
from latentlm_core.training.tasks import Batch, Task, Turn


def validate(
    task: Task,
    held_out: Iterable[Batch],
    stepper: Stepper,
    seed: int,
    device: torch.device,
    processes: Processes,
    limit: int | None,
) -> dict[str, float | None]:
    """Means of a task's terms over held-out batches, in each process.

    Batch k draws from a generator of its own, and sums are in the order of the batches.

    Args:
        task: on the device, its modules hold the weights to validate.
        held_out: the batches.
        stepper: whose autocast is used.
        seed: of the run.
        device: where to compute.
        processes: that share the batches in turn.
        limit: how many batches, at most; None is all.
    """
    mine, means, indices = Means(), Means(), []
    # What FSDP2 gathers is kept for training, where tensors of inference mode are of no use.
    with evaluating(*task.modules.values()), torch.inference_mode(False), torch.no_grad():
        for index, batch in _share(held_out, processes, limit):
            rng = generator(seed, "validate", index, device=device)
            with stepper.autocast():
                mine.add(task.validate(batch.to(device), rng))
            indices.append(index)
    rows = processes.gather(dict(zip(indices, mine.withdraw(), strict=True)))
    sums = {index: own for row in rows for index, own in row.items()}
    for index in sorted(sums):
        means.count(sums[index])
    return means.take()


def objective(turn: Turn, figures: Mapping[str, float | None]) -> float | None:
    """What a turn minimises, of the terms that were validated: by it checkpoints are compared.

    Args:
        turn: with the weights of its terms.
        figures: ``validation/TERM`` and others.

    Returns:
        The weighted sum; None where it is no finite number, or no term of the turn is there.
    """
    means = [(weight, figures.get(f"validation/{name}")) for name, weight in turn.weights.items()]
    terms = [weight * mean for weight, mean in means if mean is not None]
    return sum(terms) if terms and math.isfinite(sum(terms)) else None


def _share(
    held_out: Iterable[Batch], processes: Processes, limit: int | None
) -> Iterator[tuple[int, Batch]]:
    """Every W-th batch and its number, as many in each process: weights are gathered together.

    Where the last round is short, some processes take the last batch as well.
    """
    batches = enumerate(islice(held_out, limit))
    while turn := list(islice(batches, processes.size)):
        yield turn[min(processes.rank, len(turn) - 1)]
