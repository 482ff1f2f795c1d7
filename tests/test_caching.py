"""Encoding a data set into a folder of latents: whole, interrupted, broken, refused."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentlm_core import files
from latentlm_core.data import caching
from latentlm_core.data.caching import LatentViews
from latentlm_core.data.manifest import LatentSums
from latentlm_core.data.media import center_crop, to_tensor
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import open_source
from latentlm_core.draws import Draws
from latentlm_core.errors import ArtifactError, BusyError, DataError
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from tests.tiny_latents import Holed, Interrupting, content, flip_bit


def test_a_set_holds_what_the_encoder_says(encode, tmp_path, tokenizers):
    manifest = encode(flip=True)
    tokenizer, _ = tokenizers[PosteriorKind.GAUSSIAN]
    assert manifest.variants == ("plain", "flip")
    assert (manifest.num_examples, manifest.grid, len(manifest.shards)) == (50, (2, 2), 4)
    latents = LatentSet.open(tmp_path / "a" / "set")
    assert (len(latents), latents.num_variants) == (50, 2)
    source, indices = Holed(), [49, 0, 17, 16, 17]
    records = latents.read(indices, [0, 1, 0, 1, 1])
    images = [center_crop(source[index].image, 16) for index in indices]
    media = to_tensor(np.stack(images))
    mirrored = torch.tensor([False, True, False, True, True])
    media[mirrored] = media[mirrored].flip(-1)
    with torch.inference_mode():
        expected = tokenizer.encode(media).mean
    torch.testing.assert_close(records.mean, expected, rtol=1e-5, atol=1e-6)
    assert records.log_variance is None
    assert records.labels.tolist() == [source[index].label for index in indices]
    assert records.keys == tuple(source[index].key for index in indices)
    assert records.captions == tuple(source[index].caption for index in indices)


def test_bytes_do_not_depend_on_workers_or_interruptions(encode, tmp_path, monkeypatch):
    source = Holed(broken=(3, 20, 21))
    encode("alone", source, flip=True)
    undisturbed = content(tmp_path / "alone" / "set")
    assert set(undisturbed) == {
        *(".lock", "manifest.json", "tokenizer/config.json", "tokenizer/model.safetensors"),
        *(f"shard-0000{number}.safetensors" for number in range(4)),
    }
    for workers in (1, 2):
        encode(f"workers-{workers}", source, flip=True, num_workers=workers)
        assert content(tmp_path / f"workers-{workers}" / "set") == undisturbed
    for threads in (1, 5):
        monkeypatch.setattr(caching, "num_readers", lambda threads=threads: threads)
        encode(f"threads-{threads}", source, flip=True)
        assert content(tmp_path / f"threads-{threads}" / "set") == undisturbed
    for moment in (1, 7, 12, 18):
        place = f"interrupted-{moment}"
        with pytest.raises(KeyboardInterrupt):
            encode(place, source, flip=True, progress=Interrupting(moment))
        with pytest.raises(ArtifactError, match="not complete") as caught:
            LatentSet.open(tmp_path / place / "set")
        assert caught.value.hint == "Run tokenize again."
        encode(place, source, flip=True)
        assert content(tmp_path / place / "set") == undisturbed


def test_a_resumed_set_keeps_the_shards_that_are_there(encode, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode(progress=Interrupting(8))
    folder = tmp_path / "a" / "set"
    first = folder / "shard-00000.safetensors"
    before = first.stat().st_mtime_ns
    (folder / "progress" / "shard-00001.json").write_text("{")
    (folder / ".shard-00001.safetensors.77.part").write_bytes(b"of a killed process")
    encode()
    assert first.stat().st_mtime_ns == before
    assert not list(folder.glob(".*.part"))


def test_a_complete_set_is_returned_as_it_is(encode, tmp_path):
    manifest = encode()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "set").rglob("*.*")}
    assert encode(progress=Interrupting(1)) == manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_damaged_complete_set_is_repaired(encode, tmp_path):
    encode()
    folder = tmp_path / "a" / "set"
    sound = content(folder)
    flip_bit(folder / "shard-00002.safetensors", 900)
    (folder / "shard-00003.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer")
    encode()
    assert content(folder) == sound


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"spec": "mnist"}, "data ('holed' there, 'mnist' here)"),
        ({"flip": True}, "variants ('plain',) there"),
        ({"dtype": "float16"}, "dtype"),
        ({"batch_size": 8}, "batch_size (6 there, 8 here)"),
        ({"source": Holed(count=49)}, "num_source (50 there, 49 here)"),
        ({"kind": PosteriorKind.LEARNED}, "tokenizer, tokenizer_sha256"),
    ],
)
@pytest.mark.parametrize("state", ["complete", "interrupted"])
def test_another_set_in_the_folder_is_refused_and_left_alone(
    encode, tmp_path, options, named, state
):
    if state == "complete":
        encode()
    else:
        with pytest.raises(KeyboardInterrupt):
            encode(progress=Interrupting(5))
    before = content(tmp_path / "a" / "set")
    with pytest.raises(DataError, match="made otherwise") as caught:
        encode(**options)
    assert named.replace("(", "") in str(caught.value).replace("(", "")
    assert content(tmp_path / "a" / "set") == before


def test_a_folder_of_other_things_is_left_alone(encode, tmp_path):
    (tmp_path / "a" / "set" / "tokenizer").mkdir(parents=True)
    (tmp_path / "a" / "set" / "tokenizer" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="no latent set"):
        encode()
    assert (tmp_path / "a" / "set" / "tokenizer" / "thesis.txt").read_text() == "mine"


def test_a_folder_that_another_process_writes_is_refused(encode, tmp_path):
    with files.locked(tmp_path / "a" / "set"), pytest.raises(BusyError):
        encode()


@pytest.mark.parametrize("kind", [PosteriorKind.GAUSSIAN, PosteriorKind.LEARNED])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_statistics_are_those_of_everything_stored(encode, tmp_path, kind, dtype):
    manifest = encode(kind=kind, dtype=dtype, flip=True)
    tensors = [load_file(tmp_path / "a" / "set" / entry.file) for entry in manifest.shards]
    mean = np.concatenate([t["mean"].double().reshape(-1, 3).numpy() for t in tensors])
    sums = manifest.statistics
    assert sums.count == len(mean) == 50 * 2 * 4
    np.testing.assert_allclose(sums.sum, mean.sum(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sums.sum_squares, (mean**2).sum(0), rtol=1e-12)
    noise = np.full(3, (0.75 / 0.8) ** 2)
    if kind is PosteriorKind.LEARNED:
        noise = np.concatenate(
            [t["log_variance"].double().reshape(-1, 3).exp().numpy() for t in tensors]
        ).mean(0)
        np.testing.assert_allclose(np.array(sums.sum_variance) / sums.count, noise, rtol=1e-12)
    each = manifest.stats(manifest.posterior, per_channel=True)
    np.testing.assert_allclose(each.shift, mean.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(each.scale, 1 / np.sqrt(mean.var(0) + noise), rtol=1e-12)
    whole = manifest.stats(manifest.posterior)
    np.testing.assert_allclose(whole.shift, [mean.mean()], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(whole.scale, [1 / np.sqrt(mean.var() + noise.mean())], rtol=1e-12)


def test_drawn_and_normalised_latents_have_unit_variance(encode, tmp_path):
    encode(kind=PosteriorKind.LEARNED)
    latents = LatentSet.open(tmp_path / "a" / "set")
    records = latents.read([*range(50)] * 200)
    assert records.log_variance is not None
    drawn = latents.posterior.draw(
        records.mean, records.log_variance, Draws(torch.Generator().manual_seed(0))
    )
    normal = latents.manifest.stats(latents.posterior).normalise(drawn)
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01


def test_latents_that_do_not_vary_have_no_scale(encode):
    manifest = encode()
    still = manifest.model_copy(
        update={
            "statistics": LatentSums(
                count=4, sum=(4.0,) * 3, sum_squares=(4.0,) * 3, sum_variance=(0.0,) * 3
            )
        }
    )
    with pytest.raises(DataError, match="do not vary"):
        still.stats(LatentPosteriorConfig(kind=PosteriorKind.NONE))


def test_broken_images_are_left_out_and_listed(encode, tmp_path):
    source = Holed(broken=(3, 20, *range(32, 40)))
    manifest = encode(source=source)
    assert manifest.num_examples == 40
    assert [entry.count for entry in manifest.shards] == [15, 15, 8, 2]
    assert [item.index for item in manifest.skipped] == [3, 20, *range(32, 40)]
    assert manifest.skipped[0].reason == "3.png is empty."
    records = LatentSet.open(tmp_path / "a" / "set").read(range(40))
    whole = [index for index in range(50) if index not in (3, 20, *range(32, 40))]
    assert records.keys == tuple(source[index].key for index in whole)
    assert records.labels.tolist() == [source[index].label for index in whole]


def test_a_shard_may_be_empty_but_too_many_broken_images_stop(encode, tmp_path):
    manifest = encode(source=Holed(broken=range(6, 12)), shard_size=6, batch_size=4)
    assert [entry.count for entry in manifest.shards][:3] == [6, 0, 6]
    assert len(LatentSet.open(tmp_path / "a" / "set").read(range(44)).keys) == 44
    with pytest.raises(DataError, match=r"11 of the 50.*0\.png is empty"):
        encode("b", Holed(broken=range(11)))


def test_views_are_named_and_crops_follow_the_key():
    assert LatentViews(16).names == ("plain",)
    assert LatentViews(16, crops=2, flip=True).names == (
        *("crop-0", "crop-1"),
        *("crop-0-flip", "crop-1-flip"),
    )
    views = LatentViews(16, crops=2, flip=True)
    example = open_source("embedded:shapes")[5]
    first, second, mirrored, _ = views(example)
    assert not np.array_equal(first, second)
    assert np.array_equal(first[:, ::-1], mirrored)
    assert np.array_equal(first, views(example)[0])


def test_latents_that_overflow_the_dtype_are_refused(encode, tokenizers, monkeypatch):
    tokenizer, _ = tokenizers[PosteriorKind.GAUSSIAN]
    encoder = tokenizer.encoder.forward
    monkeypatch.setattr(tokenizer.encoder, "forward", lambda media: encoder(media) * 1e9)
    with pytest.raises(DataError, match=r"train-000 are not finite as float16"):
        encode(dtype="float16")
