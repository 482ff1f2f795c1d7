"""A diffusion head that draws a latent in one to a few evaluations, without unconditional rows.

It is told, beside the timestep that it is at, the one that its step ends at, and predicts the x0
with which the DDIM step ends where the trajectory of its teacher does: not the mean of what the
latent may be, but where this noise leads. Guidance is part of these trajectories (it was fixed when
they were computed), so a model of it needs no second, unconditional rows: its backbone, too, does
half of the work. ``training.distill_task`` makes one of a trained head.

Axes: S steps, D hidden.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.diffusion import SolverGrid
from latentlm_core.models.heads import DiffusionHead, DiffusionHeadConfig
from latentlm_core.nn.layers import TimestepEmbedding, zero_init


class FewStepConfig(Config):
    """What a few-step head was made for."""

    steps: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(1, 2, 4), min_length=1)
    """Numbers of evaluations that it can take for a latent."""
    guidance_scale: float = Field(default=1.0, ge=0.0, le=1000.0)
    """Of the teacher; it cannot be changed any more."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """Of the teacher's guidance over the positions of an image."""
    guidance_interval: tuple[float, float] | None = None
    """Where its guidance acted, as shares of the last timestep; None is everywhere."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps must rise, and name each number once")
        return self


class FewStepHead(DiffusionHead):
    """A head that knows where each of its steps ends.

    Args:
        config: as of the teacher.
        hidden_size: D of the backbone.
        latent_channels: C.
    """

    def __init__(self, config: DiffusionHeadConfig, hidden_size: int, latent_channels: int) -> None:
        super().__init__(config, hidden_size, latent_channels)
        self.end_embedding = TimestepEmbedding(hidden_size)
        last = self.end_embedding.mlp[-1]
        assert isinstance(last, nn.Linear)
        zero_init(last)

    @classmethod
    def of_teacher(cls, teacher: DiffusionHead) -> Self:
        """A head that starts as its teacher: what it is told of ends counts for nothing yet."""
        weight = teacher.latent_embedding.weight
        head = cls(teacher.config, weight.shape[0], teacher.latent_channels).to(weight.device)
        head.load_state_dict(teacher.state_dict(), strict=False)
        return head

    def embed_times(self, grid: SolverGrid) -> Tensor:
        """What the head is told about each step: where it is and where it ends, (S, D)."""
        device = self.latent_embedding.weight.device
        ends = torch.tensor(step_ends(grid.timesteps), device=device)
        return super().embed_times(grid) + self.end_embedding(ends)  # type: ignore[no-any-return]


def step_ends(timesteps: Sequence[int]) -> list[int]:
    """Where the steps of a grid end, counted from clean data: 0, and t + 1 for timestep t."""
    return [*(t + 1 for t in timesteps[1:]), 0]
