"""Latent sets whose examples differ in length: written, read, and refused when they lie."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentlm_core import files
from latentlm_core.data.manifest import LatentPlan, read_manifest
from latentlm_core.data.partial import PartialSet, ShardRow
from latentlm_core.data.shard_file import Encoded, Shard, write_shard
from latentlm_core.data.shards import LatentSet
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.tokenizers.base import PosteriorKind
from tests.tiny_latents import around, flip_bit, forge

LENGTHS = ((5, 1, 9), (2, 7, 7), ())
"""Latent positions of the examples of each shard."""
SPEECH = {"needs_text": True}


def plan_of(num_variants=1, kind="gaussian", dtype="float32"):
    return LatentPlan(
        format_version=2,
        data="digits",
        split="train",
        classes=("anna", "bert"),
        tokenizer={"posterior": {"kind": kind, "std": 0.5}},
        tokenizer_sha256="0" * 64,
        grid=None,
        latent_channels=3,
        dtype=dtype,
        variants=("plain", "whispered")[:num_variants],
        num_source=9,
        shard_size=3,
        limits=SPEECH,
    )


def encoded_of(plan, number):
    """Examples of one shard."""
    lengths = LENGTHS[number]
    generator = torch.Generator().manual_seed(number)
    shape = (len(plan.variants), sum(lengths), 3)
    learned = plan.posterior.kind is PosteriorKind.LEARNED
    return Encoded(
        mean=torch.randn(shape, generator=generator),
        log_variance=torch.randn(shape, generator=generator) if learned else None,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        labels=torch.tensor([0, 1, -1][: len(lengths)], dtype=torch.int64),
        captions=("one", None, "three é")[: len(lengths)],
        keys=tuple(f"{number}-{place}" for place in range(len(lengths))),
    )


def make(folder, plan):
    partial = PartialSet(folder, plan)
    partial.begin()
    for number in partial.missing:
        entry = write_shard(folder, plan, number, encoded_of(plan, number))
        partial.add(number, ShardRow(entry=entry, skipped=()))
    return partial.finish()


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "set", plan_of(num_variants=2))
    return tmp_path / "set"


def opened(folder):
    """Without hashes: these sets have no tokenizer, and forged shards have the right ones."""
    return LatentSet.open(folder, verify=False)


@pytest.mark.parametrize("num_variants", [1, 2])
@pytest.mark.parametrize("kind", ["gaussian", "learned"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path, num_variants, kind, dtype):
    plan = plan_of(num_variants, kind, dtype)
    make(tmp_path / "set", plan)
    latents = pickle.loads(pickle.dumps(opened(tmp_path / "set")))
    assert (len(latents), latents.is_ragged, latents.num_variants) == (6, True, num_variants)
    assert latents.lengths.tolist() == [5, 1, 9, 2, 7, 7]
    assert latents.labels.tolist() == [0, 1, -1] * 2
    assert [latents.caption(index) for index in range(6)] == ["one", None, "three é"] * 2
    stored = {"float32": torch.float32, "float16": torch.float16}[dtype]
    for index in (4, 0, 5, 1, 3, 2):
        number, place = divmod(index, 3)
        encoded = encoded_of(plan, number)
        start = sum(LENGTHS[number][:place])
        own = slice(start, start + LENGTHS[number][place])
        for variant in range(num_variants):
            record = latents.read_one(index, variant)
            assert torch.equal(record.mean, encoded.mean[variant, own].to(stored).float())
            if kind == "learned":
                assert torch.equal(
                    record.log_variance, encoded.log_variance[variant, own].to(stored).float()
                )
            else:
                assert record.log_variance is None
            assert record.mean.dtype == torch.float32
            assert (record.label, record.caption, record.key) == (
                (0, 1, -1)[place],
                ("one", None, "three é")[place],
                f"{number}-{place}",
            )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_a_shard_is_a_view_of_its_file(folder):
    manifest = read_manifest(folder)
    path = folder / "shard-00000.safetensors"
    shard = Shard(folder, manifest, manifest.shards[0])
    assert shard.mean.shape == (2, 15, 3)
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    assert any(int(start, 16) <= shard.mean.data_ptr() < int(end, 16) for start, end in spans)


def test_a_record_is_a_copy(folder):
    latents = opened(folder)
    before = latents.read_one(2).mean.clone()
    latents.read_one(2).mean.zero_()
    assert torch.equal(latents.read_one(2).mean, before)


def test_what_needs_a_grid_says_so(folder):
    latents = opened(folder)
    for use in (
        lambda: latents.read([0]),
        lambda: latents.manifest.num_positions,
        lambda: latents.manifest.fixed_grid,
    ):
        with pytest.raises(DataError, match="digits differ in length"):
            use()


def test_bounds_are_checked(folder):
    latents = opened(folder)
    for index, variant in ((6, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            latents.read_one(index, variant)
    with pytest.raises(IndexError):
        latents.caption(6)


@pytest.mark.parametrize("place", [0, 9, 300, -100, -1])
def test_a_flipped_bit_is_found_and_named(folder, place):
    flip_bit(folder / "shard-00001.safetensors", place)
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors"):
        LatentSet.open(folder)


LIES = {
    "late": torch.tensor([1, 2, 9, 16]),
    "short": torch.tensor([0, 2, 9, 15]),
    "long": torch.tensor([0, 2, 9, 17]),
    "empty example": torch.tensor([0, 2, 2, 16]),
    "backwards": torch.tensor([0, 9, 2, 16]),
    "negative": torch.tensor([0, -2, 9, 16]),
    "around": around(3, 16),
    "too few": torch.tensor([0, 2, 16]),
    "too many": torch.tensor([0, 2, 9, 12, 16]),
    "no integers": torch.tensor([0.0, 2.0, 9.0, 16.0]),
    "absent": None,
}


@pytest.mark.parametrize("name", LIES)
def test_offsets_that_lie_are_refused(folder, name):
    assert load_file(folder / "shard-00001.safetensors")["offsets"].tolist() == [0, 2, 9, 16]
    forge(folder, 1, offsets=LIES[name])
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: "):
        opened(folder)


def test_other_offsets_of_the_same_length_are_other_lengths(folder):
    forge(folder, 1, offsets=torch.tensor([0, 3, 9, 16]))
    assert opened(folder).lengths.tolist() == [5, 1, 9, 3, 6, 7]


def test_latents_that_do_not_match_their_count_are_refused(folder):
    forge(folder, 1, mean=torch.zeros(2, 15, 3), offsets=torch.tensor([0, 2, 9, 15]))
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: mean is"):
        opened(folder)


def change_count(number, count):
    """A shard with other numbers of positions in its sums; those of the set follow."""

    def change(data):
        data["statistics"]["count"] += count - data["shards"][number]["sums"]["count"]
        data["shards"][number]["sums"]["count"] = count

    return change


CONTRADICTIONS = {
    "odd": (change_count(1, 31), "sums of shard-00001"),
    "less than one each": (change_count(1, 4), "sums of shard-00001"),
    "of nothing": (change_count(2, 2), "sums of shard-00002"),
    "version": (lambda data: data.update(format_version=1), "format version 2"),
    "grid": (lambda data: data.update(grid=[5]), "format version 2"),
    "old limits": (
        lambda data: data.update(format_version=1, grid=[5]),
        "format version 1 has no limits",
    ),
    "no grid": (lambda data: data.pop("grid"), "grid is missing"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(folder, name):
    change, complaint = CONTRADICTIONS[name]
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(CorruptFileError, match=rf"manifest\.json: .*{complaint}"):
        read_manifest(folder)


@pytest.mark.parametrize("kind", ["gaussian", "learned"])
def test_statistics_are_those_of_everything_stored(tmp_path, kind):
    manifest = make(tmp_path / "set", plan_of(2, kind))
    parts = [load_file(tmp_path / "set" / entry.file) for entry in manifest.shards]
    mean = np.concatenate([part["mean"].double().reshape(-1, 3).numpy() for part in parts])
    noise = np.full(3, (0.5 / 0.8) ** 2)
    if kind == "learned":
        stored = [part["log_variance"].double().reshape(-1, 3).exp().numpy() for part in parts]
        noise = np.concatenate(stored).mean(0)
    assert manifest.statistics.count == len(mean) == 2 * 31
    stats = manifest.stats(manifest.posterior, per_channel=True)
    np.testing.assert_allclose(stats.shift, mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.scale, 1 / np.sqrt(mean.var(0) + noise), rtol=1e-12)


def test_a_latent_that_is_not_finite_is_named(tmp_path):
    plan = plan_of(2)
    encoded = encoded_of(plan, 1)
    encoded.mean[1, 8] = float("inf")
    with pytest.raises(DataError, match="latents of 1-1 are not finite"):
        write_shard(tmp_path, plan, 1, encoded)


def test_a_set_with_a_grid_is_what_it_always_was(tmp_path):
    """Written by hand, as version 1 lays it out."""
    mean = torch.arange(24.0).reshape(1, 8, 3)
    texts = torch.frombuffer(bytearray(b"ab"), dtype=torch.uint8)
    tensors = {
        "mean": mean,
        "offsets": torch.tensor([0, 4, 8]),
        "label": torch.tensor([1, -1]),
        "key": texts,
        "key_offsets": torch.tensor([0, 1, 2]),
        "caption": texts[:1].clone(),
        "caption_offsets": torch.tensor([0, 0, 1]),
    }
    path = tmp_path / "shard-00000.safetensors"
    save_file(tensors, path)
    files.write_bytes(tmp_path / "tokenizer" / "model.safetensors", b"weights")
    values = mean[0].double()
    sums = {
        "count": 8,
        "sum": values.sum(0).tolist(),
        "sum_squares": values.square().sum(0).tolist(),
        "sum_variance": [0.0] * 3,
    }
    entry = {"file": path.name, "first": 0, "count": 2, "sha256": files.sha256_file(path)}
    data = {
        "format": "latentlm-latents",
        "format_version": 1,
        "data": "old",
        "split": "train",
        "classes": ["zero", "one"],
        "tokenizer": {"posterior": {"kind": "gaussian", "std": 0.75}},
        "tokenizer_sha256": files.sha256_file(tmp_path / "tokenizer" / "model.safetensors"),
        "grid": [2, 2],
        "latent_channels": 3,
        "dtype": "float32",
        "variants": ["plain"],
        "num_source": 2,
        "shard_size": 2,
        "batch_size": 64,
        "name": "old",
        "num_examples": 2,
        "shards": [entry | {"num_bytes": path.stat().st_size, "sums": sums}],
        "statistics": sums,
        "skipped": [],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    latents = LatentSet.open(tmp_path)
    assert (latents.is_ragged, latents.lengths.tolist()) == (False, [4, 4])
    assert latents.manifest.to_dict() == data, "a new set with a grid has the same keys"
    records = latents.read([1, 0])
    assert torch.equal(records.mean, mean.reshape(2, 4, 3)[[1, 0]])
    assert (records.labels.tolist(), records.captions) == ([-1, 1], ("a", None))
    record = latents.read_one(1)
    assert torch.equal(record.mean, mean[0, 4:])
    assert (record.label, record.caption, record.key) == (-1, "a", "b")
