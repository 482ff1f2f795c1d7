"""Batches of sequences out of latent sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latentlm_core.artifacts import save_tokenizer
from latentlm_core.data.caching import encode_source
from latentlm_core.data.packing import LatentDataConfig, LatentStream
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import open_source
from latentlm_core.errors import DataError
from latentlm_core.export_config import TokenizerExport
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig

CONFIG = LatentDataConfig(batch_size=20, held_out=0.1)


def make_latents(folder, flip: bool = False, posterior: str = "gaussian") -> LatentSet:
    """All of embedded:shapes through an untrained sigma-VAE: 16 latents of 4 channels each."""
    config = SigmaVAEConfig(
        latent_channels=4,
        posterior=LatentPosteriorConfig(kind=PosteriorKind(posterior), std=0.75),
        network=ConvConfig(image_size=32, channels=(8, 8), stem_patch_size=4),
    )
    vae = build_tokenizer(config)
    save_tokenizer(folder / "vae", vae, TokenizerExport(tokenizer=config))
    encode_source(
        open_source("embedded:shapes"),
        vae,
        folder / "latents",
        spec="embedded:shapes",
        split="train",
        tokenizer_export=folder / "vae",
        flip=flip,
    )
    return LatentSet.open(folder / "latents")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> LatentSet:
    return make_latents(tmp_path_factory.mktemp("packing"), flip=True)


def test_a_batch_depends_on_seed_and_number_alone(latents):
    stream = LatentStream(latents, CONFIG, seed=3)
    from_start, later = (
        stream.batches(range(99)),
        LatentStream(latents, CONFIG, seed=3).batches(range(30, 99)),
    )
    wanted = [next(from_start) for _ in range(32)][30:]
    for batch in wanted:
        again = next(later)
        assert again.keys == batch.keys
        assert torch.equal(again.latents, batch.latents)
        assert torch.equal(again.ids, batch.ids)
    other = next(LatentStream(latents, CONFIG, seed=4).batches([30]))
    assert other.keys != wanted[0].keys
    from_start.close()
    later.close()


def test_every_epoch_reads_each_training_example_once_and_no_held_out_one(latents):
    stream = LatentStream(latents, CONFIG, seed=0)
    held_out = [key for batch in stream.held_out() for key in batch.keys]
    num_train = len(latents) - len(held_out)
    assert len(held_out) == int(len(latents) * 0.1)
    keys = [key for number in range(num_train // 20 + 1) for key in stream.batch(number).keys]
    assert len(set(keys[:num_train])) == num_train
    assert not set(keys) & set(held_out)


def test_sigma_is_drawn_anew_at_each_read_with_the_mean_scale_asked_for(tmp_path):
    """z - mean has one scale an example, a new one each time; E|sigma| is the configured std."""
    latents = make_latents(tmp_path)
    stream = LatentStream(latents, LatentDataConfig(batch_size=200, held_out=0.0), seed=0)
    scales = []
    for number in range(20):
        batch = stream.batch(number)
        mean = latents.read(latents_indices(latents, batch.keys)).mean
        noise = stream.stats.denormalise(batch.latents[:, 1:]) - mean
        scales.append(noise.flatten(1).square().mean(dim=1).sqrt())
    sigma = torch.cat(scales)
    assert sigma.unique().numel() == sigma.numel()
    assert sigma.mean().item() == pytest.approx(0.75, rel=0.03)
    assert sigma.square().mean().sqrt().item() == pytest.approx(0.75 / 0.8, rel=0.03)


def latents_indices(latents: LatentSet, keys: tuple[str, ...]) -> list[int]:
    place = {key: index for index, key in enumerate(latents.read(range(len(latents)), 0).keys)}
    return [place[key] for key in keys]


def test_drawn_latents_have_zero_mean_and_unit_variance(latents):
    stream = LatentStream(latents, LatentDataConfig(batch_size=200, held_out=0.0), seed=0)
    values = torch.cat([stream.batch(number).latents[:, 1:] for number in range(40)])
    assert values.mean().item() == pytest.approx(0.0, abs=0.02)
    assert values.std().item() == pytest.approx(1.0, abs=0.05)


def test_labels_are_dropped_at_the_rate_asked_for_but_not_when_held_out(latents):
    stream = LatentStream(latents, CONFIG.model_copy(update={"label_drop": 0.3}), seed=0)
    ids = torch.cat([stream.batch(number).ids[:, 0] for number in range(100)])
    assert (ids == stream.null_id).float().mean().item() == pytest.approx(0.3, abs=0.03)
    held_out = torch.cat([batch.ids[:, 0] for batch in stream.held_out()])
    assert (held_out < stream.null_id).all()


def test_stored_flips_are_read_about_half_of_the_time(latents):
    stream = LatentStream(latents, CONFIG.model_copy(update={"held_out": 0.0}), seed=0)
    plain = latents.read(range(len(latents)), 0)
    flipped = latents.read(range(len(latents)), 1)
    assert not np.allclose(plain.mean, flipped.mean)
    nearer = []
    for number in range(10):
        batch = stream.batch(number)
        indices = latents_indices(latents, batch.keys)
        raw = stream.stats.denormalise(batch.latents[:, 1:])
        to_plain = (raw - plain.mean[indices]).square().sum((1, 2))
        to_flipped = (raw - flipped.mean[indices]).square().sum((1, 2))
        nearer.append(to_flipped < to_plain)
    assert torch.cat(nearer).float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_a_learned_posterior_is_drawn_with_its_own_variance(tmp_path):
    latents = make_latents(tmp_path, posterior="learned")
    stream = LatentStream(latents, LatentDataConfig(batch_size=100, held_out=0.0), seed=0)
    assert latents.read([0]).log_variance is not None
    values = torch.cat([stream.batch(number).latents[:, 1:] for number in range(10)])
    assert values.std().item() == pytest.approx(1.0, abs=0.05)


def test_nothing_held_out_is_no_batch(latents):
    """torch.split of nothing is one empty piece, which once became an empty batch."""
    stream = LatentStream(latents, CONFIG.model_copy(update={"held_out": 0.0}), seed=0)
    assert list(stream.held_out()) == []


def test_an_example_without_a_label_trains_the_null_class(latents, monkeypatch):
    read = LatentSet.read

    def unlabelled(self, *arguments):
        records = read(self, *arguments)
        return replace(records, labels=torch.full_like(records.labels, -1))

    monkeypatch.setattr(LatentSet, "read", unlabelled)
    batch = LatentStream(latents, CONFIG, seed=0).batch(0)
    assert (batch.ids[:, 0] == 4).all()


def test_a_set_smaller_than_a_batch_is_refused_in_a_sentence(latents):
    with pytest.raises(DataError, match="fewer than one batch of 5000"):
        LatentStream(latents, LatentDataConfig(batch_size=5000), seed=0)
