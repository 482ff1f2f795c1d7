import json
import pickle
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latentlm_core import files
from latentlm_core.data.base import Example
from latentlm_core.data.caching import LatentViews, encode_source
from latentlm_core.data.manifest import LatentSums, Manifest, read_manifest
from latentlm_core.data.media import center_crop, to_tensor
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import Subset, open_source
from latentlm_core.errors import (
    ArtifactError,
    BusyError,
    CorruptFileError,
    DataError,
    LatentLMError,
)
from latentlm_core.progress import SilentProgress
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig

NETWORK = ConvConfig(image_size=16, channels=(8, 8), stem_patch_size=4)
LEARNED = LatentPosteriorConfig(kind=PosteriorKind.LEARNED)


class Holed:
    """Shapes with some broken items."""

    def __init__(self, broken=(), count=50):
        self._whole = Subset(open_source("embedded:shapes"), range(count))
        self.name, self.classes, self._broken = "holed", self._whole.classes, set(broken)

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, index) -> Example:
        if index in self._broken:
            raise CorruptFileError(f"{index}.png is empty.")
        return self._whole[index]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tiny tokenizers with their exports, by posterior kind."""
    made = {}
    for kind in (PosteriorKind.GAUSSIAN, PosteriorKind.LEARNED):
        config = SigmaVAEConfig(
            latent_channels=3, posterior=LatentPosteriorConfig(kind=kind), network=NETWORK
        )
        tokenizer = build_tokenizer(config)
        export = tmp_path_factory.mktemp("export")
        files.write_json(export / "config.json", config.to_dict())
        files.write_safetensors(export / "model.safetensors", tokenizer.state_dict())
        made[kind] = tokenizer, export
    return made


@pytest.fixture
def encode(tokenizers, tmp_path):
    def run(place="a", source=None, kind=PosteriorKind.GAUSSIAN, **options):
        tokenizer, export = tokenizers[kind]
        settings_ = {"spec": "holed", "split": "train", "shard_size": 16, "batch_size": 6}
        return encode_source(
            source or Holed(),
            tokenizer,
            tmp_path / place / "set",
            tokenizer_export=export,
            **(settings_ | options),
        )

    return run


class Interrupting(SilentProgress):
    """Presses Ctrl-C at the n-th advance."""

    def __init__(self, at):
        self.left = at

    @contextmanager
    def bar(self, label, total, unit, done=0):
        yield self

    def advance(self, amount=1, **figures):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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


def test_bytes_do_not_depend_on_workers_or_interruptions(encode, tmp_path):
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
        records.mean, records.log_variance, torch.Generator().manual_seed(0)
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


def test_reading_is_picklable_and_bounds_are_checked(encode, tmp_path):
    encode()
    latents = LatentSet.open(tmp_path / "a" / "set")
    copy = pickle.loads(pickle.dumps(latents))
    assert torch.equal(copy.read([7, 30]).mean, latents.read([7, 30]).mean)
    assert latents.read([]).mean.shape == (0, 4, 3)
    for indices, variants in (([50], 0), ([-1], 0), ([0], 1), ([0, 1], [0, -1])):
        with pytest.raises(IndexError):
            latents.read(indices, variants)


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 9, 200, 700, -900, -1])
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "tokenizer/model.safetensors"])
def test_a_flipped_bit_anywhere_is_found_and_named(encode, tmp_path, name, place):
    encode()
    flip_bit(tmp_path / "a" / "set" / name, place)
    with pytest.raises(CorruptFileError, match=name):
        LatentSet.open(tmp_path / "a" / "set")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("size", [0, 7, 400, -1])
def test_a_truncated_or_missing_shard_is_found_and_named(encode, tmp_path, size, verify):
    encode()
    path = tmp_path / "a" / "set" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptFileError, match=path.name):
        LatentSet.open(path.parent, verify)
    path.unlink()
    with pytest.raises(CorruptFileError, match=f"{path.name} is missing"):
        LatentSet.open(path.parent, verify)


def test_absent_and_newer_sets_are_told_apart(encode, tmp_path):
    with pytest.raises(ArtifactError, match="is not there"):
        LatentSet.open(tmp_path / "nowhere")
    encode()
    path = tmp_path / "a" / "set" / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"format_version": 2}))
    with pytest.raises(DataError, match="format version 2"):
        LatentSet.open(path.parent)
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CorruptFileError, match="not the manifest of a latent set"):
        LatentSet.open(path.parent)


def forge(folder, number, **changed):
    """Rewrite a shard with other tensors and a manifest that vouches for it."""
    path = folder / f"shard-{number:05d}.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors |= changed
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    data = json.loads((folder / "manifest.json").read_text())
    data["shards"][number] |= {
        "sha256": files.sha256_file(path),
        "num_bytes": path.stat().st_size,
    }
    (folder / "manifest.json").write_text(json.dumps(data))


FORGERIES = {
    "absent": {"label": None},
    "shape": {"mean": torch.zeros(1, 63, 3)},
    "dtype": {"mean": torch.zeros(1, 64, 3, dtype=torch.bfloat16)},
    "offsets": {"offsets": torch.arange(17) * 5},
    "class": {"label": torch.full((16,), 4)},
    "negative": {"label": torch.full((16,), -2)},
    "beyond": {"key_offsets": torch.arange(17) * 10**9},
    "backwards": {"caption_offsets": torch.arange(16, -1, -1)},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_shard_that_contradicts_its_manifest_is_refused(encode, tmp_path, name):
    encode()
    folder = tmp_path / "a" / "set"
    forge(folder, 1, **FORGERIES[name])
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: "):
        LatentSet.open(folder)


def test_a_key_that_is_no_text_is_refused_when_it_is_read(encode, tmp_path):
    encode()
    folder = tmp_path / "a" / "set"
    size = load_file(folder / "shard-00001.safetensors")["key"].numel()
    forge(folder, 1, key=torch.full((size,), 255, dtype=torch.uint8))
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: key 4 is no UTF-8"):
        LatentSet.open(folder).read([20])


def test_a_manifest_cannot_point_outside_its_folder(encode, tmp_path):
    encode()
    path = tmp_path / "a" / "set" / "manifest.json"
    data = json.loads(path.read_text())
    data["shards"][0]["file"] = "../../secret.safetensors"
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFileError, match="shard 0 is not shard-00000"):
        LatentSet.open(path.parent)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "..", "../x", "f" * 64]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def paths_of(value, prefix=()):
    """Every place inside a JSON value."""
    yield prefix
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield from paths_of(value[key], (*prefix, key))


def complaint(action):
    """The sentence that ``action`` ends with, or None."""
    try:
        action()
    except LatentLMError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def made(tokenizers, tmp_path_factory):
    tokenizer, export = tokenizers[PosteriorKind.GAUSSIAN]
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    options = {"spec": "holed", "split": "train", "shard_size": 16, "tokenizer_export": export}
    encode_source(Holed(broken=[2]), tokenizer, folder, **options)
    return folder, json.loads((folder / "manifest.json").read_text())


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_manifest_gets_anything_but_a_sentence(made, data):
    folder, original = made
    changed = json.loads(json.dumps(original))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([*paths_of(changed)][1:]))
        node = changed
        for key in path[:-1]:
            node = node[key]
        if data.draw(st.booleans()):
            node[path[-1]] = data.draw(VALUES)
        else:
            del node[path[-1]]
    (folder / "manifest.json").write_text(json.dumps(changed))

    def use_everything():
        latents = LatentSet.open(folder, verify=False)
        latents.manifest.stats(latents.posterior)
        assert len(latents.read(range(len(latents))).keys) == original["num_examples"]

    assert "\n" not in (complaint(use_everything) or "")


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 20_000), value=st.integers(0, 255), cut=st.booleans())
def test_no_manifest_bytes_get_anything_but_a_sentence(made, place, value, cut):
    folder, original = made
    content_ = bytearray(json.dumps(original, indent=2).encode())
    place %= len(content_)
    content_[place] = value
    (folder / "manifest.json").write_bytes(content_[:place] if cut else content_)
    said = complaint(lambda: read_manifest(folder))
    assert said is None or "manifest.json" in said


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 700), value=st.integers(0, 255))
def test_no_shard_header_gets_anything_but_a_sentence(made, place, value):
    folder, original = made
    (folder / "manifest.json").write_text(json.dumps(original))
    path = folder / "shard-00001.safetensors"
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[place] = value
    path.write_bytes(damaged)
    said = complaint(lambda: LatentSet.open(folder, verify=False))
    path.write_bytes(sound)
    assert said is None or path.name in said


@pytest.mark.parametrize("rule", [None, 3, {"kind": "odd"}, {"std": 1e308}, {"std": -1.0}])
def test_a_posterior_that_is_none_is_refused_by_the_manifest(encode, tmp_path, rule):
    encode()
    path = tmp_path / "a" / "set" / "manifest.json"
    data = json.loads(path.read_text())
    data["tokenizer"]["posterior"] = rule
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFileError, match=r"manifest\.json: the posterior"):
        LatentSet.open(path.parent)


def test_a_manifest_survives_its_own_json(encode):
    manifest = encode(source=Holed(broken=[1]))
    assert Manifest.model_validate_json(json.dumps(manifest.to_dict())) == manifest
