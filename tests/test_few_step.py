"""Sampling with a few-step head: the same latents however the decode step runs."""

import pytest
import torch

from latentlm_core.models.few_step import FewStepConfig
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.sampling import LatentLMEngine, SamplerConfig
from latentlm_core.sampling.decoding import Mode
from tests.test_models import tiny_latent_lm, wake
from tests.test_sampling import requests
from tests.tiny_training import Listener

CONFIG = SamplerConfig(solver="few-step", num_inference_steps=2, guidance_scale=1.5)


def few_step_lm() -> LatentLM:
    few_step = FewStepConfig(steps=(1, 2), guidance_scale=1.5)
    torch.manual_seed(3)
    model = LatentLM(tiny_latent_lm().config.model_copy(update={"few_step": few_step}))
    del model.backbone.blocks[1:], model.head.blocks[1:]
    return wake(model)


@pytest.mark.parametrize("mode", ["static", "compile"])
def test_each_mode_draws_what_eager_steps_draw(mode: Mode):
    model, listener = few_step_lm(), Listener()
    wanted = LatentLMEngine(model, CONFIG, "eager").generate(requests(3))
    engine = LatentLMEngine(model, CONFIG, mode, progress=listener)
    torch.testing.assert_close(engine.generate(requests(3)), wanted, rtol=1e-4, atol=1e-4)
    assert listener.warnings == []
    assert engine.mode == mode
    assert wanted.std() > 0.1


def test_where_its_steps_end_changes_what_it_draws():
    """So the comparison of modes is one of embeddings that matter."""
    model = few_step_lm()
    wanted = LatentLMEngine(model, CONFIG, "eager").generate(requests(3))
    torch.nn.init.zeros_(model.head.end_embedding.mlp[-1].weight)
    without = LatentLMEngine(model, CONFIG, "eager").generate(requests(3))
    assert not torch.allclose(without, wanted, atol=1e-3)
