"""How a run trains, and what of it may change when the run goes on."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from latentlm_core.config import Config
from latentlm_core.training.bad_numbers import Policy
from latentlm_core.training.hardware import Precision
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.parallel import Parallel


class TrainerConfig(Config):
    """How long and how a run trains. The first group may change when a run is resumed."""

    log_every: int = Field(default=50, ge=1)
    """Steps between rows of metrics.jsonl."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates at the end only."""
    save_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of a multiple of so many steps are kept as well; 0 keeps none of them."""
    keep_best: bool = False
    """Keep, as well, the checkpoint with the lowest objective on the held-out data."""
    async_save: bool | Literal["auto"] = "auto"
    """Write checkpoints while training goes on, from a copy in the host's memory; auto: on GPUs."""
    compile: bool = False
    """Compile the networks' blocks."""
    parallel: Parallel = "ddp"
    """How several processes share one model: `ddp`, each holds all of it, or `fsdp`, each holds a
    part of its weights and of the optimizer's state."""
    shard_size: int = Field(default=0, ge=0)
    """Processes that share one copy of the weights (`fsdp`); 0 is all, fewer hold several copies
    (HSDP), and must divide all."""
    reduce_each_batch: bool = False
    """Sum gradients over the processes after each batch, not once a step (`fsdp`): a process with
    several batches then holds a share of them and not all, for about twice the traffic."""
    recompute: bool = False
    """Compute the networks' blocks again in the backward pass: less memory, a third more work."""
    on_bad_numbers: Policy = "stop"
    """What to do about a step whose loss or gradient is not finite: `stop` the run, `skip` the
    step, which changes nothing, or `rollback` to the last checkpoint and leave out the batches up
    to the step's."""
    max_bad_steps: int = Field(default=5, ge=1)
    """Steps skipped in a row, or returns to one checkpoint, after which the run stops."""

    total_steps: int = Field(ge=1)
    """Optimizer updates of the run; may change on resuming where all schedules are constant."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients make one update."""
    seed: int = 0
    """Decides all randomness in the losses."""
    precision: Precision = "auto"
    """float32, bfloat16 (autocast), or auto: bfloat16 where the hardware has it. A run goes on in
    the one that it began with."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Limit of the decay of the weights' average."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_best and (not self.validate_every or self.save_every % self.validate_every):
            raise ValueError("keep_best needs a save_every that is a multiple of validate_every")
        return self


FREE_KEYS = frozenset(
    f"trainer.{name}"
    for name in (
        "log_every",
        "validate_every",
        "save_every",
        "keep_checkpoints",
        "keep_every",
        "keep_best",
        "async_save",
        "compile",
        "parallel",
        "shard_size",
        "reduce_each_batch",
        "recompute",
        "on_bad_numbers",
        "max_bad_steps",
    )
)
"""Keys of a run's configuration that may change when it is resumed."""


def plain_config(
    config: TrainerConfig,
    dtype: torch.dtype,
    optimizers: Mapping[str, OptimizerConfig],
    run_config: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole configuration of the run as it comes back from JSON, its precision settled."""
    whole = {
        **run_config,
        "trainer": config.to_dict() | {"precision": str(dtype).removeprefix("torch.")},
        "optimizers": {name: optimizer.to_dict() for name, optimizer in optimizers.items()},
    }
    return json.loads(json.dumps(whole))  # type: ignore[no-any-return]
