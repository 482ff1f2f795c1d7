"""Latent sets at URLs: fetched as they are read, kept within a bound, shared, checked."""

import json
import multiprocessing
import pickle
import shutil
import threading
import time
from itertools import count, islice

import fsspec
import pytest
import torch

from latentlm_core import workflows
from latentlm_core.data import remote, remote_latents, shards
from latentlm_core.data.packing import LatentDataConfig, LatentStream
from latentlm_core.data.remote_latents import fetch_latents
from latentlm_core.data.shards import LatentSet
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptFileError,
    DataError,
    MissingExtraError,
)
from latentlm_core.progress import SILENT
from latentlm_core.workflows.training_data import TrainingData
from tests.tiny_latents import flip_bit
from tests.tiny_streams import upload


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def local(encode, tmp_path):
    """A set of 50 examples in 13 shards, on this disk."""
    encode(shard_size=4, batch_size=4)
    return tmp_path / "a" / "set"


@pytest.fixture
def url(local, tmp_path):
    """The same set at a URL."""
    place = f"memory://{tmp_path.name}/set"
    upload(local, place)
    return place


def files_of(url):
    return fsspec.url_to_fs(url)[0]


def batches(latents, number, start=0, seed=3):
    made = LatentStream(latents, LatentDataConfig(batch_size=6), seed)
    return list(islice(made.batches(count(start)), number))


def same(left, right):
    return torch.equal(left.latents, right.latents) and left.keys == right.keys


def shard_files(cache):
    return sorted(path.name for path in cache.glob("latents/*/shard-*.safetensors"))


def fetched(monkeypatch, delay=0.0):
    """Names of the shards that are fetched, as they are."""
    names, fetch = [], remote.fetch

    def watched(url, path, sha256):
        names.append(path.name)
        time.sleep(delay)
        fetch(url, path, sha256)

    monkeypatch.setattr(remote, "fetch", watched)
    return names


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_batches_are_those_of_a_local_copy(local, url, kind):
    place = url if kind == "memory" else f"file://{local}"
    data = TrainingData.open(place, True, SILENT)
    assert data.name == "set"
    wanted = batches(LatentSet.open(local), 12)
    assert all(map(same, batches(data.single, 12), wanted))
    assert all(map(same, batches(pickle.loads(pickle.dumps(data.single)), 2, 7), wanted[7:9]))


def test_shards_are_fetched_when_they_are_read_and_once(url, cache, monkeypatch):
    names = fetched(monkeypatch)
    monkeypatch.setattr(remote_latents, "NUM_AHEAD", 2)
    folder = fetch_latents(url)
    assert names == ["model.safetensors"]
    latents = LatentSet.open(folder)
    assert shard_files(cache) == []
    latents.read([0])
    wait_for(lambda: len(shard_files(cache)) == 3)
    assert sorted(names[1:]) == [f"shard-{k:05d}.safetensors" for k in range(3)]
    LatentSet.open(fetch_latents(url)).read(range(50))
    assert len(names) == 14
    LatentSet.open(fetch_latents(url)).read(range(50))
    assert len(names) == 14


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_training_does_not_wait_for_the_next_shard(url, monkeypatch):
    """Each shard takes 50 ms to come and 50 ms to use; the second time is not waited for."""
    fetched(monkeypatch, delay=0.05)
    monkeypatch.setattr(remote_latents, "NUM_AHEAD", 2)
    latents = LatentSet.open(fetch_latents(url))
    latents.read([0])
    waits = []
    for index in range(4, 50, 4):
        time.sleep(0.05)
        begin = time.perf_counter()
        latents.read([index])
        waits.append(time.perf_counter() - begin)
    assert sum(waits) < 0.5 * 0.05 * len(waits)


def test_a_damaged_copy_is_fetched_again(url, cache):
    expected = LatentSet.open(fetch_latents(url)).read(range(50)).mean
    paths = sorted(cache.glob("latents/*/shard-*"))
    flip_bit(paths[3], -5)
    paths[4].write_bytes(paths[4].read_bytes()[:100])
    paths[5].unlink()
    assert torch.equal(LatentSet.open(fetch_latents(url)).read(range(50)).mean, expected)


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "tokenizer/model.safetensors"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_what_comes_damaged_is_named_and_not_kept(url, cache, name, fault):
    store, path = fsspec.url_to_fs(f"{url}/{name}")
    whole = store.cat_file(path)
    if fault == "missing":
        store.rm_file(path)
    else:
        store.pipe_file(path, whole[:300] if fault == "truncated" else whole[:-1] + b"\x07")
    error = ArtifactError if fault == "missing" else CorruptFileError
    with pytest.raises(error, match=f"{name} is (damaged, or came in part|not there)"):
        LatentSet.open(fetch_latents(url)).read(range(50))
    assert name.rsplit("/", 1)[-1] not in [path.name for path in cache.rglob("*.safetensors")]
    store.pipe_file(path, whole)
    assert len(LatentSet.open(fetch_latents(url)).read(range(50)).keys) == 50


