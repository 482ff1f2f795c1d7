"""Distilling the head of a trained LatentLM into one that needs a few evaluations a latent.

The backbone is frozen, and so is the trained head, the teacher: from noise and the states of a
batch it runs its deterministic solver, guided, to the end. On the way it passes the timesteps where
samplers of 1, 2 and 4 steps stop (their grids are parts of its own), and every stretch between two
such stops is a lesson: from where it begins, and told where it ends, the student predicts the x0
with which one DDIM step arrives there.

Notable choices:
- whole trajectories. Progressive distillation (Salimans & Ho 2022) halves the number of steps again
  and again; consistency trajectory models (Kim et al. 2023), shortcut models (Frans et al. 2024)
  and MeanFlow (Geng et al. 2025) learn long steps from the model's own short ones. They save what
  is dear where the network is all of a DiT. Here the head alone walks, after the backbone was
  computed once; so targets are exact, errors of the student do not enter them, one run learns all
  numbers of steps, and it learns at the states of guided sampling, which noised data are not;
- guidance is that of the teacher's trajectories (``data.guided``), so the student knows it and
  needs no unconditional rows (Meng et al. 2023);
- a trajectory is the dear part, so all of its lessons are learned, and a state has several;
- errors are those of the network's own output (v, mostly), in which every lesson counts alike: an
  x0 that is off by d puts the end of a step off by less than d, the less the shorter it is;
- dropped conditions teach nothing here, so ``workflows.distill`` drops none.

Axes: N latents to predict, R trajectories of each, C latent channels, D hidden, G lessons.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.data.guided import GuidedBatch
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.diffusion import Predict, SolverGrid, solve, solver_grid
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.models.few_step import FewStepHead
from latentlm_core.models.heads import DiffusionHead
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.training.lm_task import band_edges
from latentlm_core.training.tasks import ElementErrors, Term, Terms, Turn


class DistillConfig(Config):
    """What is distilled."""

    steps: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(1, 2, 4), min_length=1)
    """Numbers of evaluations that the student learns to do with."""
    teacher_steps: int = Field(default=20, ge=1, le=1000)
    """Solver steps of the teacher (DPM-Solver++), a multiple of each of `steps`."""
    guidance_scale: float | None = Field(default=None, ge=0.0, le=1000.0)
    """Of the teacher, fixed from then on; by default that of its own sampler."""
    guidance_schedule: Literal["constant", "linear"] | None = None
    """As `guidance_scale`."""
    trajectories: int = Field(default=4, ge=1, le=1000)
    """R: noises that the teacher begins with for each state."""


class Lessons(NamedTuple):
    """What is learned from a trajectory; G of each.

    Attributes:
        begins: step of the teacher's grid.
        ends: another one, or the number of its steps for the end.
        rows: of the embeddings of all grids, one after the other.
        coefficients: (G, 4), of x0 and of the next state, as in ``SolverGrid``.
    """

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    rows: tuple[int, ...]
    coefficients: Tensor


class Guide(NamedTuple):
    """What guidance needs beside the states.

    Attributes:
        free: (N, D) states of the same latents without their condition.
        scales: (N,) s in u + s (c - u).
        steps: of the solver, in which it acts.
    """

    free: Tensor
    scales: Tensor
    steps: range


class Student(nn.Module):
    """A few-step head, all of whose computing is one forward pass (as FSDP2 wants it).

    Args:
        head: the head.
    """

    def __init__(self, head: FewStepHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, x: Tensor, states: Tensor, grids: Sequence[SolverGrid], rows: Sequence[int]
    ) -> Tensor:
        """Its output (G, R, N, C).

        Args:
            x: (G, R, N, C) where steps begin.
            states: (N, D).
            grids: of the steps.
            rows: (G) which steps, counted through all grids.
        """
        times = torch.cat([self.head.embed_times(grid) for grid in grids])[list(rows)]
        return self.head.denoise(x, times[:, None, None], self.head.condition(states))

    def sampler(self, states: Tensor, grid: SolverGrid) -> Predict:
        """What ``solve`` asks, for x (R, N, C) and states (N, D)."""

        def predict(x: Tensor, i: int) -> Tensor:
            output: Tensor = self(x.unsqueeze(0), states, (grid,), (i,))
            return output[0].float()

        return predict


class DistillTask:
    """Regression on the trajectories of a teacher (a ``training.tasks.Task``).

    Args:
        model: on its device; its head is the student.
        teacher: the head whose trajectories are learned, on the same device.
        config: what is distilled.
        guidance_interval: where guidance acts, as shares of the last timestep; None: everywhere.

    Raises:
        ConfigError: the teacher's steps do not pass where the student's stop.
    """

    name = "distill"

    def __init__(
        self,
        model: LatentLM,
        teacher: DiffusionHead,
        config: DistillConfig,
        guidance_interval: tuple[float, float] | None = None,
    ) -> None:
        assert isinstance(model.head, FewStepHead)
        self.model = model.requires_grad_(False)
        self.student = Student(model.head.requires_grad_(True))
        self.teacher = teacher.requires_grad_(False)
        self.config = config
        self.modules: Mapping[str, nn.Module] = {"student": self.student}
        self.exported = self.student
        self._grid = solver_grid(teacher.schedule, config.teacher_steps, "dpmsolver++")
        self._grids = {n: solver_grid(teacher.schedule, n, "few-step") for n in config.steps}
        last = teacher.schedule.config.num_train_timesteps - 1
        self._guided = self._grid.steps_within(*(guidance_interval or (0.0, 1.0)), last)
        self._lessons = lessons_between(self._grid, self._grids)
        self._turn = Turn("model", self.student, self._losses, {"latent": 1.0}, self._counts)

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn, always the same."""
        return (self._turn,)

    def validate(self, batch: GuidedBatch, generator: torch.Generator) -> Terms:
        """The loss, and for each number of steps how far from the teacher's latents it ends."""
        states, trajectory = self._teach(batch, generator)
        noise, end = trajectory[0], trajectory[len(self._grid)]
        terms = self._terms(self._errors(states, trajectory))
        for steps, grid in self._grids.items():
            drawn = solve(self.student.sampler(states, grid), noise, grid)
            terms[f"distance/{steps} steps"] = Term((drawn - end).square().sum(), end.numel())
        return terms

    def health(self, figures: Mapping[str, float]) -> Sequence[str]:
        """Nothing of this task calls for a warning yet."""
        return ()

    def element_errors(
        self, batch: GuidedBatch, generator: torch.Generator
    ) -> dict[str, ElementErrors]:
        """The errors of latents, each lesson's at the timestep where it begins."""
        errors = self._errors(*self._teach(batch, generator)).square().sum(-1)
        rows = batch.layout.latent_targets // batch.layout.kind.shape[1]
        begins = [self._grid.timesteps[place] for place in self._lessons.begins]
        timesteps = torch.tensor(begins, device=errors.device).view(-1, 1, 1)
        each_row, each_t = (part.expand_as(errors).flatten() for part in (rows, timesteps))
        edges = band_edges(self.teacher.schedule.config.num_train_timesteps)
        return {"latent": ElementErrors(errors.flatten(), each_row, each_t, edges)}

    def _losses(self, batch: GuidedBatch, generator: torch.Generator) -> Terms:
        return self._terms(self._errors(*self._teach(batch, generator)))

    def _counts(self, batch: GuidedBatch) -> dict[str, int]:
        repeats = len(self._lessons.begins) * self.config.trajectories
        channels = self.model.config.latent_channels
        return {"latent": repeats * channels * batch.layout.latent_targets.numel()}

    def _terms(self, errors: Tensor) -> Terms:
        return {"latent": Term(errors.square().sum(), errors.numel())}

    @torch.no_grad()
    def _teach(
        self, batch: GuidedBatch, generator: torch.Generator
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """States (N, D), and the teacher's trajectories of them: (R, N, C) by step of its grid."""
        states, free = self._states(batch), batch.free
        shape = (self.config.trajectories, len(states), self.model.config.latent_channels)
        noise = Draws(generator, batch.targets).normal(shape, dim=1)
        guide = None if free is None else Guide(self._states(free.batch), free.scales, self._guided)
        return states, walk(self.teacher, states, guide, noise, self._grid, self._lessons.begins)

    def _states(self, batch: SequenceBatch) -> Tensor:
        """The states (N, D) that predict latents."""
        states = self.model.states(batch.ids[:, :-1], batch.latents[:, :-1], batch.layout)
        return states.flatten(0, 1)[batch.layout.latent_targets]

    def _errors(self, states: Tensor, trajectory: Mapping[int, Tensor]) -> Tensor:
        """Of the student's output in every lesson, (G, R, N, C)."""
        begins, ends, rows, coefficients = self._lessons
        x = torch.stack([trajectory[place] for place in begins])
        end = torch.stack([trajectory[place] for place in ends])
        x0_state, x0_output, state, estimate = (
            coefficients.to(x.device).view(-1, 4, 1, 1, 1).unbind(1)
        )
        target = ((end - state * x) / estimate - x0_state * x) / x0_output
        output: Tensor = self.student(x, states, tuple(self._grids.values()), rows)
        return output.float() - target


def walk(
    head: DiffusionHead,
    states: Tensor,
    guide: Guide | None,
    noise: Tensor,
    grid: SolverGrid,
    wanted: Collection[int] = (),
) -> dict[int, Tensor]:
    """Guided trajectories from noise (R, N, C): x by step of the grid, ``len(grid)`` for its end.

    Args:
        head: that walks.
        states: (N, D).
        guide: of these states; None: no guidance.
        noise: where it begins.
        grid: of the solver.
        wanted: which steps are kept, besides the end.
    """
    times = head.embed_times(grid)
    condition = head.condition(states)
    both = None if guide is None else torch.cat([condition, head.condition(guide.free)])
    kept = {}

    def predict(x: Tensor, i: int) -> Tensor:
        if i in wanted:
            kept[i] = x
        if guide is None or both is None or i not in guide.steps:
            return head.denoise(x, times[i], condition).float()
        output = head.denoise(torch.cat([x, x], dim=1), times[i], both).float()
        conditional, unconditional = output.chunk(2, dim=1)
        return unconditional + guide.scales.unsqueeze(1) * (conditional - unconditional)

    kept[len(grid)] = solve(predict, noise, grid)
    return kept


def lessons_between(teacher: SolverGrid, students: Mapping[int, SolverGrid]) -> Lessons:
    """The stretches between the stops of all numbers of steps, each once."""
    found: dict[tuple[int, int], tuple[int, tuple[float, ...]]] = {}
    row = 0
    for steps, grid in students.items():
        stride, rest = divmod(len(teacher), steps)
        if rest or teacher.timesteps[::stride] != grid.timesteps:
            raise ConfigError(
                f"distill.teacher_steps = {len(teacher)} does not pass where {steps} steps stop.",
                hint="Take a multiple of all of distill.steps, such as 20.",
            )
        for i in range(steps):
            columns = (grid.x0_state, grid.x0_output, grid.state, grid.estimate)
            lesson = (row + i, tuple(column[i] for column in columns))
            found.setdefault((i * stride, (i + 1) * stride), lesson)
        row += steps
    begins, ends = zip(*found, strict=True)
    rows, coefficients = zip(*found.values(), strict=True)
    return Lessons(begins, ends, rows, torch.tensor(coefficients))
