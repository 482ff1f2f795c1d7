"""One optimizer step: the arithmetic between some batches and new weights.

Notable choices:
- denominators first: each term is divided by its count over all batches of the step and over all
  processes, so that how a step is split does not change it;
- randomness is derived anew for each (step, batch, turn): a resumed run needs no generator state;
- no host synchronisation: a loss or gradient that is not finite raises a flag on the device, and
  while the flag is up no optimizer changes anything: until somebody looks at the figures and
  finds the weights as they were before the bad step, or (``skips``) for the rest of that step.
  Turns that came before the bad one in its step have been taken;
- figures are of all processes and the same bits in each, and so is the flag.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from latentlm_core.processes import ALONE, Processes
from latentlm_core.runtime import generator
from latentlm_core.training.checkpoint_files import Source
from latentlm_core.training.hardware import autocast
from latentlm_core.training.optim import (
    OptimizerConfig,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
)
from latentlm_core.training.parallel import backward_of
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
        processes: that take each step together.
        first: index of this process's first batch among those of a step; where it has several, each
            is ``processes.size`` after the one before.
        skips: whether the steps after a bad one are taken.
        reduce_each_batch: see ``parallel.backward_of``.
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
        processes: Processes = ALONE,
        first: int = 0,
        skips: bool = False,
        reduce_each_batch: bool = False,
    ) -> None:
        self._parameters = {
            name: dict(module.named_parameters()) for name, module in modules.items()
        }
        self._buffers = [
            tensor
            for module in modules.values()
            for tensor in module.state_dict(keep_vars=True).values()
            if not isinstance(tensor, nn.Parameter)
        ]
        self._optimizers = {
            name: build_optimizer(module, configs[name]) for name, module in modules.items()
        }
        self._configs = configs
        self._total_steps = total_steps
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._processes = processes
        self._first = first
        self._skips = skips
        self._backwards = {
            name: backward_of(module, processes, reduce_each_batch)
            for name, module in modules.items()
        }
        self._failed = torch.zeros((), dtype=torch.float32, device=device)

    def step(self, turns: Sequence[Turn], batches: Sequence[Batch], step: int) -> Terms:
        """Take every turn's update from ``step`` to ``step + 1``.

        Args:
            turns: in their order.
            batches: this process's parts of the step's batch, on the device.
            step: updates done before.

        Returns:
            The terms of all turns over the whole batch, in every process, and for each turn
            ``loss/TURN`` (the weighted objective) and ``grad_norm/TURN`` (before clipping).
        """
        if self._skips:
            self._failed = torch.zeros_like(self._failed)
        before = [buffer.clone() for buffer in self._buffers]
        figures: Terms = {}
        for turn in turns:
            figures |= self._take(turn, batches, step)
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(self._failed > 0, value, buffer))
        return figures

    def again(self, turn: Turn, batches: Sequence[Batch], step: int) -> Terms:
        """The figures of a turn of ``step`` computed once more; its gradients are left in place.

        No weight or buffer changes. Every process calls this, with its own parts.
        """
        before = [buffer.clone() for buffer in self._buffers]
        figures, loss, norm = self._gradients(turn, batches, step)
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(value)
        return figures | _summary(turn, loss, norm)

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
            for key, tensor in optimizer_tensors(optimizer, self._parameters[name]).items()
        }

    def load(self, tensors: Mapping[str, Source], where: str) -> None:
        """Give the optimizers the state that ``tensors`` returned.

        Raises:
            ArtifactError: a tensor does not fit.
        """
        for name, optimizer in self._optimizers.items():
            head = f"{name}."
            own = {key.removeprefix(head): tensors[key] for key in tensors if key.startswith(head)}
            load_optimizer(optimizer, self._parameters[name], own, where)
        self._failed = torch.zeros_like(self._failed)

    def _take(self, turn: Turn, batches: Sequence[Batch], step: int) -> Terms:
        figures, loss, norm = self._gradients(turn, batches, step)
        self._clip(turn, norm)
        self._failed = torch.maximum(self._failed, (~torch.isfinite(norm + loss)).float())

        optimizer = self._optimizers[turn.name]
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(turn, step)
        optimizer.found_inf = self._failed
        optimizer.step()
        return figures | _summary(turn, loss, norm)

    def _gradients(
        self, turn: Turn, batches: Sequence[Batch], step: int
    ) -> tuple[Terms, Tensor, Tensor]:
        """The turn's terms, its objective, and the norm of the gradient that is now in place."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
        figures, loss = self._backward(turn, batches, step)
        parameters = self._parameters[turn.name].values()
        norm = get_total_norm([part.grad for part in parameters if part.grad is not None])
        if hasattr(norm, "full_tensor"):  # of weights that are shared out over processes
            norm = norm.full_tensor()
        return figures, loss, norm

    def _clip(self, turn: Turn, norm: Tensor) -> None:
        """Shorten the gradient of the turn's module, whose norm it is."""
        clip_norm = self._configs[turn.name].clip_norm or float("inf")
        clip_grads_with_norm_(self._parameters[turn.name].values(), clip_norm, norm)

    def _backward(self, turn: Turn, batches: Sequence[Batch], step: int) -> tuple[Terms, Tensor]:
        """Gradients of the turn's objective over all batches; its terms and its value."""
        backward = self._backwards[turn.name]
        losses: Iterable[Terms] = (
            self._loss(turn, batch, step, part) for part, batch in enumerate(batches)
        )
        if turn.counts is None:
            losses = list(losses)
            counts = _total({name: term.count for name, term in terms.items()} for terms in losses)
        else:
            counts = _total(turn.counts(batch) for batch in batches)
        counts = self._over_processes(counts)
        figures: Terms = {}
        loss = torch.zeros((), device=self._device)
        for part, terms in enumerate(losses, start=1):
            objective = torch.stack(
                [
                    turn.weights[name] * term.total.float() / max(counts[name], 1)
                    for name, term in terms.items()
                    if name in turn.weights
                ]
            ).sum()
            backward(objective, part == len(batches))
            loss = loss + objective.detach()
            _add(figures, terms)
        return self._gathered(figures, loss)

    def _over_processes(self, counts: dict[str, int]) -> dict[str, int]:
        """Sums over all processes, where names are the same in the same order."""
        if self._processes.size == 1:
            return counts
        sums = self._processes.sum(torch.tensor(list(counts.values())))
        return dict(zip(counts, sums.tolist(), strict=True))

    def _gathered(self, figures: Terms, loss: Tensor) -> tuple[Terms, Tensor]:
        """The terms and the objective of all processes."""
        if self._processes.size == 1:
            return figures, loss
        totals = [loss, *(term.total.float() for term in figures.values())]
        loss, *sums = self._processes.sum(torch.stack(totals))
        counts = self._over_processes({name: term.count for name, term in figures.items()})
        return {
            name: Term(total, counts[name]) for name, total in zip(figures, sums, strict=True)
        }, loss

    def _loss(self, turn: Turn, batch: Batch, step: int, part: int) -> Terms:
        index = self._first + part * self._processes.size
        rng = generator(self._seed, "train", step, index, turn.name, device=self._device)
        with self.autocast():
            return turn.loss(batch, rng)

    def _learning_rate(self, turn: Turn, step: int) -> float:
        config = self._configs[turn.name]
        return config.learning_rate(step - turn.start, self._total_steps - turn.start)


def _summary(turn: Turn, loss: Tensor, norm: Tensor) -> Terms:
    return {f"loss/{turn.name}": Term(loss, 1), f"grad_norm/{turn.name}": Term(norm, 1)}


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
