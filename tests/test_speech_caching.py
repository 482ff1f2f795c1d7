"""Encoding recordings into a folder of latents: whole, interrupted, broken, refused."""

import math
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentlm_core.data import speech_caching
from latentlm_core.data.audio import ClipLimits, prepare
from latentlm_core.data.shards import LatentSet
from latentlm_core.errors import ArtifactError, DataError
from latentlm_core.progress import SilentProgress
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.spectral import SpectralConfig
from tests.tiny_latents import (
    SPEECH_NETWORK,
    Interrupting,
    Recordings,
    content,
    encode_recordings,
    export_tokenizer,
)

HOP = SPEECH_NETWORK.hop_length


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A tiny tokenizer and its export."""
    export = tmp_path_factory.mktemp("speech")
    return export_tokenizer(PosteriorKind.GAUSSIAN, export, SPEECH_NETWORK)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(speech_caching, "WINDOW_CLIPS", 5)


def alone(tokenizer, clip, hop_length=HOP):
    """Latents (T, C) of a clip that is encoded without company."""
    samples = prepare(clip, tokenizer.speech.sample_rate)
    size = math.ceil(len(samples) / hop_length) * hop_length
    media = torch.zeros(1, 1, size)
    media[0, 0, : len(samples)] = torch.from_numpy(samples)
    with torch.inference_mode():
        return tokenizer.encode(media).mean[0]


@pytest.mark.parametrize(
    "network", [SPEECH_NETWORK, SpectralConfig(sample_rate=8000)], ids=["causal-conv", "spectral"]
)
def test_each_clip_has_the_latents_that_it_has_alone(tmp_path, network):
    tokenizer, export = export_tokenizer(PosteriorKind.GAUSSIAN, tmp_path / "export", network)
    source = Recordings(count=12)
    manifest = encode_recordings(tmp_path / "set", tokenizer, export, source)
    latents = LatentSet.open(tmp_path / "set")
    assert (manifest.grid, manifest.classes, latents.is_ragged) == (None, ("anna", "bert"), True)
    assert len(set(latents.lengths.tolist())) > 3
    for index in range(len(source)):
        clip, record = source[index], latents.read_one(index)
        expected = alone(tokenizer, clip, network.hop_length)
        assert latents.lengths[index] == len(expected)
        torch.testing.assert_close(record.mean, expected, rtol=1e-4, atol=1e-5)
        assert record.label == (-1 if clip.speaker is None else clip.speaker)
        assert (record.caption, record.key) == (clip.text, clip.key)


def test_latents_do_not_depend_on_the_batch(speech, tmp_path):
    sets = []
    for seconds in (1, 60):
        encode_recordings(tmp_path / str(seconds), *speech, max_batch_seconds=seconds)
        sets.append(LatentSet.open(tmp_path / str(seconds)))
    for index in range(30):
        one, other = (latents.read_one(index).mean for latents in sets)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batches_are_bounded_and_of_about_one_length(speech, tmp_path, monkeypatch):
    tokenizer, export = speech
    shapes = []

    def encode(media):
        shapes.append(tuple(media.shape))
        return type(tokenizer).encode(tokenizer, media)

    monkeypatch.setattr(speech_caching, "WINDOW_CLIPS", 30)
    monkeypatch.setattr(tokenizer, "encode", encode)
    encode_recordings(tmp_path / "set", tokenizer, export, shard_size=30)
    sizes = [rows * samples for rows, _, samples in shapes]
    lengths = [samples for *_, samples in shapes]
    assert sum(rows for rows, *_ in shapes) == 30
    assert max(rows for rows, *_ in shapes) > 3
    assert max(sizes) <= 8000
    assert lengths == sorted(lengths, reverse=True)
    assert sum(sizes) < 1.15 * HOP * int(LatentSet.open(tmp_path / "set").lengths.sum())


def test_a_clip_longer_than_a_batch_is_encoded_on_its_own(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(Recordings, "__getitem__", longer(Recordings.__getitem__))
    encode_recordings(tmp_path / "set", *speech, Recordings(count=3))
    assert (LatentSet.open(tmp_path / "set").lengths > 8000 / HOP).all()


def longer(read):
    def repeated(self, index):
        clip = read(self, index)
        return type(clip)(np.tile(clip.samples, 12), 8000, clip.text, clip.speaker, clip.key)

    return repeated


def test_bytes_do_not_depend_on_interruptions(speech, tmp_path):
    source = Recordings(broken=(2, 9), silent=(17,))
    encode_recordings(tmp_path / "whole", *speech, source)
    undisturbed = content(tmp_path / "whole")
    assert set(undisturbed) == {
        *(".lock", "manifest.json", "tokenizer/config.json", "tokenizer/model.safetensors"),
        *(f"shard-0000{number}.safetensors" for number in range(4)),
    }
    for moment in (1, 6, 11, 14):
        folder = tmp_path / str(moment) / "whole"
        with pytest.raises(KeyboardInterrupt):
            encode_recordings(folder, *speech, source, progress=Interrupting(moment))
        with pytest.raises(ArtifactError, match="not complete"):
            LatentSet.open(folder)
        encode_recordings(folder, *speech, source)
        assert content(folder) == undisturbed


def test_a_damaged_complete_set_is_repaired(speech, tmp_path):
    encode_recordings(tmp_path / "set", *speech)
    sound = content(tmp_path / "set")
    (tmp_path / "set" / "shard-00002.safetensors").unlink()
    encode_recordings(tmp_path / "set", *speech)
    assert content(tmp_path / "set") == sound


def test_what_is_not_fit_is_left_out_and_listed(speech, tmp_path):
    source = Recordings(broken=(0, 7), silent=(20,))
    limits = ClipLimits(min_seconds=0.05, needs_text=True)
    manifest = encode_recordings(tmp_path / "set", *speech, source, limits=limits)
    left_out = {0, 7, 20} | set(range(4, 30, 5))
    assert [item.index for item in manifest.skipped] == sorted(left_out)
    reasons = {item.index: item.reason for item in manifest.skipped}
    assert reasons[0] == "0.wav is empty."
    assert "silent" in reasons[20]
    assert "no text" in reasons[4]
    assert manifest.limits == limits.to_dict()
    kept = [index for index in range(30) if index not in left_out]
    latents = LatentSet.open(tmp_path / "set")
    assert [latents.read_one(place).key for place in range(len(latents))] == [
        f"{index}.wav" for index in kept
    ]
    assert [entry.count for entry in manifest.shards] == [
        sum(index // 8 == number for index in kept) for number in range(4)
    ]


def test_a_shard_may_be_empty_but_too_many_broken_clips_stop(speech, tmp_path):
    manifest = encode_recordings(tmp_path / "a", *speech, Recordings(broken=range(8, 16)))
    assert [entry.count for entry in manifest.shards] == [8, 0, 8, 6]
    assert len(LatentSet.open(tmp_path / "a").lengths) == 22
    with pytest.raises(DataError, match=r"11 of the 30.*0\.wav is empty"):
        encode_recordings(tmp_path / "b", *speech, Recordings(broken=range(11)))


@pytest.mark.parametrize("kind", [PosteriorKind.GAUSSIAN, PosteriorKind.LEARNED])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_statistics_are_those_of_everything_stored(tmp_path, kind, dtype):
    speech = export_tokenizer(kind, tmp_path / "export", SPEECH_NETWORK)
    manifest = encode_recordings(tmp_path / "set", *speech, dtype=dtype)
    tensors = [load_file(tmp_path / "set" / entry.file) for entry in manifest.shards]
    mean = np.concatenate([t["mean"][0].double().numpy() for t in tensors])
    assert manifest.statistics.count == len(mean)
    noise = np.full(3, (0.75 / 0.8) ** 2)
    if kind is PosteriorKind.LEARNED:
        stored = [t["log_variance"][0].double().exp().numpy() for t in tensors]
        noise = np.concatenate(stored).mean(0)
    each = manifest.stats(manifest.posterior, per_channel=True)
    np.testing.assert_allclose(each.shift, mean.mean(0), rtol=1e-9)
    np.testing.assert_allclose(each.scale, 1 / np.sqrt(mean.var(0) + noise), rtol=1e-9)


def test_other_rates_are_resampled(speech, tmp_path):
    encode_recordings(tmp_path / "set", *speech, Recordings(count=4, sample_rate=16_000))
    lengths = LatentSet.open(tmp_path / "set").lengths.tolist()
    source = Recordings(count=4, sample_rate=16_000)
    assert lengths == [math.ceil(len(source[index].samples) / 2 / HOP) for index in range(4)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"limits": ClipLimits(max_seconds=9.0)}, "limits"),
        ({"max_batch_seconds": 2}, "batch_size (1 there, 2 here)"),
        ({"spec": "digits"}, "data ('recordings' there, 'digits' here)"),
    ],
)
def test_another_set_in_the_folder_is_refused(speech, tmp_path, options, named):
    encode_recordings(tmp_path / "set", *speech)
    with pytest.raises(DataError, match="made otherwise") as caught:
        encode_recordings(tmp_path / "set", *speech, **options)
    assert named in str(caught.value)


def test_a_tokenizer_of_images_is_refused(tokenizers, tmp_path):
    with pytest.raises(ArtifactError, match="tokenizer of images"):
        encode_recordings(tmp_path / "set", *tokenizers[PosteriorKind.GAUSSIAN])


class Counting(SilentProgress):
    """Remembers its bar."""

    @contextmanager
    def bar(self, label, total, unit, done=0):
        self.total, self.unit, self.done = total, unit, done
        yield self

    def advance(self, amount=1, **figures):
        self.done += amount


def test_progress_counts_clips(speech, tmp_path):
    progress = Counting()
    encode_recordings(tmp_path / "set", *speech, Recordings(broken=[3]), progress=progress)
    assert (progress.done, progress.total, progress.unit) == (30, 30, "clips")


def test_the_next_window_is_read_while_one_is_encoded(speech, tmp_path, monkeypatch):
    tokenizer, export = speech
    read = [threading.Event() for _ in range(30)]
    get = Recordings.__getitem__

    def watched(self, index):
        assert threading.current_thread() is not threading.main_thread()
        read[index].set()
        return get(self, index)

    waited = []

    def encode(media):
        if not waited:
            waited.append(read[5].wait(timeout=60))
            assert not read[8].is_set(), "one window ahead, no more"
        return type(tokenizer).encode(tokenizer, media)

    monkeypatch.setattr(speech_caching, "WINDOWS_AHEAD", 1)
    monkeypatch.setattr(Recordings, "__getitem__", watched)
    monkeypatch.setattr(tokenizer, "encode", encode)
    encode_recordings(tmp_path / "set", tokenizer, export)
    assert waited == [True]
