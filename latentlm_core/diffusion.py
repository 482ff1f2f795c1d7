"""Diffusion: the noise schedule, what the network predicts, and the solvers.

Network, noise law and solver never mix. A solver is a table of coefficients: every step of
DPM-Solver++(2M) and of ancestral DDPM is linear in the state, the two latest estimates of x0 and
fresh noise, so one loop serves both and nothing but multiplications is left at run time.

Tables are computed in float64 and kept apart from any module, so that casting a model to bfloat16
never touches them; timesteps stay integers.

Axes: N latents, C latent channels; ``...`` is any shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.errors import ConfigError

Predict = Callable[[Tensor, int], Tensor]
"""(x_t, step index i) => the network's output at the grid's timestep i."""
PredictionType = Literal["v_prediction", "epsilon", "sample"]
Solver = Literal["dpmsolver++", "ddpm", "few-step"]

EPSILON_LAMBDA_MIN = -5.1
"""Below this lambda = log(alpha / sigma), dividing by alpha amplifies a network's error in
epsilon beyond use (sigma / alpha reaches 20,291 at t = 999 of the cosine schedule)."""


class DiffusionConfig(Config):
    """The noise law and the network's target."""

    prediction_type: PredictionType = "v_prediction"
    """v_prediction, epsilon (the paper's Eq. 3), or sample (x0)."""
    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)
    """T: timesteps are 0 (almost clean) to T - 1 (almost noise)."""
    lambda_min_clipped: float | Literal["auto"] | None = "auto"
    """Sampling starts where lambda = log(alpha / sigma) reaches this; auto: -5.1 for epsilon."""