def test_a_set_that_changed_at_its_url_is_refused(url, encode, tmp_path):
    fetch_latents(url)
    encode("b", shard_size=4, batch_size=4, flip=True)
    upload(tmp_path / "b" / "set", url)
    with pytest.raises(DataError, match="was changed since its shards were fetched") as caught:
        fetch_latents(url)
    shutil.rmtree(caught.value.hint.split()[1])
    assert LatentSet.open(fetch_latents(url)).num_variants == 2


def test_what_is_no_latent_set_is_refused_in_a_sentence(url, cache):
    with pytest.raises(ArtifactError, match="is no latent set, or is not complete"):
        fetch_latents(url + "/tokenizer")
    store, path = fsspec.url_to_fs(f"{url}/manifest.json")
    whole = store.cat_file(path)
    for content in (b"{", json.dumps({"format": "x"}).encode()):
        store.pipe_file(path, content)
        with pytest.raises(CorruptFileError, match=f"^{url}/manifest.json is not"):
            fetch_latents(url)
    store.pipe_file(path, whole)
    assert not list(cache.glob("latents/set*"))
    with pytest.raises(ArtifactError, match="is a URL, and doctor examines"):
        workflows.doctor(target=url)


def test_a_cache_that_cannot_be_written_is_told_in_a_sentence(url, cache, monkeypatch):
    cache.write_text("a file")
    with pytest.raises(ArtifactError, match="lock cannot be written"):
        fetch_latents(url)


def test_an_absent_package_is_named_with_its_command(monkeypatch):
    def absent(url):
        raise ImportError("Install s3fs to access S3") from ModuleNotFoundError(name="s3fs")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(MissingExtraError, match="needs the package s3fs") as caught:
        fetch_latents("s3://bucket/set")
    assert caught.value.hint == "Install it: pip install s3fs"


def test_the_cache_holds_what_it_may_and_forgets_what_was_used_longest_ago(url, cache, monkeypatch):
    size = sum(entry.num_bytes for entry in LatentSet.open(fetch_latents(url)).manifest.shards)
    monkeypatch.setenv("LATENTLM_CACHE_GB", str(size / 2 / 1e9))
    with pytest.raises(ConfigError, match=r"LATENTLM_CACHE_GB") as caught:
        LatentSet.open(fetch_latents(url))
    assert caught.value.hint.endswith(f"--data stream:{url}")
    data = TrainingData.open(f"stream:{url}", True, SILENT)
    for index in range(0, 50, 4):
        data.single.read([index])
        held = sum(path.stat().st_size for path in cache.glob("latents/*/shard-*"))
        assert held <= size / 2
    assert shard_files(cache)[-1] == "shard-00012.safetensors"
    assert "shard-00000.safetensors" not in shard_files(cache)
    for given in ("0", "-1", "many", "inf"):
        monkeypatch.setenv("LATENTLM_CACHE_GB", given)
        with pytest.raises(ConfigError, match=f"LATENTLM_CACHE_GB is '{given}'"):
            remote.cache_bytes()


@pytest.mark.parametrize("place", ["url", "folder"])
def test_shard_by_shard_is_an_order_of_its_own_and_resumes(local, url, cache, monkeypatch, place):
    source = f"stream:{url}" if place == "url" else f"stream:{local}"
    monkeypatch.setattr(shards, "WINDOW_BYTES", 5000)  # two shards
    names = fetched(monkeypatch)
    whole = batches(TrainingData.open(source, True, SILENT).single, 30)
    again = TrainingData.open(source, True, SILENT).single
    assert all(map(same, batches(again, 4, 17), whole[17:21]))
    keys = [key for batch in whole for key in batch.keys]
    assert len(set(keys[:49])) == len(set(keys[49:98])) == 49, "one example is held out"
    assert keys[:49] != keys[49:98]
    assert names.count("shard-00005.safetensors") == (place == "url")
    local_batches = batches(LatentSet.open(local), 1)
    assert not same(local_batches[0], whole[0])


def test_a_run_says_whether_it_reads_shard_by_shard(url, local, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path / "home"))
    few = ["trainer.total_steps=2", "data.batch_size=8", "trainer.save_every=1"]

    def train(data):
        return workflows.train_lm(
            data=data, recipe="tiny", overrides=few, out=tmp_path / "run", device="cpu"
        )

    train(url)
    train(str(local))  # the same batches
    with pytest.raises(ArtifactError, match="was started with another configuration"):
        train(f"stream:{url}")


def test_threads_and_processes_share_the_cache(local, cache, monkeypatch):
    place = f"file://{local}"
    expected = LatentSet.open(local).read(range(50)).mean.sum()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        theirs = pool.apply_async(_read_all, (place,))
        assert _read_all(place) == theirs.get(timeout=120) == float(expected)
    names = fetched(monkeypatch, delay=0.01)
    for path in cache.glob("latents/*/shard-*"):
        path.unlink()
    folder = fetch_latents(place)
    readers = [
        threading.Thread(target=lambda: LatentSet.open(folder).read(range(50))) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted(names) == [f"shard-{k:05d}.safetensors" for k in range(13)]


def _read_all(place):
    return float(LatentSet.open(fetch_latents(place)).read(range(50)).mean.sum())
