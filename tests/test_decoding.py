"""The decode step in its ways: eager, over a pinned cache, compiled, captured."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from latentlm_core.diffusion import DiffusionConfig, NoiseSchedule, guided, solve, solver_grid
from latentlm_core.errors import ConfigError
from latentlm_core.models.heads import DiffusionHead
from latentlm_core.nn.matmul import MIN_ROWS, compiled_linear, fast_linear
from latentlm_core.runtime import evaluating
from latentlm_core.sampling import LatentLMEngine, Request, SamplerConfig, make_engine, scanned
from latentlm_core.sampling.base import LatentSampler
from latentlm_core.sampling.decoding import (
    COMPILE_STEPS,
    COMPILE_STEPS_OF_MANY,
    DecodeStep,
    Work,
    resolve_mode,
)
from tests.test_models import tiny_latent_lm
from tests.test_sampling import GUIDED, requests, tiny_dit

CPU = torch.device("cpu")
RAMP = GUIDED.model_copy(update={"guidance_schedule": "linear"})
INTERVAL = GUIDED.model_copy(update={"guidance_interval": (0.3, 0.8)})


class Ear:
    """A listener that keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def bar(self, label: str, total: int, unit: str, done: int = 0):
        raise AssertionError("no bar is expected")

    def note(self, message: str) -> None:
        raise AssertionError(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def plain_draw(
    head: DiffusionHead, condition: Tensor, noise: Tensor, config: SamplerConfig
) -> Tensor:
    """The loop of ``head.forward`` that ``sample`` replaces."""
    grid = solver_grid(head.schedule, config.num_inference_steps, config.solver)

    def predict(x: Tensor, i: int) -> Tensor:
        return head(x, torch.full((len(x),), grid.timesteps[i]), condition)

    return solve(guided(predict, config.guidance_scale), noise, grid)


@pytest.mark.parametrize("limit", [1, 1 << 10, 1 << 30])
def test_modulations_computed_beforehand_change_nothing(monkeypatch, limit):
    """Whatever number of solver steps they are computed for at once."""
    monkeypatch.setattr("latentlm_core.models.heads.MAX_MODULATIONS", limit)
    head = tiny_latent_lm().head
    grid = solver_grid(head.schedule, 4, "dpmsolver++")
    condition, noise = torch.randn(6, 64), torch.randn(3, 8)
    with torch.no_grad():
        times = head.timestep_embedding(torch.tensor(grid.timesteps))
        drawn = head.sample(condition, noise, grid, times, 2.0)
        wanted = plain_draw(head, condition, noise, GUIDED)
    torch.testing.assert_close(drawn, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
@pytest.mark.parametrize("config", [SamplerConfig(num_inference_steps=4), GUIDED, RAMP, INTERVAL])
def test_a_pinned_cache_draws_what_a_growing_one_draws(config, solver):
    config = config.model_copy(update={"solver": solver})
    model, asked = tiny_latent_lm(), requests(3)
    growing = LatentLMEngine(model, config, "eager").generate(asked)
    pinned = LatentLMEngine(model, config, "static")
    for _ in range(2):  # the second time in buffers that were used
        torch.testing.assert_close(pinned.generate(asked), growing, rtol=1e-4, atol=1e-5)


def test_a_smaller_batch_is_filled_up_in_the_same_buffers():
    model, asked = tiny_latent_lm(), requests(5)
    engine = LatentLMEngine(model, GUIDED, "static")
    together = engine.generate(asked)
    step = engine._steps._latest
    few = engine.generate(asked[:2])
    assert engine._steps._latest is step
    torch.testing.assert_close(few, together[:2], rtol=1e-4, atol=1e-5)
    engine.generate(requests(6))
    assert engine._steps._latest is not step


def test_prompts_of_several_tokens_are_read_before_the_first_step():
    model = tiny_latent_lm()
    asked = [Request((i, 3, 5), (10, 3, 5), 4, seed=i) for i in range(2)]
    drawn = [LatentLMEngine(model, GUIDED, mode).generate(asked) for mode in ("eager", "static")]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)


def test_a_scan_over_the_solver_draws_what_the_loop_draws(monkeypatch):
    """Not compiled: the modulations beforehand or within, an interval, fresh noise."""
    monkeypatch.setattr(scanned, "compiled_linear", lambda weight: nullcontext())
    model = tiny_latent_lm()
    states, noise, fresh = torch.randn(6, 64), torch.randn(3, 8), torch.randn(4, 3, 8)
    for changes in ({}, {"guidance_interval": (0.3, 0.8)}, {"solver": "ddpm"}):
        sampler = LatentSampler(model, GUIDED.model_copy(update=changes))
        given = (states, noise, fresh if sampler.grid.is_stochastic else None, torch.tensor(2.0))
        with evaluating(model):
            wanted = sampler.draw(*given)
            drawn = sampler.draw_scanned(*given)
        torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-5)


