"""What engines share: settings, requests, the draw of a latent, and the noise that a seed decides.

Every request brings its own seed, and its noise is drawn on the host from that seed alone, so a
sample is the same alone, in any batch and on any device (up to the rounding of its kernels).

Axes: B requests, T latent positions, C latent channels, D hidden, S solver steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentlm_core.config import Config
from latentlm_core.diffusion import Solver, solver_grid
from latentlm_core.errors import ConfigError
from latentlm_core.models.few_step import FewStepConfig
from latentlm_core.models.heads import GuidedOutput
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import evaluating, generator
from latentlm_core.sampling.scanned import sample_scanned

BOUND = "bound"
"""What is said of a sample that reached its bound."""
END = "end"
"""What is said of a sample that the model ended."""


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise ValueError(f"must rise within 0 and 1, not {interval[0]:g} to {interval[1]:g}")
    return interval


Interval = Annotated[tuple[float, float], AfterValidator(_check_interval)]


class SamplerConfig(Config):
    """How latents are drawn."""

    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    """S: solver steps per latent."""
    guidance_scale: float = Field(default=1.0, ge=0.0, le=1000.0)
    """s in u + s (c - u); 1 is off."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """constant, or rising linearly from 1 at the first position to the scale at the last."""
    guidance_interval: Interval | None = None
    """Where guidance acts: timesteps from the first to the second share of the last one
    (Kynkaanniemi et al. 2024); elsewhere half of the head's work falls away. None is everywhere."""
    solver: Solver = "dpmsolver++"
    """dpmsolver++ (2M, deterministic), ddpm (ancestral), or few-step: of a distilled head alone."""

    @property
    def is_guided(self) -> bool:
        """Whether unconditional rows are needed; a few-step head has its guidance within."""
        return self.guidance_scale != 1.0 and self.solver != "few-step"

    def require_constant_guidance(self, reason: str) -> None:
        """Refuse a guidance that rises over the positions.

        Args:
            reason: why there can be none, the beginning of the message.

        Raises:
            ConfigError: the schedule is another one.
        """
        if self.guidance_schedule != "constant":
            raise ConfigError(f"{reason}, so its guidance schedule must be constant.")

    def require_guidance_throughout(self, kind: str) -> None:
        """Refuse a guidance that acts at some timesteps alone.

        Args:
            kind: the network, the beginning of the message.

        Raises:
            ConfigError: there is an interval.
        """
        if self.guidance_interval is not None:
            raise ConfigError(f"{kind} knows no guidance interval: it is of a LatentLM's head.")


@dataclass(frozen=True, slots=True)
class Request:
    """One sample.

    Attributes:
        prompt: token ids that condition it; a class id, for a class-conditional model.
        unconditional: what stands in their place in the guidance branch, equally long.
        num_latents: T, how many latents to draw.
        seed: decides its noise.
    """

    prompt: tuple[int, ...]
    unconditional: tuple[int, ...]
    num_latents: int
    seed: int


class Seeded(Protocol):
    """What decides the noise of a request."""

    @property
    def num_latents(self) -> int:
        """T: how many latents are drawn, at most."""

    @property
    def seed(self) -> int:
        """Decides them."""


@dataclass(frozen=True, slots=True)
class SeededLatents:
    """A ``Seeded`` of its own: of a request that says in other words how much it draws."""

    num_latents: int
    seed: int


@dataclass(frozen=True, slots=True)
class Noise:
    """All the randomness of B requests.

    Attributes:
        start: (B, T, C) where the solver starts.
        fresh: (S, B, T, C) of a stochastic solver, else None.
    """

    start: Tensor
    fresh: Tensor | None = None


class Engine(Protocol):
    """Draws the latents of requests that have equal lengths."""

    def generate(
        self, requests: Sequence[Request], on_position: Callable[[], None] | None = None
    ) -> Tensor:
        """Normalised latents (B, T, C), float32.

        Args:
            requests: of one prompt length and one number of latents.
            on_position: called after each latent position (or once, if all come together).
        """


