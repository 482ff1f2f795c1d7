"""What went wrong in a step whose loss or gradient is not finite.

Nothing of a bad step was applied, so it can be run again: the same batches, the same random
numbers, the same weights. In this order it is asked whether the weights or the optimizer's state
were damaged before, whether the data are not finite, and, with a watch on every module, which of
them was the first to turn finite inputs into an output that is not, or else a finite gradient into
one that is not.

Notable choices:
- the first module is the innermost one (``training.watch``);
- examples and timesteps are those of the errors that are not finite, which a task gives one by one
  (``GivesErrors``); where there are none, those of the numbers that the module got wrong;
- every process runs the whole step, whatever it finds, for a network's processes work in unison;
  what they found is gathered.

Axes: B rows, K errors.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from latentlm_core.processes import current
from latentlm_core.training.tasks import Batch, ElementErrors, GivesErrors, Task, Terms, Turn
from latentlm_core.training.watch import Watch, is_finite

Cause = Literal[
    "weights", "optimizer", "data", "forward", "loss", "gradient", "gradient norm", "unknown"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""From the one that explains most to the one that explains least."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """What went wrong first.

    Attributes:
        cause: where to look.
        name: of the parameter, the optimizer's tensor, the batch's field, the module or the term;
            None where there is none to name.
        keys: of the examples that it went wrong in; empty where they cannot be told.
        timesteps: bands of timesteps that it went wrong in, ``t750-999`` for instance.
    """

    cause: Cause
    name: str | None = None
    keys: tuple[str, ...] = ()
    timesteps: tuple[str, ...] = ()


def find_culprit(
    task: Task,
    turn: Turn,
    batches: Sequence[Batch],
    optimizer: Mapping[str, Tensor],
    again: Callable[[Turn], Terms],
) -> Culprit:
    """Examine a bad step; the same answer in every process.

    Args:
        task: that the turn is of.
        turn: the first whose loss or gradient is not finite.
        batches: this process's share of the step's batch, on the device.
        optimizer: the tensors of the optimizers' state by name.
        again: takes the turn's loss and gradient once more and changes nothing else; returns the
            figures of the step, ``grad_norm/TURN`` among them.
    """
    examinations: tuple[Callable[[], Culprit | None], ...] = (
        partial(_damage, task.modules, optimizer),
        partial(_bad_data, batches),
        partial(_run_again, task, turn, batches, again),
    )
    for examine in examinations:
        found = _merged(current().gather(examine()))
        if found is not None:
            return found
    return Culprit("unknown")


def _merged(found: Iterable[Culprit | None]) -> Culprit | None:
    """The gravest of what the processes found, with the examples of all that found the like."""
    some = [culprit for culprit in found if culprit is not None]
    if not some:
        return None
    first = min(some, key=lambda culprit: CAUSES.index(culprit.cause))
    alike = [culprit for culprit in some if culprit.cause == first.cause]
    return replace(
        first,
        keys=tuple(dict.fromkeys(key for culprit in alike for key in culprit.keys)),
        timesteps=tuple(dict.fromkeys(band for culprit in alike for band in culprit.timesteps)),
    )


def _damage(modules: Mapping[str, nn.Module], optimizer: Mapping[str, Tensor]) -> Culprit | None:
    """The first tensor of the state that is not finite."""
    weights = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    states: tuple[tuple[Cause, Mapping[str, Tensor]], ...] = (
        ("weights", weights),
        ("optimizer", optimizer),
    )
    for cause, tensors in states:
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                return Culprit(cause, name)
    return None


def _bad_data(batches: Sequence[Batch]) -> Culprit | None:
    """The first field of a batch that is not finite, and the examples of its rows."""
    name, keys = None, list[str]()
    for batch in batches:
        for field, tensor in _floats(batch):
            bad = _of_rows(~torch.isfinite(tensor), len(tensor))
            if bad.any():
                name = name or field
                keys += _keys(batch, _indices(bad))
    return Culprit("data", name, tuple(dict.fromkeys(keys))) if name else None


def _run_again(
    task: Task, turn: Turn, batches: Sequence[Batch], again: Callable[[Turn], Terms]
) -> Culprit | None:
    """Take the turn once more with a watch on every module."""
    watch = Watch()
    errors: list[Mapping[str, ElementErrors]] = []
    bad_terms: list[tuple[str, int]] = []

    def loss(batch: Batch, generator: torch.Generator) -> Terms:
        number, state = len(errors), generator.get_state()
        with watch.calls(number):
            terms = turn.loss(batch, generator)
        for name, term in terms.items():
            if name in turn.weights and not is_finite(term.total):
                bad_terms.append((name, number))
        watch.follow(terms.values(), number)
        generator.set_state(state)
        errors.append(_element_errors(task, batch, generator))
        return terms

    with torch.compiler.set_stance("force_eager"), watch.on(task.modules):
        figures = again(replace(turn, loss=loss))

    def culprit(cause: Cause, name: str | None, bad: Mapping[int, Tensor | None]) -> Culprit:
        keys, timesteps = dict[str, None](), dict[str, None]()
        for part in bad:
            rows, bands = _places(batches[part], errors[part], bad[part])
            keys |= dict.fromkeys(_keys(batches[part], rows))
            timesteps |= dict.fromkeys(bands)
        return Culprit(cause, name, tuple(keys), tuple(timesteps))

    if (call := watch.broken_output()) is not None:
        return culprit("forward", call.module, watch.bad_outputs(call.module))
    if bad_terms:
        name = bad_terms[0][0]
        return culprit("loss", name, {part: None for term, part in bad_terms if term == name})
    if watch.bad_gradients:
        call = watch.broken_gradient()
        return culprit("gradient", call.module if call else None, watch.bad_gradients)
    if not is_finite(figures[f"grad_norm/{turn.name}"].total):
        return Culprit("gradient norm", watch.largest)
    return None


def _element_errors(
    task: Task, batch: Batch, generator: torch.Generator
) -> Mapping[str, ElementErrors]:
    if not isinstance(task, GivesErrors):
        return {}
    with torch.no_grad():
        return task.element_errors(batch, generator)


def _places(
    batch: Batch, errors: Mapping[str, ElementErrors], bad: Tensor | None
) -> tuple[list[int], tuple[str, ...]]:
    """Rows and bands of timesteps where numbers are not finite.

    Args:
        batch: what they are of.
        errors: its errors one by one, if the task gives them.
        bad: where a tensor of the culprit is not finite, for want of errors that are not. Its first
            axes are those of errors, with their repeats or without, or else of the rows.
    """
    found = [(each, ~torch.isfinite(each.values)) for each in errors.values()]
    if not any(which.any() for _, which in found) and bad is not None:
        by_row = _of_rows(bad, _num_rows(batch))
        if not errors:
            return _indices(by_row), ()
        one_by_one = [(each, _of_errors(bad, each.rows)) for each in errors.values()]
        found = [(each, which) for each, which in one_by_one if which is not None] or [
            (each, by_row[each.rows]) for each in errors.values()
        ]
    rows = [row for each, which in found for row in each.rows[which].tolist()]
    bands = [band for each, which in found for band in each.bands(which)]
    return sorted(set(rows)), tuple(dict.fromkeys(bands))


def _of_errors(bad: Tensor, rows: Tensor) -> Tensor | None:
    """The errors (K,) that ``bad`` is about: its first axes are theirs, or those without repeats.

    Args:
        bad: of any shape.
        rows: (K,) the row of each error.

    Returns:
        None where it is about something else.
    """
    for size in reversed(list(accumulate(bad.shape, operator.mul))):
        if 0 < size <= len(rows) and len(rows) % size == 0:
            repeats = len(rows) // size
            if torch.equal(rows, rows[:size].repeat(repeats)):
                return bad.reshape(size, -1).any(1).repeat(repeats)
    return None


def _of_rows(bad: Tensor, num_rows: int) -> Tensor:
    """The rows (B,) that ``bad`` is about: its first axis is B, or B several times over."""
    if bad.ndim == 0 or bad.shape[0] == 0 or bad.shape[0] % num_rows:
        return torch.zeros(num_rows, dtype=torch.bool, device=bad.device)
    return bad.reshape(-1, num_rows, bad[0].numel()).any(-1).any(0)


def _floats(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The fields of a batch that hold numbers which may not be finite, all with B rows."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            yield field.name, value


def _num_rows(batch: Batch) -> int:
    return next(len(tensor) for _, tensor in _floats(batch))


def _keys(batch: Batch, rows: Sequence[int]) -> tuple[str, ...]:
    """Keys of the examples that stand in some rows of a batch."""
    row_of: Sequence[int] = getattr(batch, "row_of", None) or range(len(batch.keys))
    return tuple(key for key, row in zip(batch.keys, row_of, strict=False) if row in set(rows))


def _indices(which: Tensor) -> list[int]:
    return which.nonzero().flatten().tolist()
