import numpy as np
import pytest
import torch

from latentlm_core.data import speech_stream as stream_module
from latentlm_core.data.audio import ClipLimits, from_pcm, prepare, to_pcm
from latentlm_core.data.base import Clip
from latentlm_core.data.speech_stream import SpeechStream
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.runtime import derive_seed
from latentlm_core.training.tasks import BatchStream

RATE, SEGMENT = 8000, 2000


class Noise:
    """Recordings of 0.15 to 0.74 s, some of them broken or too short."""

    def __init__(self, count=30, broken=(), short=()):
        self.name, self.classes = "noise", ("a", "b")
        self._count, self._broken, self._short = count, set(broken), set(short)

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if index in self._broken:
            raise CorruptFileError(f"{index}.wav is empty.")
        length = 100 if index in self._short else 1200 + 160 * index
        random = np.random.default_rng(index)
        samples = (0.1 * random.standard_normal(length)).clip(-0.9, 0.9).astype(np.float32)
        speaker = None if index == 3 else index % 2
        return Clip(samples, RATE, None, speaker, f"{index}.wav")


def speech_stream(source=None, batch_size=8, seed=1, **options):
    return SpeechStream(source or Noise(), RATE, SEGMENT, batch_size, seed, **options)


def take(stream, count, start=0):
    return list(stream.batches(range(start, start + count)))


def same(left, right):
    return (
        torch.equal(left.media, right.media)
        and torch.equal(left.labels, right.labels)
        and left.keys == right.keys
    )


@pytest.fixture(params=["memory", "read again"])
def storage(request, monkeypatch):
    """Both ways in which recordings come about give the same batches."""
    if request.param == "read again":
        monkeypatch.setattr(stream_module, "MEMORY_BYTES", 0)
    return request.param


def test_batches_are_segments_of_prepared_clips(storage):
    source = Noise()
    stream: BatchStream = speech_stream(source)
    place = 0
    for batch in take(stream, 8):
        assert batch.media.dtype == torch.float32
        assert batch.media.shape == (8, 1, SEGMENT)
        assert len(batch) == len(batch.keys) == 8
        for media, label, key in zip(batch.media, batch.labels, batch.keys, strict=True):
            clip = source[int(key.removesuffix(".wav"))]
            whole = from_pcm(to_pcm(prepare(clip, RATE)))
            room = max(len(whole) - SEGMENT, 0) + 1
            offset = derive_seed(1, "offset", place) % room
            expected = np.zeros(SEGMENT, np.float32)
            part = whole[offset : offset + SEGMENT]
            expected[: len(part)] = part
            assert np.array_equal(media[0].numpy(), expected)
            assert int(label) == (-1 if clip.speaker is None else clip.speaker)
            place += 1
    assert batch.to(torch.device("cpu")).keys == batch.keys


def test_what_is_shorter_than_a_segment_is_followed_by_silence():
    stream = speech_stream(Noise(count=3), batch_size=3)
    (batch,) = take(stream, 1)
    for media, key in zip(batch.media, batch.keys, strict=True):
        length = 1200 + 160 * int(key.removesuffix(".wav"))
        assert media[0, :length].abs().max() > 0
        assert not media[0, length:].any()


def test_batch_k_is_the_same_wherever_the_stream_begins(storage):
    whole = take(speech_stream(), 9)
    for start in (1, 4, 8):
        assert same(take(speech_stream(), 1, start)[0], whole[start])
    assert not same(take(speech_stream(seed=2), 1)[0], whole[0])


def test_the_size_of_the_batch_does_not_decide_the_segments():
    eights = torch.cat([batch.media for batch in take(speech_stream(), 5)])
    fives = torch.cat([batch.media for batch in take(speech_stream(batch_size=5), 8)])
    assert torch.equal(eights, fives)


def test_each_epoch_is_a_permutation_and_segments_move(storage):
    batches = take(speech_stream(), 15)
    keys = [key for batch in batches for key in batch.keys]
    epochs = [keys[first : first + 30] for first in range(0, 120, 30)]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    media = torch.cat([batch.media for batch in batches])
    longest = [media[place] for place, key in enumerate(keys) if key == "29.wav"]
    assert not any(torch.equal(longest[0], other) for other in longest[1:])
    assert speech_stream().num_examples == 30


