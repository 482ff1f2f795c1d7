"""The sampling engine: golden sequence, caches, batches and seeds."""

import pytest
import torch

from latentlm_core.errors import ConfigError
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.published import latent_lm_weights
from latentlm_core.sampling import LatentLMEngine, Noise, Request, SamplerConfig, make_engine
from tests.test_models import image_inputs, tiny_latent_lm, wake

GUIDED = SamplerConfig(num_inference_steps=4, guidance_scale=2.0)


def requests(num: int, num_latents: int = 5) -> list[Request]:
    return [Request((i % 10,), (10,), num_latents, seed=100 + i) for i in range(num)]


def tiny_dit() -> DiT:
    return wake(
        DiT(
            DiTConfig(
                hidden_size=32,
                num_layers=2,
                num_heads=2,
                intermediate_size=64,
                grid=(2, 3),
                latent_channels=8,
                vocab_size=11,
            )
        )
    )


def test_a_guided_sequence_agrees_with_the_published_code(golden):
    tensors, weights = golden("latentlm_transformer")
    model = tiny_latent_lm()
    model.load_state_dict(latent_lm_weights(weights))
    engine = LatentLMEngine(model, SamplerConfig(num_inference_steps=20, guidance_scale=1.65))
    labels = tensors["sample.class"]
    ids = torch.cat([labels, torch.full_like(labels, 10)]).unsqueeze(1)
    drawn = engine.decode(ids, Noise(tensors["sample.noise"].transpose(0, 1).contiguous()))
    torch.testing.assert_close(drawn, tensors["sample.latents"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
@pytest.mark.parametrize("make", [tiny_latent_lm, tiny_dit])
def test_a_sample_is_the_same_alone_and_in_a_batch(make, solver):
    engine = make_engine(make(), GUIDED.model_copy(update={"solver": solver}))
    asked = requests(7, 6)
    together = engine.generate(asked)
    alone = torch.cat([engine.generate([request]) for request in asked])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).min() > 0  # different seeds do differ


def test_cached_decoding_equals_decoding_by_full_forwards():
    """Each latent is drawn again from a full forward over what was drawn before it."""
    model = tiny_latent_lm()
    engine = LatentLMEngine(model, GUIDED)
    noise = Noise(torch.randn(2, 5, 8))
    ids = torch.tensor([[3], [7], [10], [10]])
    cached = engine.decode(ids, noise)
    layout = SequenceLayout.of_images(4, 5)
    with torch.no_grad():
        inputs, latents = image_inputs(ids[:, 0], cached.repeat(2, 1, 1))
        states = model.states(inputs[:, :-1], latents[:, :-1], layout)
        times = model.head.timestep_embedding(torch.tensor(engine.grid.timesteps))
        for i in range(5):
            again = model.head.sample(
                model.head.condition(states[:, i]), noise.start[:, i], engine.grid, times, 2.0
            )
            torch.testing.assert_close(again, cached[:, i], rtol=1e-4, atol=1e-5)


def test_guidance_of_one_is_no_guidance():
    model = tiny_latent_lm()
    noise = Noise(torch.randn(1, 5, 8))
    plain = LatentLMEngine(model, SamplerConfig(num_inference_steps=4))
    assert not plain.config.is_guided
    unguided = plain.decode(torch.tensor([[3]]), noise)
    guided = LatentLMEngine(model, GUIDED.model_copy(update={"guidance_scale": 1.0}))
    both = guided.decode(torch.tensor([[3], [10]]), noise)
    torch.testing.assert_close(unguided, both, rtol=1e-4, atol=1e-5)


def test_linear_guidance_rises_from_one_to_the_scale():
    linear = GUIDED.model_copy(update={"guidance_schedule": "linear"})
    engine = LatentLMEngine(tiny_latent_lm(), linear)
    assert [engine._guidance_scale(i, 5) for i in range(5)] == [1.0, 1.25, 1.5, 1.75, 2.0]
    constant = LatentLMEngine(tiny_latent_lm(), GUIDED)
    assert constant._guidance_scale(0, 5) == 2.0


def test_a_dit_refuses_a_guidance_ramp():
    linear = GUIDED.model_copy(update={"guidance_schedule": "linear"})
    with pytest.raises(ConfigError, match="constant"):
        make_engine(tiny_dit(), linear)


def test_the_model_keeps_its_mode_and_its_gradients():
    model = tiny_latent_lm()
    model.train()
    LatentLMEngine(model, GUIDED).generate(requests(2))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_positions_are_counted_for_the_progress_bar():
    calls = []
    LatentLMEngine(tiny_latent_lm(), GUIDED).generate(requests(1), lambda: calls.append(1))
    assert len(calls) == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_what_the_cpu_draws():
    model = tiny_latent_lm()
    wanted = LatentLMEngine(model, GUIDED).generate(requests(3))
    drawn = LatentLMEngine(model.cuda(), GUIDED).generate(requests(3))
    torch.testing.assert_close(drawn, wanted, rtol=1e-3, atol=1e-4)
