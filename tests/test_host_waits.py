"""A step hands the device its work and waits for nothing: what makes a GPU's host wait is found."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentlm_core.data.documents import pad
from latentlm_core.training.optim import Ema, OptimizerConfig
from latentlm_core.training.step import Stepper
from tests import tiny_speech_task
from tests.test_shared_losses import painter
from tests.test_transfusion import pages
from tests.tiny_parallel import make_dit, make_lm, make_vae, make_vit
from tests.tiny_training import Adversarial, Stream

WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "lift_fresh")
"""Values that the host asks for, shapes that depend on values, and (``torch.tensor`` of numbers) a
copy from memory that is not pinned."""

TASKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "lm": lambda: _first(make_lm()),
    "dit": lambda: _first(make_dit()),
    "transfusion": lambda: (painter(), pad(pages())),
    "conv": lambda: _first(make_vae()),
    "vit": lambda: _first(make_vit()),
    "speech": lambda: (tiny_speech_task.task(waveform_weight=1.0), tiny_speech_task.noises(2)),
}


def _first(made: tuple[Any, Any]) -> tuple[Any, Any]:
    """A task and its first batch."""
    task, stream = made
    return task, stream.batch(0)


class Waits(TorchDispatchMode):
    """Notes what makes a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if name in WAITS or any(
            isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks
        ):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


def make_stepper(task: Any, step: int, **options: Any) -> Stepper:
    modules = {turn.name: turn.module for turn in task.turns(step)}
    return Stepper(
        modules,
        dict.fromkeys(modules, OptimizerConfig()),
        total_steps=9,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        **options,
    )


@pytest.mark.parametrize("skips", [False, True])
def test_a_step_that_is_not_finite_makes_no_host_wait(skips):
    task = Adversarial()
    stepper = make_stepper(task, 3, skips=skips)
    ema, batches = Ema(task.net, 0.9), Stream(spoil={5: math.nan}).batches(range(9))
    for step in range(3, 7):
        batch = next(batches)
        with Waits() as waits:
            stepper.step(task.turns(step), [batch], step)
            ema.update(step)
        assert waits.found == []


@pytest.mark.parametrize("kind", TASKS)
def test_a_step_of_each_task_makes_no_host_wait(kind):
    task, batch = TASKS[kind]()
    stepper, ema = make_stepper(task, 8), Ema(task.exported, 0.9)
    stepper.step(task.turns(8), [batch], 8)  # what is made once may wait
    with Waits() as waits:
        stepper.step(task.turns(8), [batch, batch], 8)
        ema.update(8)
    assert waits.found == []


@pytest.mark.parametrize(
    "wait",
    [
        float,
        lambda one: torch.equal(one, one),
        lambda one: one[one > 0],
        lambda one: one.masked_select(one > 0),
        lambda one: one.new_tensor(1.0),
    ],
)
def test_what_makes_a_host_wait_is_found(wait):
    with Waits() as waits:
        wait(torch.ones(1))
    assert len(waits.found) >= 1
