"""Reading a folder of latents, and refusing one that is damaged or forged."""

import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from latentlm_core.data.caching import encode_source
from latentlm_core.data.manifest import Manifest, read_manifest
from latentlm_core.data.shards import LatentSet
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError, LatentLMError
from latentlm_core.tokenizers.base import PosteriorKind
from tests.tiny_latents import (
    SPEECH_NETWORK,
    Holed,
    Recordings,
    around,
    encode_recordings,
    export_tokenizer,
    flip_bit,
    forge,
)


def test_reading_is_picklable_and_bounds_are_checked(encode, tmp_path):
    encode()
    latents = LatentSet.open(tmp_path / "a" / "set")
    copy = pickle.loads(pickle.dumps(latents))
    assert torch.equal(copy.read([7, 30]).mean, latents.read([7, 30]).mean)
    assert latents.read([]).mean.shape == (0, 4, 3)
    for indices, variants in (([50], 0), ([-1], 0), ([0], 1), ([0, 1], [0, -1])):
        with pytest.raises(IndexError):
            latents.read(indices, variants)


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
    path.write_text(json.dumps(data | {"format_version": 3}))
    with pytest.raises(DataError, match="format version 3"):
        LatentSet.open(path.parent)
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CorruptFileError, match="not the manifest of a latent set"):
        LatentSet.open(path.parent)


FORGERIES = {
    "absent": {"label": None},
    "shape": {"mean": torch.zeros(1, 63, 3)},
    "dtype": {"mean": torch.zeros(1, 64, 3, dtype=torch.bfloat16)},
    "offsets": {"offsets": torch.arange(17) * 5},
    "class": {"label": torch.full((16,), 4)},
    "negative": {"label": torch.full((16,), -2)},
    "beyond": {"key_offsets": torch.arange(17) * 10**9},
    "backwards": {"caption_offsets": torch.arange(16, -1, -1)},
    "around": {"key_offsets": around(16, 144)},
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


@pytest.fixture(scope="module", params=["fixed", "ragged"])
def made(request, tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    if request.param == "fixed":
        tokenizer, export = tokenizers[PosteriorKind.GAUSSIAN]
        options = {"spec": "holed", "split": "train", "shard_size": 16, "tokenizer_export": export}
        encode_source(Holed(broken=[2]), tokenizer, folder, **options)
    else:
        speech = export_tokenizer(PosteriorKind.GAUSSIAN, folder.parent / "export", SPEECH_NETWORK)
        encode_recordings(folder, *speech, Recordings(broken=[2]))
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
        assert len(latents) == original["num_examples"]
        for index in range(len(latents)):
            assert len(latents.read_one(index).mean) == latents.lengths[index]
        if not latents.is_ragged:
            assert len(latents.read(range(len(latents))).keys) == len(latents)

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
