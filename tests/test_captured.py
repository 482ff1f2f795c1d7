"""What a GPU would run, without one: the step recorded and replayed, and on tensors of CUDA."""

from dataclasses import fields, replace

import pytest
import torch

from latentlm_core import diffusion
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.diffusion import NoiseSchedule, SolverGrid, solver_grid
from latentlm_core.layout import SequenceLayout
from latentlm_core.runtime import evaluating
from latentlm_core.sampling import (
    InterleavedEngine,
    LatentLMEngine,
    Request,
    SamplerConfig,
    SpanEngine,
    make_engine,
)
from latentlm_core.sampling.base import LatentSampler
from latentlm_core.sampling.decoding import DecodeStep
from latentlm_core.training import lm_task, step
from latentlm_core.training.lm_task import DiTTask, LMLossConfig, LMTask
from latentlm_core.training.optim import Ema, OptimizerConfig
from latentlm_core.workflows.bench_plain import plain_sampling
from tests.fake_cuda import CUDA, CudaDraws, fake_cuda, move
from tests.recorded import capture
from tests.test_interleaved import HOT, LENGTH, MARKS, REQUESTS, close, writer
from tests.test_models import tiny_latent_lm
from tests.test_sampling import GUIDED, requests, tiny_dit
from tests.test_spans import END, GO_ON, request, speaker

CPU = torch.device("cpu")
RAMP = GUIDED.model_copy(update={"guidance_schedule": "linear"})
INTERVAL = GUIDED.model_copy(update={"guidance_interval": (0.3, 0.8)})
DDPM = GUIDED.model_copy(update={"solver": "ddpm"})
UNGUIDED = SamplerConfig(num_inference_steps=4)


def grid_of(config: SamplerConfig) -> SolverGrid:
    schedule = NoiseSchedule(tiny_latent_lm().config.head.diffusion)
    return solver_grid(schedule, config.num_inference_steps, config.solver)


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(DecodeStep, "_capture", capture)


@pytest.mark.parametrize("config", [UNGUIDED, GUIDED, RAMP, INTERVAL, DDPM])
def test_images_of_a_replayed_step_are_those_of_an_eager_one(captured, config):
    """Several batches through one recording: full, smaller, and full again."""
    model = tiny_latent_lm()
    engine, eager = (LatentLMEngine(model, config, mode) for mode in ("graph", "eager"))
    for asked in (requests(3), requests(2), requests(3)):
        drawn = engine.generate(asked)
        torch.testing.assert_close(drawn, eager.generate(asked), rtol=1e-4, atol=1e-5)
    assert engine.mode == "graph"


def test_a_replayed_step_reads_longer_prompts_too(captured):
    model = tiny_latent_lm()
    asked = [Request((i, 3, 5), (10, 3, 5), 4, seed=i) for i in range(2)]
    drawn = [LatentLMEngine(model, GUIDED, mode).generate(asked) for mode in ("graph", "eager")]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [UNGUIDED, GUIDED])
def test_spans_of_a_replayed_step_are_those_of_an_eager_one(captured, config):
    """Rows are refilled from a queue, and the step serves a second queue."""
    model = speaker()
    engine, eager = (SpanEngine(model, config, GO_ON, END, 2, mode) for mode in ("graph", "eager"))
    for first in (0, 0, 1):
        asked = [request(number, 3 + number % 3) for number in range(first, 5)]
        for ours, wanted in zip(engine.draw(asked), eager.draw(asked), strict=True):
            torch.testing.assert_close(ours.latents, wanted.latents, rtol=1e-4, atol=1e-5)
            assert ours.ended_by == wanted.ended_by
    assert engine.mode == "graph"


