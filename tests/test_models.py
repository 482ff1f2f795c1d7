"""LatentLM and DiT: agreement with the published code, sizes, and invariances."""

import pytest
import torch

from latentlm_core.diffusion import solver_grid
from latentlm_core.draws import Draws
from latentlm_core.layout import AttentionMask, Kind, SequenceLayout
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.heads import DiffusionHead, DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.published import dit_weights, latent_lm_weights, vibevoice_head_weights
from latentlm_core.runtime import generator


def tiny_latent_lm(num_kv_heads: int | None = None, **changes) -> LatentLM:
    model = LatentLM(
        LatentLMConfig(
            backbone=TransformerConfig(
                hidden_size=64,
                num_layers=2,
                num_heads=4,
                num_kv_heads=num_kv_heads,
                intermediate_size=128,
            ),
            head=DiffusionHeadConfig(num_layers=2, intermediate_size=128),
            **{"latent_channels": 8, "vocab_size": 11, **changes},
        )
    )
    return wake(model)


def wake(model: torch.nn.Module) -> torch.nn.Module:
    """Fill the zero-initialised layers, so that every weight matters in a comparison."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def raster(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(2).transpose(1, 2)


def image_inputs(labels: torch.Tensor, latents: torch.Tensor):
    """ids (B, T + 1) and latents (B, T + 1, C) of class-conditional images."""
    ids = torch.zeros(len(labels), latents.shape[1] + 1, dtype=torch.int64)
    ids[:, 0] = labels
    return ids, torch.cat([torch.zeros_like(latents[:, :1]), latents], dim=1)


def test_latent_lm_agrees_with_the_published_code(golden):
    tensors, weights = golden("latentlm_transformer")
    model = tiny_latent_lm()
    model.load_state_dict(latent_lm_weights(weights))
    ids, latents = image_inputs(tensors["in.class"], raster(tensors["in.latents"]))
    layout = SequenceLayout.of_images(3, 16)
    with torch.no_grad():
        condition = model.head.condition(model.states(ids[:, :-1], latents[:, :-1], layout))
        output = model.head(
            raster(tensors["in.noisy"]), tensors["in.timesteps"], condition.repeat_interleave(2, 0)
        )
    torch.testing.assert_close(condition, tensors["out.condition"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, raster(tensors["out.head"]), rtol=1e-5, atol=1e-5)


def test_dit_agrees_with_the_published_code(golden):
    tensors, weights = golden("dit")
    model = DiT(
        DiTConfig(
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=128,
            grid=(4, 4),
            latent_channels=8,
            vocab_size=11,
        )
    )
    model.load_state_dict(dit_weights(weights))
    torch.testing.assert_close(model.position, weights["pos_embed"][0])
    with torch.no_grad():
        output = model(raster(tensors["in.noisy"]), tensors["in.timesteps"], tensors["in.class"])
    torch.testing.assert_close(output, raster(tensors["out"]), rtol=1e-5, atol=1e-5)


def test_vibevoice_head_agrees_with_the_published_code(golden):
    tensors, weights = golden("vibevoice_diffusion_head")
    config = DiffusionHeadConfig(
        num_layers=2,
        intermediate_size=96,
        norm_eps=1e-5,
        norm_affine=True,
        condition_norm=False,
        latent_bias=False,
    )
    head = DiffusionHead(config, hidden_size=32, latent_channels=6)
    head.load_state_dict(vibevoice_head_weights(weights))
    with torch.no_grad():
        condition = head.condition(tensors["in.condition"])
        output = head(tensors["in.noisy"], tensors["in.timesteps"], condition)
    torch.testing.assert_close(output, tensors["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_cached_states_equal_the_full_forward(num_kv_heads):
    model = tiny_latent_lm(num_kv_heads)
    x = torch.randn(3, 9, 64)
    position = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        full = model.backbone(x, position, AttentionMask(is_causal=True))
        cache = model.backbone.new_cache(3, 9)
        pieces = [model.step(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
    for piece, end in zip(pieces, (4, 5, 8, 9), strict=True):
        torch.testing.assert_close(piece, full[:, end - 1], rtol=1e-5, atol=1e-5)


def test_packed_documents_get_the_states_that_they_get_alone():
    model = tiny_latent_lm(predicts_text=True)
    kind = torch.tensor([[1, 2, 2, 1, 1, 2, 1]])
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    span = torch.tensor([[-1, 0, 0, -1, -1, 0, -1]])
    predict = torch.zeros_like(kind)
    ids, latents = torch.randint(11, (1, 7)), torch.randn(1, 7, 8)

    def states(columns: slice) -> torch.Tensor:
        maps = (m[:, columns] for m in (kind, document, position, span, predict))
        layout = SequenceLayout.make(*maps)
        return model.states(ids[:, columns], latents[:, columns], layout)

    with torch.no_grad():
        together = states(slice(0, 7))
        torch.testing.assert_close(together[:, :3], states(slice(0, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[:, 3:], states(slice(3, 7)), rtol=1e-5, atol=1e-5)


def test_a_state_sees_nothing_of_what_it_predicts():
    model = tiny_latent_lm()
    ids, latents = image_inputs(torch.tensor([4]), torch.randn(1, 6, 8))
    layout = SequenceLayout.of_images(1, 6)
    changed = latents.clone()
    changed[:, 4:] += 1.0
    with torch.no_grad():
        before = model.states(ids[:, :-1], latents[:, :-1], layout)
        after = model.states(ids[:, :-1], changed[:, :-1], layout)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_noise_repeats_equal_separate_passes():
    """K repeats over one backbone pass give the errors of K heads run one by one."""
    model = tiny_latent_lm()
    head, x0, condition = model.head, torch.randn(5, 8), torch.randn(5, 64)
    with torch.no_grad():
        error, t = head.loss(x0, condition, Draws(generator(1, "loss")))
        source = generator(1, "loss")
        times = torch.randint(1000, (4, 5), generator=source)
        noises = torch.randn(4, 5, 8, generator=source)
        for repeat in range(4):
            x_t = head.schedule.add_noise(x0, noises[repeat], times[repeat])
            output = head(x_t, times[repeat], condition)
            target = head.schedule.target(x0, noises[repeat], times[repeat])
            alone = (output - target).square().sum(-1)
            torch.testing.assert_close(error[repeat], alone, rtol=1e-5, atol=1e-5)
    assert t.shape == (4, 5)
    assert not torch.equal(t[0], t[1])


def test_a_new_head_outputs_zero_so_its_loss_is_the_energy_of_the_target():
    head = DiffusionHead(DiffusionHeadConfig(num_layers=2, intermediate_size=64), 32, 8)
    x0, condition = torch.randn(4000, 8), torch.randn(4000, 32)
    assert not head(x0, torch.zeros(4000, dtype=torch.int64), condition).any()
    error, _ = head.loss(x0, condition, Draws(generator(0)))
    assert error.mean().item() / 8 == pytest.approx(1.0, abs=0.03)  # v of unit data: variance 1


def test_text_and_latents_are_both_predicted():
    model = tiny_latent_lm(predicts_text=True)
    T, X = int(Kind.TEXT), int(Kind.LATENT)
    kind = torch.tensor([[T, T, X, X]])
    layout = SequenceLayout.make(
        kind,
        torch.zeros_like(kind),
        torch.arange(4).unsqueeze(0),
        torch.tensor([[-1, -1, 0, 0]]),
        torch.tensor([[T, X, X, T]]),
    )
    ids, latents = torch.randint(11, (1, 5)), torch.randn(1, 5, 8)
    losses = model(ids, latents, layout, Draws(generator(0)))
    assert losses.latent.shape == (4, 2)
    with torch.no_grad():
        log_p = model.logits(model.states(ids[:, :-1], latents[:, :-1], layout)).log_softmax(-1)
    wanted = torch.stack([-log_p[0, 0, ids[0, 1]], -log_p[0, 3, ids[0, 4]]])
    torch.testing.assert_close(losses.text.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_guidance_is_the_formula_on_the_output():
    head = tiny_latent_lm().head
    grid = solver_grid(head.schedule, 1, "dpmsolver++")
    conditional, unconditional, noise = torch.randn(3, 64), torch.randn(3, 64), torch.randn(3, 8)
    with torch.no_grad():
        times = head.timestep_embedding(torch.tensor(grid.timesteps))
        both = torch.cat([conditional, unconditional])
        drawn = head.sample(both, noise, grid, times, guidance_scale=3.0)
        t = torch.full((3,), grid.timesteps[0])
        c, u = head(noise, t, conditional), head(noise, t, unconditional)
    x0 = grid.x0_state[0] * noise + grid.x0_output[0] * (u + 3.0 * (c - u))
    torch.testing.assert_close(drawn, x0, rtol=1e-5, atol=1e-5)