def test_compiled_steps_draw_what_eager_ones_draw():
    """One tiny model, and another batch in the same compiled step."""
    model, ear = tiny_latent_lm(), Ear()
    del model.backbone.blocks[1:], model.head.blocks[1:]
    engine = LatentLMEngine(model, GUIDED, "compile", progress=ear)
    eager = LatentLMEngine(model, GUIDED, "eager")
    for asked in (requests(MIN_ROWS), requests(2)):
        drawn = engine.generate(asked)
        torch.testing.assert_close(drawn, eager.generate(asked), rtol=1e-4, atol=1e-4)
    assert (ear.warnings, engine.mode) == ([], "compile")


@pytest.mark.parametrize("config", [GUIDED, INTERVAL])
def test_a_compiled_head_draws_what_the_loop_draws(config):
    """What a GPU captures where it is to compile."""
    model, states, noise = tiny_latent_lm(), torch.randn(6, 64), torch.randn(3, 8)
    plain, compiled = (LatentSampler(model, config) for _ in range(2))
    compiled.compile_head()
    with evaluating(model):
        wanted, drawn = (each.draw(states, noise, None, 2.0) for each in (plain, compiled))
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_replaced_leaves_no_cache_behind():
    """Not even until the garbage of circles is collected."""
    engine = LatentLMEngine(tiny_latent_lm(), GUIDED, "static")
    gc.disable()
    try:
        engine.generate(requests(2))
        latest = engine._steps._latest
        assert latest is not None
        cache = weakref.ref(latest.cache)
        del latest
        engine.generate(requests(3))
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_what_cannot_be_had_runs_eagerly_after_one_warning(monkeypatch, mode):
    def fail(self: DecodeStep, work: Work) -> Work:
        self._feed()
        raise RuntimeError("no compiler is here\nand more")

    monkeypatch.setattr(DecodeStep, "_compile", fail)
    monkeypatch.setattr(DecodeStep, "_capture", fail)
    model, ear = tiny_latent_lm(), Ear()
    engine = LatentLMEngine(model, GUIDED, mode, progress=ear)
    wanted = LatentLMEngine(model, GUIDED, "eager").generate(requests(3))
    for _ in range(2):
        torch.testing.assert_close(engine.generate(requests(3)), wanted, rtol=1e-4, atol=1e-5)
    assert (len(ear.warnings), engine.mode) == (1, "eager")
    assert "(no compiler is here)" in ear.warnings[0]
    assert "times as long" in ear.warnings[0]


def test_auto_is_decided_anew_for_a_larger_batch(monkeypatch):
    """A first one that is small, and so is drawn eagerly, decides nothing for those after it."""
    monkeypatch.setattr(DecodeStep, "_compile", lambda self, work: work)
    engine = LatentLMEngine(tiny_latent_lm(), GUIDED, num_steps=COMPILE_STEPS_OF_MANY)
    engine.generate(requests(1))
    assert engine.mode == "eager"
    monkeypatch.setattr(LatentSampler, "draw_scanned", LatentSampler.draw)
    engine.generate(requests(MIN_ROWS))
    assert engine.mode == "compile"


