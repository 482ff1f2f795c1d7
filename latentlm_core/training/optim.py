"""AdamW, its learning rate, and the moving average of the weights.

Notable choices:
- weight decay acts on the ``weight`` matrices of linear and convolution layers, and on nothing
  else: not on norms, biases, embeddings, or the bare parameters that hold position tables;
- a step whose gradient is not finite is refused on the device (``found_inf``), so the host need
  not wait for the gradient's norm before it goes on;
- the learning rate and the decay of the average are pure functions of the step: nothing about
  them is saved;
- the average warms up: after t updates its decay is min(decay, (1 + t) / (10 + t)), so that an
  early look at it does not show the initial weights. (The published trainer sets the lower bound
  to the upper one, which switches its warm-up off: train_hf.py:131.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW

from latentlm_core.config import Config
from latentlm_core.training.checkpoint_files import Source, copy_strictly
from latentlm_core.training.parallel import local, reshard

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its schedule; the defaults are the paper's, its size-dependent ``lr`` apart."""

    lr: float = Field(default=5e-4, gt=0)
    """Highest learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Decay of the averages of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the averaged square."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of weight matrices."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; 0 does not clip."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate grows linearly to `lr`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where `cosine` ends, as a share of `lr`."""

    def learning_rate(self, step: int, total_steps: int) -> float:
        """The learning rate of the update from ``step`` to ``step + 1``, of ``total_steps``.

        Both count from the optimizer's first update (a discriminator joins in the middle of a run).

        lr (step + 1) / warmup_steps in the warm-up; then lr, or with progress p in [0, 1)
        lr (r + (1 - r) (1 + cos(pi p)) / 2) for a final ratio r.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / (total_steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.final_lr_ratio + (1.0 - self.final_lr_ratio) * cosine)


class GuardedAdamW(AdamW):
    """Fused AdamW whose step changes nothing where ``found_inf`` is 1, decided on the device.

    Attributes:
        found_inf: scalar float32 on the parameters' device, read at each step (the protocol of
            ``torch.amp.GradScaler``).
    """

    found_inf: Tensor


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> GuardedAdamW:
    """AdamW over the parameters of ``module`` that want gradients, decaying its matrices only."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.endswith("weight")
            groups[is_matrix and id(parameter) not in embeddings].append(parameter)
    return GuardedAdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def optimizer_tensors(
    optimizer: AdamW, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state as ``PARAMETER.exp_avg``, ``.exp_avg_sq`` and ``.step``.

    A parameter that has never had a gradient has no state.
    """
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: AdamW,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Source],
    where: str,
) -> None:
    """Give the optimizer the state that ``optimizer_tensors`` returned, and no other.

    Raises:
        ArtifactError: a tensor belongs to no parameter, or has another shape.
    """
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if f"{name}.step" in tensors:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    copy_strictly(optimizer_tensors(optimizer, parameters), tensors, where)


def ema_decay(step: int, limit: float) -> float:
    """Decay of the average at the update from ``step`` to ``step + 1``, at most ``limit``."""
    return min(limit, (1 + step) / (10 + step))


class Ema:
    """Exponential moving average of a module's parameters, kept in float32; buffers are copied.

    The tensors of the module are taken once: they must be updated in place from then on. Of weights
    that are shared out over processes, each averages its own share.

    Args:
        module: on its device.
        decay: the limit of the decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._module = module
        live = module.state_dict(keep_vars=True)
        averaged = [name for name in live if isinstance(live[name], nn.Parameter)]
        copied = [name for name in live if not isinstance(live[name], nn.Parameter)]
        self._names = [*averaged, *copied]
        self._averages = [
            *(live[name].detach().to(torch.float32, copy=True) for name in averaged),
            *(live[name].detach().clone() for name in copied),
        ]
        self._live = [local(live[name].detach()) for name in self._names]
        self._shadow = [local(average) for average in self._averages]
        self._num_averaged = len(averaged)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after the update from ``step`` to ``step + 1``."""
        split, weight = self._num_averaged, 1.0 - ema_decay(step, self._decay)
        live = [tensor.float() for tensor in self._live[:split]]
        torch._foreach_lerp_(self._shadow[:split], live, weight)
        for shadow, buffer in zip(self._shadow[split:], self._live[split:], strict=True):
            shadow.copy_(buffer)

    def tensors(self) -> dict[str, Tensor]:
        """The average under the names of the module's ``state_dict`` (not copied)."""
        return dict(zip(self._names, self._averages, strict=True))

    def copy_to_module(self) -> None:
        """Overwrite the module's weights with the average."""
        self._overwrite(self._shadow)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the average; afterwards exactly its own weights."""
        own = [tensor.clone() for tensor in self._live]
        self.copy_to_module()
        try:
            yield
        finally:
            self._overwrite(own)

    @torch.no_grad()
    def _overwrite(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._live, values, strict=True):
            tensor.copy_(value)
        reshard(self._module)
