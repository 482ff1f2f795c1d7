"""Sets that are read while they are used: the items, their order, and what is held of them."""

import weakref
from dataclasses import replace
from itertools import count, islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentlm_core.data import forward_files, stream, streamed_table
from latentlm_core.data.blocks import BlockOrder, Blocks, reading_ahead, streamed
from latentlm_core.data.parquet_files import ParquetFiles
from latentlm_core.data.sources import open_source, open_with_held_out
from latentlm_core.data.speech_sources import open_speech, open_speech_with_held_out
from latentlm_core.data.speech_stream import SpeechStream
from latentlm_core.data.stream import MediaStream
from latentlm_core.data.streamed_tables import open_streamed_table
from latentlm_core.errors import ArtifactError, DataError
from tests.tiny_streams import (
    CLASSES,
    picture,
    same_example,
    upload,
    write_archives,
    write_images,
    write_recordings,
)

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setenv("LATENTLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_windows(monkeypatch):
    """Two row groups of these images are a window; crops are not kept in memory."""
    of_counts = Blocks.of_counts
    monkeypatch.setattr(
        Blocks, "of_counts", lambda *args: replace(of_counts(*args), window_bytes=7000)
    )
    monkeypatch.setattr(stream, "MEMORY_BYTES", 0)


def take(batches, number, start=0):
    return list(islice(batches.batches(count(start)), number))


def same_batch(left, right):
    return torch.equal(left.media, right.media) and left.keys == right.keys


@pytest.mark.parametrize("place", ["folder", "memory", "file"])
def test_the_items_are_those_of_a_plain_read(tmp_path, place):
    folder = write_images(tmp_path / "set", 50)
    urls = {"folder": folder, "memory": f"memory://{tmp_path.name}", "file": f"file://{folder}"}
    upload(folder, urls["memory"])
    plain, read = open_source(str(folder)), open_source(f"stream:{urls[place]}")
    assert (len(read), read.classes) == (50, tuple(CLASSES))
    assert all(same_example(plain[index], read[index]) for index in (*range(50), 0, 49, 7))


def test_a_set_of_the_hub_is_streamed_by_its_splits(tmp_path, monkeypatch):
    """A local folder of the form ORG/NAME stands in for a repository on the hub."""
    write_images(tmp_path / "org" / "set", 20, prefix="train-")
    write_images(tmp_path / "org" / "set", 10, prefix="validation-", start=20)
    monkeypatch.chdir(tmp_path)
    train, test = open_with_held_out("stream:hf:org/set")
    assert [len(train), len(test)] == [20, 10]
    assert test[3].caption == "number 23"
    assert len(open_source("stream:hf:org/set:validation")) == 10
    with pytest.raises(DataError, match="no split 'nope'"):
        open_source("stream:hf:org/set:nope")
    write_archives(tmp_path / "org" / "archives", (3, 4))
    archived = open_source("stream:hf:org/archives")
    assert [archived[index].label for index in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_labels_without_names_are_counted_by_the_footers(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    cells = [{"bytes": b"x", "path": None}] * 4
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 4, -1, None]}, features)
    table.to_parquet(str(tmp_path / "a.parquet"), batch_size=2)
    assert open_source(f"stream:{tmp_path}").classes == open_source(str(tmp_path)).classes
    assert ParquetFiles([str(tmp_path / "a.parquet")], "it").largest("label") == 4


@pytest.mark.parametrize("labels", [True, False])
def test_archives_are_read_forwards_and_at_random_all_the_same(tmp_path, monkeypatch, labels):
    monkeypatch.setattr(forward_files, "MAX_ROWS", 3)
    folder = write_archives(tmp_path / "set", (7, 2, 11), labels)
    source = open_source(f"stream:{folder}")
    assert (len(source), source.classes) == (20, ("0", "1", "2") if labels else ())
    for index in (*range(20), 19, 3, 12, 4):
        assert source[index].caption == f"number {index}"
        assert source[index].label == (index % 3 if labels else None)
    assert len(list((tmp_path / "cache" / "streams").iterdir())) == 1
    monkeypatch.setattr(forward_files.ForwardFiles, "_count", None)  # it is not counted again
    assert len(open_source(f"stream:{folder}")) == 20
    order = [list(BlockOrder(streamed(source).reader.blocks, 1, epoch)) for epoch in range(2)]
    assert order[0] != order[1]
    assert [sorted(epoch) for epoch in order] == [list(range(20))] * 2