def test_pages_of_a_replayed_step_are_those_of_an_eager_one(captured):
    """Words and images by turns, guidance anew for each image, and a second batch."""
    model = writer(MARKS.bod)
    ours, eager = (
        InterleavedEngine(model, GUIDED, HOT, MARKS, LENGTH, mode) for mode in ("graph", "eager")
    )
    for asked in (REQUESTS, REQUESTS[1:3]):
        for one, other in zip(ours.write(asked), eager.write(asked), strict=True):
            close(one, other)
    assert ours.mode == "graph"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (UNGUIDED, torch.float32),
        (GUIDED, torch.bfloat16),
        (DDPM, torch.bfloat16),
        (INTERVAL, torch.float32),
    ],
)
def test_no_step_on_a_gpu_mixes_devices_or_waits(monkeypatch, config, dtype):
    model, grid = tiny_latent_lm(predicts_text=True), grid_of(config)
    with fake_cuda(monkeypatch, grid) as mode:
        move(model, mode, dtype)
        sampler = LatentSampler(model, config)
        branches = 2 if config.is_guided else 1
        with evaluating(model):
            decode = DecodeStep(
                sampler, 3 * branches, 3, 9, "static", decide=lambda states: model.logits(states)
            )
            decode.cache.bounds()
            decode.pin()
            fresh = torch.zeros(len(grid), 3, 8, device=CUDA) if grid.is_stochastic else None
            latents = decode(torch.zeros(3, 8, device=CUDA), fresh, 2.0)
        assert (latents.device, latents.dtype) == (CUDA, torch.float32)
        assert decode.decided.dtype == dtype
        engine = LatentLMEngine(model, config, "static")
        assert engine.generate(requests(3)).shape == (3, 5, 8)


@pytest.mark.parametrize("make", [tiny_latent_lm, tiny_dit])
def test_the_reference_of_the_benchmarks_runs_on_a_gpu(monkeypatch, make):
    model, config = make(), GUIDED
    with fake_cuda(monkeypatch, grid_of(config)) as mode:
        move(model, mode, torch.bfloat16)
        drawn = plain_sampling(model, requests(2, 6), config)
        assert make_engine(model, config, "eager").generate(requests(2, 6)).shape == drawn.shape


@pytest.mark.parametrize("make", [tiny_latent_lm, tiny_dit])
def test_a_training_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing(monkeypatch, make):
    """But for autograd itself, which asks for a real one: gradients are made up."""

    def backward_of(model, *_):
        def backward(objective, is_last):
            assert objective.device == CUDA
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)

        return backward

    model, grid, config = make(), grid_of(GUIDED), OptimizerConfig()
    layout, ids = SequenceLayout.of_images(2, 6), torch.zeros(2, 7, dtype=torch.int64)
    alpha_sigma = diffusion._alpha_sigma(model.schedule, CPU)
    monkeypatch.setattr(lm_task, "Draws", CudaDraws)
    monkeypatch.setattr(step, "backward_of", backward_of)
    monkeypatch.setattr(step, "generator", lambda *names, device: None)
    with fake_cuda(monkeypatch, grid) as mode:
        move(model, mode)
        on_gpu = tuple(mode.from_tensor(part).to(CUDA) for part in alpha_sigma)
        monkeypatch.setattr(diffusion, "_alpha_sigma", lambda schedule, device: on_gpu)
        maps = {
            field.name: mode.from_tensor(value).to(CUDA)
            for field in fields(layout)
            if isinstance(value := getattr(layout, field.name), torch.Tensor)
        }
        batch = SequenceBatch(
            mode.from_tensor(ids).to(CUDA),
            torch.zeros(2, 7, model.config.latent_channels, device=CUDA),
            replace(layout, **maps),
            ("a", "b"),
        )
        task = (DiTTask if make is tiny_dit else LMTask)(model, LMLossConfig())
        stepper = step.Stepper(
            {"model": model},
            {"model": config},
            total_steps=9,
            seed=0,
            device=CUDA,
            dtype=torch.float32,
        )
        ema = Ema(model, 0.9)
        figures = stepper.step(task.turns(0), [batch], 0)
        ema.update(0)
    assert {term.total.device for term in figures.values()} == {CUDA}