def test_auto_compiles_what_repays_it():
    assert resolve_mode("auto", CPU, 2, COMPILE_STEPS) == "compile"
    assert resolve_mode("auto", CPU, 2, COMPILE_STEPS - 1) == "eager"
    assert resolve_mode("auto", CPU, 128, COMPILE_STEPS_OF_MANY) == "compile"
    assert resolve_mode("auto", CPU, 128, COMPILE_STEPS_OF_MANY - 1) == "eager"
    assert resolve_mode("auto", torch.device("cuda"), 2, 0) == "graph"
    assert resolve_mode("static", CPU, 2, COMPILE_STEPS) == "static"


def test_guidance_at_every_timestep_is_guidance_without_an_interval():
    model, asked = tiny_latent_lm(), requests(3)
    everywhere = GUIDED.model_copy(update={"guidance_interval": (0.0, 1.0)})
    drawn = [LatentLMEngine(model, one).generate(asked) for one in (GUIDED, everywhere, INTERVAL)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_an_interval_is_of_timesteps_and_outside_of_it_half_of_the_rows_are_computed(monkeypatch):
    grid = solver_grid(NoiseSchedule(DiffusionConfig()), 4, "dpmsolver++")
    assert grid.timesteps == (999, 749, 500, 250)
    assert grid.steps_within(0.3, 0.8, 999) == range(1, 3)
    assert grid.steps_within(0.0, 1.0, 999) == range(4)
    assert len(grid.steps_within(0.0, 0.1, 999)) == 0
    rows = []
    plain = DiffusionHead.modulated

    def counted(self: DiffusionHead, x_t: Tensor, modulations: list[Tensor]) -> Tensor:
        rows.append(modulations[0].shape[0])
        return plain(self, x_t, modulations)

    monkeypatch.setattr(DiffusionHead, "modulated", counted)
    LatentLMEngine(tiny_latent_lm(), INTERVAL).generate(requests(3, 1))
    assert rows == [3, 6, 6, 3]


def test_an_interval_without_timesteps_is_no_guidance():
    model, asked = tiny_latent_lm(), requests(2)
    nowhere = GUIDED.model_copy(update={"guidance_interval": (0.0, 0.1)})
    plain = SamplerConfig(num_inference_steps=4)
    torch.testing.assert_close(
        LatentLMEngine(model, nowhere).generate(asked),
        LatentLMEngine(model, plain).generate(asked),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_an_impossible_interval_is_refused(interval):
    with pytest.raises(ValueError, match="must rise within 0 and 1"):
        SamplerConfig(guidance_interval=interval)


def test_a_dit_refuses_an_interval():
    with pytest.raises(ConfigError, match="no guidance interval"):
        make_engine(tiny_dit(), INTERVAL)


def test_products_of_many_rows_are_the_same_by_another_library():
    x, layer = torch.randn(MIN_ROWS, 3, 24), torch.nn.Linear(24, 40)
    with torch.inference_mode():
        wanted = layer(x)
        with fast_linear(layer.weight, MIN_ROWS):
            found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with fast_linear(layer.weight.bfloat16(), 99) as mode:
        assert mode is None


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 24), (3, 24), (MIN_ROWS, 1, 24)])
def test_products_for_a_compiler_are_the_same_of_few_rows_and_of_many(shape):
    x = torch.randn(shape)
    for layer in (torch.nn.Linear(24, 40), torch.nn.Linear(24, 8, bias=False)):
        with torch.inference_mode():
            wanted = layer(x)
            with compiled_linear(layer.weight):
                found = layer(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_keep_the_solver_in_float32():
    """They agree loosely: a few hundredths of a standard deviation."""
    model, asked = tiny_latent_lm(), requests(4)
    wanted = LatentLMEngine(model, GUIDED).generate(asked)
    drawn = LatentLMEngine(model.bfloat16(), GUIDED).generate(asked)
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [GUIDED, RAMP, INTERVAL])
def test_a_captured_step_draws_what_an_eager_one_draws(config):
    model, ear = tiny_latent_lm().cuda(), Ear()
    engine = LatentLMEngine(model, config, "graph", progress=ear)
    eager = LatentLMEngine(model, config, "eager")
    for asked in (requests(3), requests(3)[::-1], requests(2)):
        torch.testing.assert_close(
            engine.generate(asked), eager.generate(asked), rtol=1e-4, atol=1e-4
        )
    assert ear.warnings == []
    assert engine._step is not None
    assert engine._step.mode == "graph"