def test_files_of_a_stream_that_change_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(forward_files, "MAX_ROWS", 3)
    folder = write_archives(tmp_path / "set", (7,))
    source = open_source(f"stream:{folder}")
    write_archives(folder, (5,))
    with pytest.raises(ArtifactError, match="has other files than when they were counted"):
        source[6]
    assert len(open_source(f"stream:{folder}")) == 5


def test_the_first_ones_are_held_out_and_a_test_split_goes_before(tmp_path):
    folder = write_images(tmp_path / "set", 90)
    train, held_out = open_with_held_out(f"stream:{folder}")
    assert (len(train), len(held_out)) == (85, 5)
    assert [held_out[k].caption for k in range(5)] == [f"number {k}" for k in range(5)]
    assert (train[0].caption, train[84].caption) == ("number 5", "number 89")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("workers", [0, 2])
def test_batch_k_after_a_restart_is_batch_k(tmp_path, workers):
    folder = write_images(tmp_path / "set", 100, broken=(40,))

    def open_stream():
        train, held_out = open_with_held_out(f"stream:{folder}")
        return MediaStream(train, 8, 6, 3, num_workers=workers, held_out=held_out)

    whole = take(open_stream(), 40)
    for start in (0, 13, 31):
        again = take(open_stream(), 3, start)
        assert all(map(same_batch, again, whole[start : start + 3]))
    epoch = [key for batch in whole for key in batch.keys][:95]
    whole_items = {f"{index:08d}" for index in range(5, 100)} - {"00000040"}
    assert set(epoch) == whole_items, "number 41 stands in for the broken one"
    media = open_stream()
    take(media, 16)
    assert [item.reason[:8] for item in media.skipped] == ["00000040"]


@pytest.mark.usefixtures("small_windows")
def test_processes_that_share_batches_see_those_of_one(tmp_path):
    folder = write_images(tmp_path / "set", 60)
    whole = take(MediaStream(open_source(f"stream:{folder}"), 8, 6, 3), 4)
    for index in range(2):
        media = MediaStream(open_source(f"stream:{folder}"), 8, 6, 3)
        for batch, part in zip(whole, islice(media.batches(count(), (index, 2)), 4), strict=True):
            assert part.keys == batch.keys[3 * index : 3 * index + 3]
            assert torch.equal(part.media, batch.media[3 * index : 3 * index + 3])


def test_an_order_reads_each_block_once_and_is_a_permutation():
    blocks = Blocks.of_counts([5, 0, 7, 3, 9], [10, 1, 14, 6, 18]).part(range(2, 24))
    small = Blocks(blocks.items, blocks.num_bytes, blocks.numbers, blocks.files, window_bytes=20)
    order = BlockOrder(small, 5, 0)
    assert sorted(order) == list(range(22))
    assert [order[k] for k in range(22)] == list(order)
    assert list(order) != list(BlockOrder(small, 5, 1))
    assert blocks.numbers == (0, 2, 3, 4)
    visited = [small.holding(item) for item in order]
    changes = {a: visited.index(a) for a in set(visited)}
    lasts = {a: 21 - visited[::-1].index(a) for a in set(visited)}
    pairs = [(a, b) for a in changes for b in changes if changes[a] < changes[b]]
    assert sum(changes[b] < lasts[a] for a, b in pairs) <= 2, "windows hold two blocks at most"


def test_memory_holds_few_row_groups(tmp_path, monkeypatch):
    """Tables that are alive are counted, over a pass of a set many times larger than the bound."""
    alive = set()
    most = 0
    read = ParquetFiles.read

    def watched(self, number, features):
        nonlocal most
        table = read(self, number, features)
        weakref.finalize(table, alive.discard, number)
        alive.add(number)
        most = max(most, len(alive))
        return table

    monkeypatch.setattr(ParquetFiles, "read", watched)
    monkeypatch.setattr(streamed_table, "MEMORY_BYTES", 16_000)  # four row groups
    folder = write_images(tmp_path / "set", 400)
    source = open_source(f"stream:{folder}")
    sizes = streamed(source).reader.blocks.num_bytes
    assert len(sizes) > 48
    assert max(sizes) < 4000, "the column that nobody reads is not counted"
    seen = [source[index].caption for batch in batches_of(source, 400) for index in batch]
    assert seen == [f"number {index}" for index in range(400)]
    assert most <= 16_000 // min(sizes) + 2