class LatentSampler:
    """Draws the next latent of every row with the head of a LatentLM.

    Coefficients of the solver and embeddings of its timesteps are computed once.

    Args:
        model: whose head it is.
        config: how latents are drawn.
    """

    def __init__(self, model: LatentLM, config: SamplerConfig) -> None:
        require_fitting(config, model.config.few_step)
        self.model = model
        self.config = config
        self.grid = solver_grid(model.schedule, config.num_inference_steps, config.solver)
        self.device = model.head.latent_embedding.weight.device
        self.guided_steps = range(len(self.grid))
        if config.guidance_interval is not None:
            last = model.schedule.config.num_train_timesteps - 1
            self.guided_steps = self.grid.steps_within(*config.guidance_interval, last)
        with evaluating(model):
            self._t_embeddings = model.head.embed_times(self.grid)
            self._table = self.grid.table(self.device)
        self._guided_output: GuidedOutput = model.head.guided_output

    def compile_head(self) -> None:
        """Let inductor make one piece of each solver step of ``draw``."""
        self._guided_output = torch.compile(
            self.model.head.guided_output, dynamic=False, fullgraph=True
        )

    def noise(self, requests: Sequence[Seeded]) -> Noise:
        """All the randomness of some requests."""
        return draw_noise(requests, self.model.config.latent_channels, self.grid.num_fresh)

    def draw(
        self, states: Tensor, noise: Tensor, fresh: Tensor | None, guidance_scale: float | Tensor
    ) -> Tensor:
        """The next latents (B, C) float32 after states (B, D).

        Args:
            states: (B, D), or (2 B, D) for guidance: conditional rows, then unconditional.
            noise: (B, C) where the solver starts.
            fresh: (S, B, C) of a stochastic solver, else None.
            guidance_scale: s in u + s (c - u).
        """
        head = self.model.head
        return head.sample(
            head.condition(states),
            noise.to(self.device),
            self.grid,
            self._t_embeddings,
            guidance_scale,
            None if fresh is None else fresh.to(self.device),
            self.guided_steps,
            self._guided_output,
        )

    def draw_scanned(
        self, states: Tensor, noise: Tensor, fresh: Tensor | None, guidance_scale: Tensor
    ) -> Tensor:
        """``draw`` for a compiler, with everything on the device."""
        head = self.model.head
        return sample_scanned(
            head,
            head.condition(states),
            noise,
            self._table,
            self._t_embeddings,
            guidance_scale,
            fresh,
            self.guided_steps,
        )

    def embed(self, latents: Tensor) -> Tensor:
        """Latents (B, C) => what is fed in for them, (B, 1, D)."""
        embedding = self.model.latent_embedding
        return embedding(latents.to(embedding.weight.dtype)).unsqueeze(1)  # type: ignore[no-any-return]


def require_fitting(config: SamplerConfig, few_step: FewStepConfig | None) -> None:
    """Refuse settings that are not those of a head.

    Args:
        config: how latents are to be drawn.
        few_step: of a distilled head, else None.

    Raises:
        ConfigError: saying what it takes.
    """
    if few_step is None:
        if config.solver == "few-step":
            raise ConfigError(
                "The solver few-step needs a model whose head was distilled.",
                hint="Make one: latentlm train-lm --distill RUN",
            )
        return
    if config.solver != "few-step":
        raise ConfigError(
            f"This model's head was distilled, so its solver is few-step, not {config.solver}."
        )
    if config.num_inference_steps not in few_step.steps:
        allowed = ", ".join(map(str, few_step.steps))
        raise ConfigError(
            f"This model's head was distilled for {allowed} steps, "
            f"not {config.num_inference_steps}."
        )
    changed = [
        f"{name} {fixed} to {asked}"
        for name in ("guidance_scale", "guidance_schedule", "guidance_interval")
        if (fixed := getattr(few_step, name)) != (asked := getattr(config, name))
    ]
    if changed:
        raise ConfigError(
            "This model's head was distilled with its guidance, so there is no changing its "
            f"{' and its '.join(changed)}.",
            hint="Distill its teacher again with another one: --set distill.guidance_scale=SCALE",
        )


def draw_noise(requests: Sequence[Seeded], latent_channels: int, num_fresh_steps: int) -> Noise:
    """The noise of each request, from its own seed alone.

    T is that of the longest request; what others do not need is zero.
    """
    starts, fresh = [], []
    for request in requests:
        shape = (request.num_latents, latent_channels)
        source = generator(request.seed, "latents")
        starts.append(torch.randn(shape, generator=source))
        if num_fresh_steps:
            fresh.append(torch.randn(num_fresh_steps, *shape, generator=source))
    start = pad_sequence(starts, batch_first=True)
    if not fresh:
        return Noise(start)
    by_latent = pad_sequence([each.transpose(0, 1) for each in fresh], batch_first=True)
    return Noise(start, by_latent.permute(2, 0, 1, 3))
