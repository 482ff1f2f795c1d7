"""One optimizer step: the arithmetic between some batches and new weights.

Notable choices:
- denominators first: each term is divided by its count over all batches of the step, so that how
  a step is split (accumulation here; processes, once there are several) does not change it;
- randomness is derived anew for each (step, batch, turn): a resumed run needs no generator state;
- no host synchronisation: a loss or gradient that is not finite raises a flag on the device, and
  while the flag is up no optimizer changes anything. Whoever drives the steps looks at the
  figures when it suits and finds the weights as they were before the bad step.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from latentlm_core.runtime import generator
from latentlm_core.training.hardware import autocast
from latentlm_core.training.optim import (
    OptimizerConfig,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
)
from latentlm_core.training.tasks import Batch, Term, Terms, Turn

GUARDED = ("loss/", "grad_norm/")
"""Prefixes of the figures that must be finite for a step to count."""


class Stepper:
    """The optimizers of a task and how they step.

    Args:
        modules: what each turn updates, by the turn's name, on ``device``.
        configs: the optimizer of each turn.
        total_steps: length of the run, for the schedules.
        seed: of all randomness in the losses.
        device: where everything is.
        dtype: of autocast around the losses; float32 is no autocast.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        configs: Mapping[str, OptimizerConfig],
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._modules = modules
        self._optimizers = {
            name: build_optimizer(module, configs[name]) for name, module in modules.items()
        }
        self._configs = configs
        self._total_steps = total_steps
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._failed = torch.zeros((), dtype=torch.float32, device=device)

    def step(self, turns: Sequence[Turn], batches: Sequence[Batch], step: int) -> Terms:
        """Take every turn's update from ``step`` to ``step + 1``.

        Args:
            turns: in their order.
            batches: the parts of the step's batch, on the device.
            step: updates done before.

        Returns:
            The terms of all turns over the whole batch, and for each turn ``loss/TURN`` (the
            weighted objective) and ``grad_norm/TURN`` (before clipping).
        """
        figures: Terms = {}
        for turn in turns:
            figures |= self._take(turn, batches, step)
        return figures

    def learning_rates(self, turns: Sequence[Turn], step: int) -> dict[str, float]:
        """``lr/TURN`` of the update from ``step`` to ``step + 1``."""
        return {f"lr/{turn.name}": self._learning_rate(turn, step) for turn in turns}

    def autocast(self) -> torch.autocast:
        """The context in which losses are computed."""
        return autocast(self._dtype, self._device)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state as ``TURN.PARAMETER.exp_avg`` and so on."""
        return {
            f"{name}.{key}": tensor
            for name, optimizer in self._optimizers.items()
            for key, tensor in optimizer_tensors(optimizer, self._modules[name]).items()
        }

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Give the optimizers the state that ``tensors`` returned.

        Raises:
            ArtifactError: a tensor does not fit.
        """
        for name, optimizer in self._optimizers.items():
            head = f"{name}."
            own = {key.removeprefix(head): tensors[key] for key in tensors if key.startswith(head)}
            load_optimizer(optimizer, self._modules[name], own, where)

    def _take(self, turn: Turn, batches: Sequence[Batch], step: int) -> Terms:
        for module in self._modules.values():
            module.zero_grad()
        figures, loss = self._backward(turn, batches, step)
        parameters = self._modules[turn.name].parameters()
        clip_norm = self._configs[turn.name].clip_norm or float("inf")
        norm = clip_grad_norm_(parameters, clip_norm)
        self._failed = torch.maximum(self._failed, (~torch.isfinite(norm + loss)).float())

        optimizer = self._optimizers[turn.name]
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(turn, step)
        optimizer.found_inf = self._failed
        optimizer.step()
        return figures | {
            f"loss/{turn.name}": Term(loss, 1),
            f"grad_norm/{turn.name}": Term(norm, 1),
        }

    def _backward(self, turn: Turn, batches: Sequence[Batch], step: int) -> tuple[Terms, Tensor]:
        """Gradients of the turn's objective over all batches; its terms and its value."""
        losses: Iterable[Terms] = (
            self._loss(turn, batch, step, index) for index, batch in enumerate(batches)
        )
        if turn.counts is None:
            losses = list(losses)
            counts = _total({name: term.count for name, term in terms.items()} for terms in losses)
        else:
            counts = _total(turn.counts(batch) for batch in batches)
        figures: Terms = {}
        loss = torch.zeros((), device=self._device)
        for terms in losses:
            objective = torch.stack(
                [
                    turn.weights[name] * term.total.float() / max(counts[name], 1)
                    for name, term in terms.items()
                    if name in turn.weights
                ]
            ).sum()
            objective.backward()  # type: ignore[no-untyped-call]
            loss = loss + objective.detach()
            _add(figures, terms)
        return figures, loss

    def _loss(self, turn: Turn, batch: Batch, step: int, index: int) -> Terms:
        rng = generator(self._seed, "train", step, index, turn.name, device=self._device)
        with self.autocast():
            return turn.loss(batch, rng)

    def _learning_rate(self, turn: Turn, step: int) -> float:
        config = self._configs[turn.name]
        return config.learning_rate(step - turn.start, self._total_steps - turn.start)


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def _add(figures: Terms, terms: Terms) -> None:
    for name, term in terms.items():
        total, count = term.total.detach(), term.count
        if name in figures:
            total, count = figures[name].total + total, figures[name].count + count
        figures[name] = Term(total, count)
