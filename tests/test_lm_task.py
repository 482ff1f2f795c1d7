"""Training LatentLM and DiT: the bands of the validation loss, counts, and learning."""

import pytest
import torch

from latentlm_core.data.packing import SequenceBatch
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.runtime import generator
from latentlm_core.training.lm_task import DiTTask, LMLossConfig, LMTask, loss_bands
from tests.test_models import image_inputs, tiny_latent_lm


def make_batch() -> SequenceBatch:
    """Four images of six latents, a class each."""
    latents = torch.randn(4, 6, 8, generator=generator("four examples"))
    ids, latents = image_inputs(torch.arange(4), latents)
    return SequenceBatch(ids, latents, SequenceLayout.of_images(4, 6), ("a", "b", "c", "d"))


def make_task(kind: str) -> LMTask | DiTTask:
    if kind == "latent-lm":
        return LMTask(tiny_latent_lm(), LMLossConfig(latent_weight=1.0))
    config = DiTConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=2,
        intermediate_size=128,
        grid=(2, 3),
        latent_channels=8,
        vocab_size=11,
    )
    return DiTTask(DiT(config), LMLossConfig(latent_weight=1.0))


@pytest.mark.parametrize("kind", ["latent-lm", "dit"])
def test_the_counts_are_those_of_the_terms(kind):
    task, batch = make_task(kind), make_batch()
    (turn,) = task.turns(0)
    terms = turn.loss(batch, generator(0))
    assert turn.counts(batch) == {name: term.count for name, term in terms.items()}


@pytest.mark.parametrize("kind", ["latent-lm", "dit"])
def test_bands_part_the_loss(kind):
    terms = make_task(kind).validate(make_batch(), generator(0))
    bands = [term for name, term in terms.items() if name.startswith("latent/")]
    assert len(bands) >= 2
    total = torch.stack([band.total for band in bands]).sum()
    torch.testing.assert_close(total, terms["latent"].total)
    assert sum(band.count for band in bands) == terms["latent"].count


def test_bands_are_by_timestep():
    error, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 249, 250, 999])
    terms = loss_bands(error, t, num_timesteps=1000, channels=1)
    assert {name: float(term.total) for name, term in terms.items()} == {
        "latent/t0-249": 3.0,
        "latent/t250-499": 4.0,
        "latent/t750-999": 8.0,
    }


@pytest.mark.parametrize("kind", ["latent-lm", "dit"])
def test_four_examples_are_learnt_by_heart(kind):
    """Known by their class and history, latents leave far less error than their noise has."""
    task, batch = make_task(kind), make_batch()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    (turn,) = task.turns(0)

    def loss(step: int) -> torch.Tensor:
        term = turn.loss(batch, generator("step", step))["latent"]
        return term.total / term.count

    before = sum(loss(-step).item() for step in range(1, 20)) / 19
    for step in range(250):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = sum(loss(-step).item() for step in range(1, 20)) / 19
    assert after < 0.35 * before