class NoiseSchedule:
    """The variance-preserving cosine schedule: x_t = alpha_t x0 + sigma_t epsilon.

    alpha_bar_t = prod(1 - beta_s), beta_s = 1 - f(s + 1) / f(s) <= 0.999 and
    f(s) = cos^2((s / T + 0.008) / 1.008 * pi / 2), as the published code has it.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        steps = config.num_train_timesteps
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1.0 - signal[1:] / signal[:-1]).clamp(max=0.999)
        self.alpha_bar = torch.cumprod(1.0 - beta, dim=0)
        """(T,) float64."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(...) integer timesteps => alpha_t and sigma_t, (..., 1) float32 each."""
        alpha, sigma = _alpha_sigma(self, t.device)
        return alpha[t].unsqueeze(-1), sigma[t].unsqueeze(-1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for x0 and noise (..., C) at timesteps t (...)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output, (..., C)."""
        alpha, sigma = self.alpha_sigma(t)
        match self.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case _:
                return alpha * noise - sigma * x0

    @property
    def first_timestep(self) -> int:
        """Where sampling starts: T - 1, or earlier where lambda is clipped."""
        clip = self.config.lambda_min_clipped
        if clip == "auto":
            clip = EPSILON_LAMBDA_MIN if self.config.prediction_type == "epsilon" else None
        if clip is None:
            return self.config.num_train_timesteps - 1
        log_snr = 0.5 * torch.log(self.alpha_bar / (1.0 - self.alpha_bar))
        return int((log_snr >= clip).sum()) - 1


@dataclass(frozen=True)
class SolverGrid:
    """Everything a solver needs, as numbers: S steps.

    At step i, with the network's output o at ``timesteps[i]``::

        x0     = x0_state[i] * x + x0_output[i] * o
        x_next = state[i] * x + estimate[i] * x0 + previous[i] * x0_before + noise[i] * fresh
    """

    timesteps: tuple[int, ...]
    x0_state: tuple[float, ...]
    x0_output: tuple[float, ...]
    state: tuple[float, ...]
    estimate: tuple[float, ...]
    previous: tuple[float, ...]
    noise: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(
        self, i: int, x: Tensor, before: Tensor, output: Tensor, fresh: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            i: which.
            x: (..., C) state.
            before: (..., C) the estimate of x0 before.
            output: (..., C) of the network.
            fresh: (..., C) standard normal noise of a stochastic solver.

        Returns:
            the next state, and the estimate of x0.
        """
        x0 = torch.add(x * self.x0_state[i], output, alpha=self.x0_output[i])
        x = torch.add(x * self.state[i], x0, alpha=self.estimate[i])
        if self.previous[i]:
            x = x.add_(before, alpha=self.previous[i])
        if fresh is not None and self.noise[i]:
            x = x.add_(fresh, alpha=self.noise[i])
        return x, x0

    def table(self, device: torch.device) -> Tensor:
        """(S, 6) float32 coefficients, for loops that a compiler or a device runs."""
        columns = (
            self.x0_state,
            self.x0_output,
            self.state,
            self.estimate,
            self.previous,
            self.noise,
        )
        return torch.tensor(columns, device=device).T.contiguous()

    def steps_within(self, low: float, high: float, last: int) -> range:
        """The steps whose timestep, as a share of the ``last`` one, is from low to high."""
        found = [i for i, t in enumerate(self.timesteps) if low <= t / last <= high]
        return range(found[0], found[-1] + 1) if found else range(0)

    @property
    def is_stochastic(self) -> bool:
        """Whether steps draw fresh noise."""
        return any(self.noise)

    @property
    def num_fresh(self) -> int:
        """Steps that fresh noise is needed for."""
        return len(self) if self.is_stochastic else 0


def solver_grid(schedule: NoiseSchedule, num_inference_steps: int, solver: Solver) -> SolverGrid:
    """The coefficients of a solver on equally spaced timesteps.

    Args:
        schedule: noise law and prediction type.
        num_inference_steps: S, from 1 to the timestep where sampling starts.
        solver: ``dpmsolver++`` is DPM-Solver++(2M), midpoint form (Lu et al. 2022, Algorithm 2),
            its last step of first order, ending in x0; ``ddpm`` is ancestral sampling;
            ``few-step`` is DDIM (Song et al. 2020), exact with a head that predicts the x0 that
            its step needs (``models.few_step``).

    Raises:
        ConfigError: there are not that many distinct timesteps.
    """
    if not 1 <= num_inference_steps <= schedule.first_timestep:
        raise ConfigError(
            f"num_inference_steps is {num_inference_steps}, but this noise law allows 1 to "
            f"{schedule.first_timestep}."
        )
    spacing = torch.linspace(0, schedule.first_timestep, num_inference_steps + 1).double()
    times = spacing.round().long().flip(0)[:-1]
    alpha_bar = torch.cat([schedule.alpha_bar[times], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    x0_state, x0_output = _x0_coefficients(schedule.config.prediction_type, alpha[:-1], sigma[:-1])
    match solver:
        case "dpmsolver++":
            make = _dpm_coefficients
        case "ddpm":
            make = _ddpm_coefficients
        case "few-step":
            make = _ddim_coefficients
    columns = [x0_state, x0_output, *make(alpha, sigma)]
    return SolverGrid(
        tuple(times.tolist()), *(tuple(float(c) for c in column) for column in columns)
    )


def guided(predict: Predict, scale: float) -> Predict:
    """Classifier-free guidance on the network's output: u + scale * (c - u).

    Args:
        predict: takes 2 N rows, the conditional ones first, and returns as many.
        scale: 1 gives the conditional output.

    Returns:
        a prediction for N rows.
    """

    def mixed(x: Tensor, i: int) -> Tensor:
        conditional, unconditional = predict(torch.cat([x, x]), i).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return mixed


def solve(
    predict: Predict,
    x: Tensor,
    grid: SolverGrid,
    draw: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrate from noise to x0.

    Args:
        predict: (x_t, step index i) => the network's output at ``grid.timesteps[i]``.
        x: (..., C) float32 standard normal noise.
        grid: coefficients from ``solver_grid``.
        draw: step index => fresh standard normal noise like ``x``; for stochastic solvers.

    Returns:
        (..., C) x0.
    """
    before = x
    for i in range(len(grid)):
        fresh = None if draw is None else draw(i)
        x, before = grid.step(i, x, before, predict(x, i), fresh)
    return x


Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def _dpm_coefficients(alpha: Tensor, sigma: Tensor) -> Columns:
    log_snr = torch.log(alpha) - torch.log(sigma)  # the last, at x0, is infinite
    step = log_snr[1:] - log_snr[:-1]
    estimate = alpha[1:] * -torch.expm1(-step)
    extrapolation = torch.zeros_like(step)  # first and last steps are of first order
    extrapolation[1:-1] = 0.5 * step[1:-1] / step[:-2]
    return (
        sigma[1:] / sigma[:-1],
        estimate * (1.0 + extrapolation),
        -estimate * extrapolation,
        torch.zeros_like(step),
    )


def _ddim_coefficients(alpha: Tensor, sigma: Tensor) -> Columns:
    """x_next = alpha_next x0 + sigma_next epsilon, epsilon being what x has beside alpha x0."""
    ratio = sigma[1:] / sigma[:-1]
    nothing = torch.zeros_like(ratio)
    return ratio, alpha[1:] - alpha[:-1] * ratio, nothing, nothing


def _ddpm_coefficients(alpha: Tensor, sigma: Tensor) -> Columns:
    """Mean and deviation of q(x_next | x_t, x0) (Ho et al. 2020, Eqs. 6 and 7)."""
    ratio = alpha[:-1] / alpha[1:]
    kept = sigma[1:].square() / sigma[:-1].square()
    beta = 1.0 - ratio.square()
    estimate = alpha[1:] * beta / sigma[:-1].square()
    return ratio * kept, estimate, torch.zeros_like(ratio), (kept * beta).sqrt()


def _x0_coefficients(kind: PredictionType, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    match kind:
        case "epsilon":
            return 1.0 / alpha, -sigma / alpha
        case "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case _:
            return alpha, -sigma


@lru_cache(maxsize=16)
def _alpha_sigma(schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    alpha_bar = schedule.alpha_bar
    return alpha_bar.sqrt().float().to(device), (1.0 - alpha_bar).sqrt().float().to(device)
