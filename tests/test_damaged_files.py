"""A flipped bit or a cut at every region of every kind of file of ours.

What is damaged is refused by the name of the file, or reads as it did before: a blank between two
values of JSON, say, is no part of them. Where it is found:

    latent set      at open: manifest.json by its checksum, all else by its SHA-256
    set in making   plan.json by its checksum; a shard or its row that is damaged is made again
    export          config.json by its checksum, weights and text tokenizer by their SHA-256
    checkpoint      each file by its SHA-256, state.json by its own
    samples         settings.json by comparison with what is asked for
    metrics.jsonl   by its form; a digit that changed is not noticed, and nothing is computed of it
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core.artifacts import load_generator, load_tokenizer
from latentlm_core.data.caching import encode_source
from latentlm_core.data.manifest import read_manifest
from latentlm_core.data.shards import LatentSet
from latentlm_core.errors import DataError, LatentLMError
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.runlog import read_metrics
from latentlm_core.workflows.claimed_folder import ClaimedFolder
from tests.hostile_folders import lay_out, make_exports, make_run
from tests.tiny_latents import Holed, Interrupting, content, export_tokenizer

CPU = torch.device("cpu")
HEAD, TAIL = 64, 16
"""Bytes at the ends of a long file that are all damaged."""


def damages(sound: bytes, count: int) -> Iterator[bytes]:
    """``sound`` with a flipped bit at its ends and all over it, and cut at as many places."""
    size = len(sound)
    spread = range(0, size, max(size // count, 1))
    for place in sorted({*range(min(HEAD, size)), *spread, *range(max(size - TAIL, 0), size)}):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << (place * 5 % 8)
        yield bytes(flipped)
    for place in (*range(0, size, max(8 * size // count, 1)), size - 1):
        yield sound[:place]


def outcome(read: Callable[[], Any]) -> tuple[str | None, Any]:
    """The sentence that reading ends with, or what was read."""
    try:
        return None, read()
    except LatentLMError as error:
        return str(error), None


def damage_all(folder: Path, name: str, read: Callable[[], Any], count: int) -> tuple[int, int]:
    """Damage a file in every way, and put it back.

    Args:
        folder: what must be as it was but for the file.
        name: of the file in it.
        read: uses the file; what it returns says what was read.
        count: places that are damaged all over the file.

    Returns:
        how many damages were refused, and how many changed nothing of what is read.
    """
    path = folder / name
    sound, before, expected = path.read_bytes(), content(folder), read()
    refused = harmless = 0
    for damaged in damages(sound, count):
        path.write_bytes(damaged)
        sentence, found = outcome(read)
        refused, harmless = refused + (sentence is not None), harmless + (sentence is None)
        assert path.name in sentence if sentence else found == expected
    path.write_bytes(sound)
    assert content(folder) == before
    return refused, harmless


# --- latent sets -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return export_tokenizer(PosteriorKind.LEARNED, tmp_path_factory.mktemp("tokenizer"))


def encode(folder: Path, tokenizer: Any, **options: Any) -> Any:
    model, export = tokenizer
    return encode_source(
        Holed(broken=[2], count=20),
        model,
        folder,
        spec="holed",
        split="train",
        shard_size=8,
        batch_size=4,
        tokenizer_export=export,
        **options,
    )


@pytest.fixture(scope="module")
def latents(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    encode(folder, tokenizer)
    return folder


def test_a_manifest(latents):
    size = (latents / "manifest.json").stat().st_size
    refused, harmless = damage_all(latents, "manifest.json", lambda: read_manifest(latents), size)
    assert refused > 10 * harmless


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "tokenizer/model.safetensors"])
def test_a_shard_and_the_tokenizer_of_a_set(latents, name):
    refused, harmless = damage_all(latents, name, lambda: LatentSet.open(latents).manifest, 200)
    assert (refused > 200, harmless) == (True, 0)


def test_a_shard_that_is_opened_unverified_keeps_its_form(latents):
    """Without hashes a latent may be another one; everything else is refused or as it was."""

    def read() -> list[Any]:
        opened = LatentSet.open(latents, verify=False)
        return [(opened.read_one(index).label, opened.caption(index)) for index in range(5)]

    path = latents / "shard-00000.safetensors"
    sound = path.read_bytes()
    for damaged in damages(sound, 200):
        path.write_bytes(damaged)
        sentence, _ = outcome(read)
        assert sentence is None or path.name in sentence
    path.write_bytes(sound)


@pytest.fixture
def partial(tokenizer, tmp_path):
    """A set that was interrupted when two of its three shards were there."""
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        encode(folder, tokenizer, progress=Interrupting(5))
    assert (folder / "progress" / "shard-00001.json").is_file()
    return folder


def test_the_plan_of_a_set_in_the_making(partial, tokenizer, tmp_path):
    before = content(partial)

    def go_on() -> bool:
        copy = shutil.copytree(partial, tmp_path / "copy")
        try:
            return bool(encode(copy, tokenizer))
        finally:
            shutil.rmtree(copy)

    refused, harmless = damage_all(partial, "progress/plan.json", go_on, 40)
    assert refused > 5 * harmless
    assert content(partial) == before


@pytest.mark.parametrize("name", ["progress/shard-00000.json", "shard-00001.safetensors"])
def test_a_damaged_shard_or_row_is_made_again(partial, latents, tokenizer, tmp_path, name):
    sound, whole = (partial / name).read_bytes(), content(latents)
    for damaged in [*damages(sound, 20)][::5]:
        copy = shutil.copytree(partial, tmp_path / "set2" / "set")
        (copy / name).write_bytes(damaged)
        encode(copy, tokenizer)
        assert content(copy) == whole
        shutil.rmtree(copy)


# --- exports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return make_exports(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", ["config.json", "text.json", "model.safetensors"])
def test_an_export(exports, tmp_path, name):
    lay_out(tmp_path / "export", exports["pages"])

    def read() -> tuple[Any, str]:
        loaded = load_generator(tmp_path / "export", CPU)
        return loaded.config, loaded.sha256

    count = len(exports["pages"][name]) if name == "text.json" else 150
    refused, harmless = damage_all(tmp_path / "export", name, read, count)
    assert refused > 10 * harmless


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_export_of_a_tokenizer(exports, tmp_path, name):
    lay_out(tmp_path / "export", exports["images"])

    def read() -> tuple[Any, str]:
        loaded = load_tokenizer(tmp_path / "export", CPU)
        return loaded.config, loaded.sha256

    refused, harmless = damage_all(tmp_path / "export", name, read, 150)
    assert refused > 10 * harmless


# --- runs and samples ------------------------------------------------------------------------

STEP = "checkpoints/step-00000004"


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "figures.safetensors"])
def test_a_checkpoint(tmp_path, name):
    lay_out(tmp_path / "run", make_run(tmp_path / "run"))

    def read() -> tuple[Any, list[float]]:
        with CheckpointStore(tmp_path / "run" / "checkpoints", keep=2) as store:
            found = store.latest()
        assert found is not None
        return found.state, found.read("model")["a"].tolist()

    refused, harmless = damage_all(tmp_path / "run", f"{STEP}/{name}", read, 1000)
    assert refused > 3 * harmless


def test_a_log_is_refused_or_has_the_rows_that_it_had(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    sound, refused = path.read_bytes(), 0
    for damaged in damages(sound, len(sound)):
        path.write_bytes(damaged)
        sentence, rows = outcome(lambda: read_metrics(path))
        refused += sentence is not None
        assert "metrics.jsonl" in sentence if sentence else len(rows) <= 3
    assert refused > len(sound) / 3


def test_the_settings_of_samples(tmp_path):
    settings = {"model_sha256": "0" * 64, "classes": ["a"], "seed": 1}
    ClaimedFolder(tmp_path, settings).claim()

    def read() -> None:
        path = tmp_path / "settings.json"
        damaged = path.read_bytes()
        ClaimedFolder(tmp_path, settings).claim()
        path.write_bytes(damaged)

    refused, harmless = damage_all(tmp_path, "settings.json", read, 1000)
    assert refused > 3 * harmless


def test_a_set_in_the_place_of_another_is_refused(latents, tokenizer, tmp_path):
    """A manifest that is sound, of another folder's shards."""
    other = shutil.copytree(latents, tmp_path / "set")
    manifest = json.loads((other / "manifest.json").read_text())
    assert manifest["checksum"]
    (other / "shard-00000.safetensors").write_bytes(
        (latents / "shard-00001.safetensors").read_bytes()
    )
    with pytest.raises(DataError, match=r"shard-00000\.safetensors"):
        LatentSet.open(other)
