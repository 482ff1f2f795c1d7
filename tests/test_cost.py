"""What training costs by the formula is what runs, but for what nobody sees."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentlm_core.artifacts import build_generator
from latentlm_core.data.documents import pad
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.draws import Draws
from latentlm_core.layout import Extent, SequenceLayout
from latentlm_core.models.cost import (
    attention_flops,
    forward_flops,
    timestep_weights,
    training_flops,
)
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.recipes import lm_recipe
from latentlm_core.runtime import generator
from tests.test_transfusion import CHANNELS, MARKS, pages, tiny_config
from tests.tiny_parallel import make_dit, make_lm

SIZE = LatentLMConfig(
    backbone=tiny_config().backbone,
    head=DiffusionHeadConfig(num_layers=2, intermediate_size=40, noise_repeats=3),
    latent_channels=CHANNELS,
    vocab_size=len(MARKS) + MARKS.bos,
    predicts_text=True,
)


def counted(model, batch) -> tuple[int, int]:
    """Operations of the forward pass, and of both passes, as PyTorch counts them."""
    draws, latents = Draws(generator("x")), batch.latents
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if isinstance(model, DiT):
            loss = model.loss(latents[:, 1:], batch.ids[:, 0], draws)[0].sum()
        else:
            losses = model(batch.ids, latents, batch.layout, draws)
            loss = losses.latent.sum() + losses.text.sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def unneeded(model, layout: SequenceLayout) -> int:
    """What PyTorch computes and we leave out: pairs that do not see one another, and a timestep."""
    if isinstance(model, DiT):
        return 0
    backbone, extent = model.config.backbone, layout.extent
    rows, length = layout.kind.shape
    seen, clean = extent.causal_pairs, 0
    if isinstance(model, Transfusion):
        seen += extent.ahead_pairs
        clean = 2 * timestep_weights(backbone.hidden_size)
    return backbone.num_layers * attention_flops(backbone, rows * length**2 - seen) + clean


def cases():
    """A model and an unpadded batch of each kind."""
    for make in (make_lm, make_dit):
        task, stream = make()
        yield task.model, stream.batch(0)
    for document in pages():
        yield LatentLM(SIZE), pad([document])
        yield Transfusion(tiny_config()), pad([document])


def test_operations_are_those_that_run():
    kinds = set()
    for model, batch in cases():
        kinds.add(type(model))
        layout, left_out = batch.layout, unneeded(model, batch.layout)
        forward, _ = counted(model, batch)
        assert forward_flops(model.config, layout) + left_out == forward
    assert kinds == {LatentLM, DiT, Transfusion}


@pytest.mark.parametrize("kind", ["tiny", "dit-tiny"])
def test_backward_costs_twice_as_much_but_for_what_has_no_gradient(kind):
    model = build_generator(lm_recipe(kind).model.complete((3, 3), CHANNELS, 9))
    latents, ids = torch.randn(2, 10, CHANNELS), torch.zeros(2, 10, dtype=torch.int64)
    layout = SequenceLayout.of_images(2, 9)
    _, both = counted(model, SequenceBatch(ids, latents, layout, ("", "")))
    needed = training_flops(model.config, layout) + 3 * unneeded(model, layout)
    assert 0.97 * needed < both < needed


def test_work_grows_with_what_is_learned():
    config: DiTConfig = make_dit()[0].model.config
    one, two = (SequenceLayout.of_images(rows, 4) for rows in (1, 2))
    assert training_flops(config, two) == 2 * training_flops(config, one)
    free = make_lm()[0].model.config
    few, many = (SequenceLayout.of_images(1, length) for length in (4, 8))
    assert training_flops(free, many) > 2 * training_flops(free, few)


def test_an_extent_counts_what_is_there():
    document = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]])
    span = torch.tensor([[-1, 0, 0, -1, 1, -1], [0, 0, -1, -1, -1, -1]])
    assert Extent.of(document, span) == Extent(7, 6 + 3 + 3, 1 + 1)
    assert Extent.of(torch.full((1, 2), -1), torch.full((1, 2), -1)) == Extent(0, 0, 0)
    layout = SequenceLayout.of_images(2, 3)
    assert layout.extent == Extent(6, 12, 1 + 1)
    assert layout.rows(0, 1).extent == Extent(3, 6, 1)