def test_unfit_recordings_are_replaced_by_the_next_fit_one_and_listed(storage):
    """Items 28, 29 and 0 are unfit: the search goes around the end of the source."""
    source = Noise(30, broken=(7, 28), short=(29, 0))
    stream = speech_stream(source, batch_size=10)
    keys = [key for batch in take(stream, 3) for key in batch.keys]
    wanted = [key for batch in take(speech_stream(batch_size=10), 3) for key in batch.keys]
    step_in = {"7.wav": "8.wav", "28.wav": "1.wav", "29.wav": "1.wav", "0.wav": "1.wav"}
    assert keys == [step_in.get(key, key) for key in wanted]
    assert [item.index for item in stream.skipped] == [0, 7, 28, 29]
    assert stream.skipped[0].reason.startswith("0.wav is too short")
    assert stream.skipped[1].reason == "7.wav is empty."


def test_limits_are_the_callers():
    stream = speech_stream(limits=ClipLimits(max_seconds=0.7))
    take(stream, 4)
    assert [item.index for item in stream.skipped] == [28, 29]
    with pytest.raises(DataError, match=r"has no text"):
        take(speech_stream(limits=ClipLimits(needs_text=True)), 1)


def test_unfit_held_out_recordings_are_listed_apart(storage):
    stream = speech_stream(Noise(broken=[4]), batch_size=30, held_out=Noise(12, broken=(4, 9)))
    assert (stream.skipped, stream.skipped_held_out) == ((), ())
    take(stream, 1)
    list(stream.held_out())
    assert [item.index for item in stream.skipped] == [4]
    assert [item.index for item in stream.skipped_held_out] == [4, 9]
    assert speech_stream().skipped_held_out == ()


def test_too_many_unfit_recordings_stop_the_stream(storage):
    with pytest.raises(DataError, match=r"11 of the 30"):
        take(speech_stream(Noise(30, broken=range(11))), 4)
    with pytest.raises(DataError, match=r"3 of the 3"):
        take(speech_stream(Noise(3, broken=range(3))), 1)


def test_held_out_segments_are_the_first_ones_in_order_and_repeatable(storage):
    held = Noise(11, broken=(2,))
    stream = speech_stream(batch_size=4, held_out=held)
    first, second = list(stream.held_out()), list(stream.held_out())
    assert [len(batch) for batch in first] == [4, 4, 2]
    whole = [index for index in range(11) if index != 2]
    assert [key for batch in first for key in batch.keys] == [f"{index}.wav" for index in whole]
    assert all(same(left, right) for left, right in zip(first, second, strict=True))
    last = from_pcm(to_pcm(prepare(held[10], RATE)))[:SEGMENT]
    assert np.array_equal(first[-1].media[-1, 0, : len(last)].numpy(), last)
    assert list(speech_stream().held_out()) == []


def test_a_small_source_is_read_once_and_a_large_one_is_not_read_ahead(monkeypatch):
    class Counting(Noise):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    small = Counting(200)
    take(speech_stream(small), 30)
    assert small.reads <= 200 + 32
    monkeypatch.setattr(stream_module, "MEMORY_BYTES", 1000)
    large = Counting(200)
    stream = speech_stream(large)
    take(stream, 2)
    take(stream, 1)
    assert large.reads == 32 + 3 * 8


def test_reading_is_heard_of():
    heard = []

    class Listener:
        def bar(self, label, total, unit, done=0):
            heard.append([label, total, unit, 0])
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, amount=1, **figures):
            heard[-1][3] += amount

        def warn(self, message):
            heard.append(message)

    take(speech_stream(Noise(broken=[4]), progress=Listener()), 2)
    assert ["reading noise", 30, "recordings", 30] in heard
    assert heard.count("Skipped: 4.wav is empty.") == 1


def test_reading_leaves_the_global_generator_alone(storage):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(speech_stream(), 2)
    assert torch.equal(torch.rand(3), expected)
