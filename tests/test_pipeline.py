"""Reading ahead in threads, what is on its way from a device, and what the encoder waits for."""

import multiprocessing
import threading
import time
import warnings
from contextlib import closing
from itertools import count, islice

import PIL.Image
import pytest
import torch

from latentlm_core.data import caching, pipeline, speech_caching
from latentlm_core.data.caching import ImageEncoder, LatentViews
from latentlm_core.data.decoding import CenterView, decode
from latentlm_core.data.folders import FolderSource
from latentlm_core.data.partial import Run
from latentlm_core.data.pipeline import Landing, Throughput, ahead, one_behind
from latentlm_core.tokenizers.base import PosteriorKind
from tests.tiny_latents import (
    SPEECH_NETWORK,
    Holed,
    Interrupting,
    Recordings,
    content,
    encode_recordings,
    export_tokenizer,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize(("num_threads", "depth"), [(1, 1), (2, 4), (8, 16)])
def test_results_come_in_order_and_no_more_than_depth_ahead(num_threads, depth):
    begun = []

    def slow_where_odd(item):
        begun.append(item)
        time.sleep(0.002 * (item % 2))
        return item

    results = ahead(slow_where_odd, count(), num_threads, depth)
    for place, result in enumerate(islice(results, 30)):
        assert result == place
        assert len(begun) <= place + 1 + depth
    results.close()
    assert list(ahead(abs, range(-3, 0), num_threads, depth)) == [3, 2, 1]
    assert list(ahead(abs, (), num_threads, depth)) == []


def test_threads_are_as_many_as_the_taker_has_to_wait_for():
    together = threading.Barrier(2, timeout=60)
    with closing(ahead(lambda _: together.wait(), count(), 2, 2)) as results:
        assert {next(results) for _ in range(2)} == {0, 1}, "two at a time"
    made = [threading.Event() for _ in range(40)]
    with closing(ahead(lambda item: made[item].set(), range(40), 8, 16)) as results:
        for place in range(20):
            next(results)
            made[place + 1].wait(timeout=60)
            time.sleep(0.005)
        assert len(readers()) < 8
    assert not made[35].is_set(), "who finds what is wanted asks for no more ahead"


def test_an_error_comes_in_its_turn_as_itself_and_ends_the_threads():
    source = Holed()
    batches = decode(source, CenterView(16), [[0], [1], [len(source)], [2]], num_threads=2)
    assert [next(batches).keys for _ in range(2)] == [(source[k].key,) for k in range(2)]
    with pytest.raises(IndexError):
        next(batches)
    assert not readers()


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", ["bar", "encoder"])
def test_interrupting_ends_the_workers(encode, tokenizers, monkeypatch, num_workers, where):
    if where == "encoder":
        monkeypatch.setattr(tokenizers[PosteriorKind.GAUSSIAN][0], "encode", interrupt)
    of_other_tests = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt) as held:
        encode(progress=Interrupting(2), num_workers=num_workers)
    assert held, "the frames of all that was going on are still there"
    assert not readers()
    assert set(multiprocessing.active_children()) == of_other_tests


def test_interrupting_ends_the_readers_of_speech(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_caching, "WINDOW_CLIPS", 4)
    tokenizer, export = export_tokenizer(PosteriorKind.GAUSSIAN, tmp_path, SPEECH_NETWORK)
    monkeypatch.setattr(tokenizer, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt) as held:
        encode_recordings(tmp_path / "set", tokenizer, export)
    assert held
    assert not readers()


def test_speech_has_the_same_bytes_however_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_caching, "WINDOW_CLIPS", 4)
    tokenizer, export = export_tokenizer(PosteriorKind.LEARNED, tmp_path, SPEECH_NETWORK)
    source, made = Recordings(broken=[3], silent=[9]), []
    for number, (threads, windows) in enumerate([(1, 1), (2, 2), (5, 9)]):
        monkeypatch.setattr(speech_caching, "num_readers", lambda threads=threads: threads)
        monkeypatch.setattr(speech_caching, "WINDOWS_AHEAD", windows)
        folder = tmp_path / str(number) / "set"
        encode_recordings(folder, tokenizer, export, source)
        made.append(content(folder))
    assert made[0] == made[1] == made[2]


def test_a_batch_is_begun_before_the_one_before_it_is_finished_on_a_gpu_alone():
    def order(device):
        events = []
        for item in one_behind((events.append(f"begin {k}") or k for k in range(3)), device):
            events.append(f"finish {item}")
        return events

    begun = ["begin 0", "begin 1", "finish 0", "begin 2", "finish 1", "finish 2"]
    assert order(torch.device("cuda")) == begun
    assert order(torch.device("cpu"))[:2] == ["begin 0", "finish 0"]


def test_a_gpu_gets_the_same_parts(tokenizers, monkeypatch):
    tokenizer, _ = tokenizers[PosteriorKind.LEARNED]
    runs = [Run(0, range(0, 4)), Run(0, range(4, 6)), Run(0, range(6, 11))]
    encoder = ImageEncoder(Holed(broken=[4, 5, 8]), tokenizer, LatentViews(16), CPU)
    with torch.inference_mode():
        parts = list(encoder(runs, Throughput()))
        monkeypatch.setattr(caching, "one_behind", lambda items, _: one_behind(items, CUDA))
        others = list(encoder(runs, Throughput()))
    assert [len(part) for part in parts] == [4, 2, 5]
    for part, other in zip(parts, others, strict=True):
        assert part.skipped == other.skipped
        for (first, piece), (again, same) in zip(part.pieces, other.pieces, strict=True):
            assert (first, piece.keys) == (again, same.keys)
            assert torch.equal(piece.mean, same.mean)
            assert torch.equal(piece.log_variance, same.log_variance)


def test_what_lands_is_what_was_sent():
    sent = torch.arange(3.0)
    landed = Landing(sent, None).wait()
    assert torch.equal(landed[0], sent)
    assert landed[1] is None


def test_pace_tells_what_was_waited_for(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: clock[0])

    def slowly(seconds):
        clock[0] += seconds
        return seconds

    throughput = Throughput()
    throughput.start()
    for _ in throughput.reading(map(slowly, [1.0, 2.0])):
        slowly(4.0)
        throughput.count(8)
    with throughput.writing():
        slowly(5.0)
    throughput.count(0)
    assert (throughput.items, throughput.seconds) == (16, 16.0)
    assert throughput.shares == {"data_wait_share": 3 / 16, "write_wait_share": 5 / 16}
    whole = Throughput()
    whole.merge([throughput, Throughput(items=4, seconds=10.0, waited_to_read=5.0), Throughput()])
    assert (whole.items, whole.seconds) == (20, 16.0)
    assert (whole.waited_to_read, whole.waited_to_write) == (4.0, 2.5)


def test_pillow_is_silent_in_threads_and_other_warnings_are_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    for number in range(40):
        PIL.Image.new("RGB", (12, 12)).save(tmp_path / f"{number:02d}.png")
    batches = [[2 * number, 2 * number + 1] for number in range(20)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = decode(FolderSource(tmp_path, "set"), CenterView(8), batches, num_threads=4)
        assert sum(len(batch.keys) for batch in read) == 40
        assert not caught
        warnings.warn("of someone else", stacklevel=1)
    assert len(caught) == 1