def batches_of(source, total):
    return reading_ahead(source, iter([list(range(k, k + 10)) for k in range(0, total, 10)]))


def test_what_is_coming_is_read_ahead_and_no_further_than_memory_goes(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(streamed_table, "MEMORY_BYTES", 32_000)
    begin = streamed_table.HeldBlocks.begin
    monkeypatch.setattr(
        streamed_table.HeldBlocks,
        "begin",
        lambda self, number: begun.append(number) or begin(self, number),
    )
    source = open_source(f"stream:{write_images(tmp_path / 'set', 100, num_files=1)}")
    batches = batches_of(source, 100)
    assert next(batches) == list(range(10))
    assert begun[:2] == [0, 1]
    assert 1 < max(begun) < 6


def test_a_row_group_that_cannot_be_read_stops_and_is_no_broken_item(tmp_path, monkeypatch):
    source = open_source(f"stream:{write_images(tmp_path / 'set', 30)}")
    read = ParquetFiles.read

    def fail(self, number, features):
        raise OSError("the network is down")

    monkeypatch.setattr(ParquetFiles, "read", fail)
    media = MediaStream(source, 8, 4, 0)
    with pytest.raises(ArtifactError, match=r"set cannot be read: the network is down\.$"):
        take(media, 1)
    assert media.skipped == ()
    monkeypatch.setattr(ParquetFiles, "read", read)
    assert len(take(MediaStream(source, 8, 4, 0), 2)) == 2, "it is tried again"


def test_recordings_are_streamed_as_images_are(tmp_path):
    folder = write_recordings(tmp_path / "set", 40)
    plain, read = open_speech(str(folder)), open_speech(f"stream:{folder}")
    assert (len(read), read.classes) == (40, ("anna", "bert"))
    for index in range(40):
        assert np.array_equal(plain[index].samples, read[index].samples)
        assert (plain[index].text, plain[index].speaker) == (read[index].text, read[index].speaker)
    train, held_out = open_speech_with_held_out(f"stream:{folder}")
    assert [held_out[k].text for k in range(2)] == ["clip 0", "clip 1"]
    whole = take(SpeechStream(train, 8000, 800, 4, 1), 20)
    assert all(map(same_batch, take(SpeechStream(train, 8000, 800, 4, 1), 3, 12), whole[12:15]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stream:nowhere", "there is no folder or file nowhere"),
        ("stream:{root}", "there are no .parquet or .tar files in"),
        ("stream:memory://nowhere", "there is no folder or file memory://nowhere"),
        ("stream:xyz://a/b", "xyz://a/b cannot be opened: Protocol not known: xyz"),
        ("stream:hf:a/b/c", "is not of the form hf:ORG/NAME"),
        ("memory://a", "memory://a is a URL"),
    ],
)
def test_what_is_no_stream_is_refused_in_a_sentence(tmp_path, spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec.format(root=tmp_path))


def test_files_that_are_no_parquet_or_differ_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ArtifactError, match=r"a\.parquet cannot be read"):
        open_source(f"stream:{tmp_path}")
    write_images(tmp_path, 4, num_files=1)
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet has no column image, which .*\.parquet has"):
        open_source(f"stream:{tmp_path}")


def test_columns_may_have_points_in_their_names_and_types_without_a_like_are_refused(tmp_path):
    cells = [{"bytes": picture(index), "path": None} for index in range(2)]
    table = pa.table({"a.b": ["x", "y"], "a": cells, "label": [3, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    opened = open_streamed_table(f"stream:{tmp_path}", "train")
    assert opened[1] == {"a.b": "y", "a": cells[1], "label": 1}
    assert opened.largest("label") == 3
    sizes = [opened.select_columns([name]).blocks.num_bytes[0] for name in ("a.b", "a")]
    assert sizes[1] > len(cells[0]["bytes"]) > sizes[0]

    kind = pa.map_(pa.string(), pa.int64())
    pq.write_table(pa.table({"m": pa.array([[("x", 1)]], kind)}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="columns that cannot be read"):
        open_streamed_table(f"stream:{tmp_path}", "train")


def test_a_stream_reads_no_file_that_a_cell_names(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="00000000 is empty"):
        open_source(f"stream:{tmp_path}")[0]
