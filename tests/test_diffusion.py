"""The noise law and the solvers: against the published code and against closed forms."""

import math

import pytest
import torch

from latentlm_core.diffusion import DiffusionConfig, NoiseSchedule, solve, solver_grid
from latentlm_core.errors import ConfigError

STEP_COUNTS = (1, 3, 5, 10, 20, 50)


def schedule(prediction_type: str = "v_prediction", clip: float | str | None = None):
    return NoiseSchedule(DiffusionConfig(prediction_type=prediction_type, lambda_min_clipped=clip))


def test_schedule_noising_and_velocity_agree_with_the_published_code(golden):
    tensors, _ = golden("schedule")
    noise_law = schedule()
    t, x0, noise = tensors["t"], tensors["x0"], tensors["noise"]
    torch.testing.assert_close(
        noise_law.alpha_bar.float(), tensors["alphas_cumprod"], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        noise_law.add_noise(x0, noise, t), tensors["noisy"], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        noise_law.target(x0, noise, t), tensors["velocity"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_solver_agrees_with_the_published_code(golden, prediction_type, num_steps):
    tensors, _ = golden("schedule")
    grid = solver_grid(schedule(prediction_type), num_steps, "dpmsolver++")
    assert list(grid.timesteps) == tensors[f"timesteps.{num_steps}"].tolist()

    def network(x, i):
        slope = tensors["toy.b"] * (1 + grid.timesteps[i] / 1000)
        return torch.tanh(x @ tensors["toy.A"] + slope)

    wanted = tensors[f"toy.{prediction_type}.{num_steps}"]
    result = solve(network, tensors["toy.noise"], grid)
    # epsilon divides by alpha = 5e-5 at t = 999: results of 83,000 agree relatively
    torch.testing.assert_close(
        result / wanted.abs().max(), wanted / wanted.abs().max(), rtol=1e-5, atol=1e-5
    )


def test_alpha_bar_is_the_cosine_law_until_the_clip():
    alpha_bar = schedule().alpha_bar

    def signal(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 250, 500, 900):
        assert alpha_bar[t].item() == pytest.approx(signal((t + 1) / 1000) / signal(0), rel=1e-9)
    assert alpha_bar[999].item() == pytest.approx(2.43e-9, rel=1e-2)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_the_true_target_gives_back_x0_in_one_step(prediction_type):
    noise_law = schedule(prediction_type, "auto")
    grid = solver_grid(noise_law, 1, "dpmsolver++")
    x0, noise = torch.randn(2, 16, 4).unbind()
    t = torch.full((16,), grid.timesteps[0])
    x_t = noise_law.add_noise(x0, noise, t)
    result = solve(lambda x, i: noise_law.target(x0, noise, t), x_t, grid)
    torch.testing.assert_close(result, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
def test_gaussian_data_come_back_with_their_mean_and_std(prediction_type, solver):
    """For x0 ~ N(m, s^2) the best prediction is known, so the solver's result is too."""
    mean, std = 0.7, 0.5
    noise_law = schedule(prediction_type, "auto")
    grid = solver_grid(noise_law, 100, solver)
    alpha_bar = noise_law.alpha_bar[list(grid.timesteps)]
    alpha, sigma = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()

    def best(x, i):
        variance = (alpha[i] * std) ** 2 + sigma[i] ** 2
        x0 = mean + alpha[i] * std**2 / variance * (x - alpha[i] * mean)
        epsilon = (x - alpha[i] * x0) / sigma[i]
        velocity = alpha[i] * epsilon - sigma[i] * x0
        return {"v_prediction": velocity, "epsilon": epsilon, "sample": x0}[prediction_type]

    fresh = torch.randn(len(grid), 20_000)
    result = solve(best, torch.randn(20_000), grid, lambda i: fresh[i])
    assert result.mean().item() == pytest.approx(mean, abs=0.02)
    assert result.std().item() == pytest.approx(std, abs=0.02)


def test_lambda_clip_starts_epsilon_where_alpha_is_usable():
    clipped, unclipped = schedule("epsilon", "auto"), schedule("epsilon")
    assert unclipped.first_timestep == 999
    log_snr = 0.5 * torch.log(clipped.alpha_bar / (1 - clipped.alpha_bar))
    first = clipped.first_timestep
    assert log_snr[first] >= -5.1 > log_snr[first + 1]
    assert schedule("v_prediction", "auto").first_timestep == 999


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_steps_that_would_repeat_a_timestep_are_refused(prediction_type):
    """A repeated timestep divides by a step of zero; the result was NaN, the image black."""
    noise_law = schedule(prediction_type, "auto")
    most = noise_law.first_timestep
    grid = solver_grid(noise_law, most, "dpmsolver++")
    assert all(math.isfinite(c) for column in (grid.state, grid.estimate) for c in column)
    for num_steps in (0, most + 1):
        with pytest.raises(ConfigError, match=f"allows 1 to {most}"):
            solver_grid(noise_law, num_steps, "dpmsolver++")


def test_only_ancestral_sampling_is_stochastic_and_its_last_step_is_not():
    assert not solver_grid(schedule(), 20, "dpmsolver++").is_stochastic
    ancestral = solver_grid(schedule(), 20, "ddpm")
    assert ancestral.is_stochastic
    assert ancestral.noise[-1] == 0.0


def test_tables_survive_a_cast_of_the_model_to_bfloat16():
    """The published code casts timesteps to bf16, which leaves 507 of 1000."""
    noise_law = schedule()
    t = torch.arange(1000)
    alpha, _ = noise_law.alpha_sigma(t)
    assert alpha.dtype == torch.float32
    assert len(alpha.unique()) == 1000
