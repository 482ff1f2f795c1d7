import numpy as np
import pytest
import torch

from latentlm_core.data import stream as stream_module
from latentlm_core.data.media import center_crop, to_tensor
from latentlm_core.data.sources import Subset, open_source
from latentlm_core.data.stream import MediaStream
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.runtime import derive_seed
from latentlm_core.training.tasks import BatchStream


class Holed:
    """Shapes with some broken items."""

    def __init__(self, count=30, broken=()):
        self._whole = Subset(open_source("embedded:shapes"), range(count))
        self.name, self.classes, self._broken = "holed", self._whole.classes, set(broken)

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, index):
        if index in self._broken:
            raise CorruptFileError(f"{index}.png is empty.")
        return self._whole[index]


def take(stream, count, start=0):
    return list(stream.batches(range(start, start + count)))


def same(left, right):
    return (
        torch.equal(left.media, right.media)
        and torch.equal(left.labels, right.labels)
        and left.keys == right.keys
    )


@pytest.fixture(params=["memory", "decoded"])
def storage(request, monkeypatch):
    """Both ways in which crops come about give the same batches."""
    if request.param == "decoded":
        monkeypatch.setattr(stream_module, "MEMORY_BYTES", 0)
    return request.param


def test_batches_are_media_with_labels_and_keys(storage):
    source = Holed()
    stream: BatchStream = MediaStream(source, 16, 8, seed=1, flip=False)
    by_key = {source[index].key: source[index] for index in range(30)}
    for batch in take(stream, 2):
        assert batch.media.dtype == torch.float32
        assert batch.media.shape == (8, 3, 16, 16)
        assert len(batch) == len(batch.keys) == 8
        for media, label, key in zip(batch.media, batch.labels, batch.keys, strict=True):
            expected = to_tensor(center_crop(by_key[key].image, 16))
            assert torch.equal(media, expected)
            assert int(label) == by_key[key].label
    assert batch.to(torch.device("cpu")).keys == batch.keys


def test_batch_k_is_the_same_wherever_the_stream_begins(storage):
    whole = take(MediaStream(Holed(), 16, 8, seed=1), 9)
    for start in (1, 4, 8):
        assert same(take(MediaStream(Holed(), 16, 8, seed=1), 1, start)[0], whole[start])
    other = take(MediaStream(Holed(), 16, 8, seed=2), 1)[0]
    assert not same(other, whole[0])


def test_each_epoch_is_a_permutation_and_batches_straddle_epochs(storage):
    stream = MediaStream(Holed(30), 16, 8, seed=3)
    keys = [key for batch in take(stream, 15) for key in batch.keys]
    epochs = [keys[first : first + 30] for first in range(0, 120, 30)]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream.num_examples == 30


def test_flips_are_decided_by_place_alone_and_are_about_half():
    plain = take(MediaStream(Holed(), 16, 8, seed=5, flip=False), 10)
    flipped = take(MediaStream(Holed(), 16, 8, seed=5), 10)
    straight = torch.cat([batch.media for batch in plain])
    mixed = torch.cat([batch.media for batch in flipped])
    chosen = torch.tensor([derive_seed(5, "flip", place) % 2 == 1 for place in range(80)])
    assert torch.equal(mixed, torch.where(chosen[:, None, None, None], straight.flip(-1), straight))
    assert 25 < int(chosen.sum()) < 55
    assert [batch.keys for batch in plain] == [batch.keys for batch in flipped]
    in_fives = take(MediaStream(Holed(), 16, 5, seed=5), 16)
    assert torch.equal(torch.cat([batch.media for batch in in_fives]), mixed)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(storage, workers):
    source, held = Holed(broken=[4]), Holed(12, broken=[0])
    alone = MediaStream(source, 16, 8, seed=1, held_out=held)
    many = MediaStream(source, 16, 8, seed=1, held_out=held, num_workers=workers)
    for left, right in zip(take(alone, 5), take(many, 5), strict=True):
        assert same(left, right)
    for left, right in zip(alone.held_out(), many.held_out(), strict=True):
        assert same(left, right)


def test_a_broken_image_is_replaced_by_the_next_whole_one(storage):
    """Items 28, 29 and 0 are broken: the search goes around the end of the source."""
    source = Holed(30, broken=(7, 28, 29, 0))
    stream = MediaStream(source, 16, 10, seed=0, flip=False)
    keys = [key for batch in take(stream, 3) for key in batch.keys]
    wanted = [key for batch in take(MediaStream(Holed(), 16, 10, seed=0), 3) for key in batch.keys]
    step_in = {7: 8, 28: 1, 29: 1, 0: 1}
    names = {f"train-{broken:03d}": f"train-{whole:03d}" for broken, whole in step_in.items()}
    assert keys == [names.get(key, key) for key in wanted]
    assert [item.index for item in stream.skipped] == [0, 7, 28, 29]


def test_broken_images_are_listed_apart_from_broken_held_out_images(storage):
    stream = MediaStream(Holed(broken=[4]), 16, 30, seed=0, held_out=Holed(12, broken=(4, 9)))
    assert (stream.skipped, stream.skipped_held_out) == ((), ())
    take(stream, 1)
    list(stream.held_out())
    assert [item.reason for item in stream.skipped] == ["4.png is empty."]
    assert [item.index for item in stream.skipped_held_out] == [4, 9]
    assert MediaStream(Holed(), 16, 4, seed=0).skipped_held_out == ()


def test_too_many_broken_images_stop_the_stream(storage):
    with pytest.raises(DataError, match=r"11 of the 30"):
        take(MediaStream(Holed(30, broken=range(11)), 16, 10, seed=0), 3)
    with pytest.raises(DataError, match=r"3 of the 3"):
        take(MediaStream(Holed(3, broken=range(3)), 16, 2, seed=0), 1)


def test_held_out_is_finite_in_order_unflipped_and_repeatable(storage):
    held = Holed(11, broken=(2,))
    stream = MediaStream(Holed(), 16, 4, seed=1, held_out=held)
    first, second = list(stream.held_out()), list(stream.held_out())
    keys = [key for batch in first for key in batch.keys]
    assert keys == [f"train-{index:03d}" for index in range(11) if index != 2]
    assert all(same(left, right) for left, right in zip(first, second, strict=True))
    whole = [index for index in range(11) if index != 2]
    expected = to_tensor(np.stack([center_crop(held[index].image, 16) for index in whole]))
    assert torch.equal(torch.cat([batch.media for batch in first]), expected)
    assert list(MediaStream(Holed(), 16, 4, seed=1).held_out()) == []


def test_unlabelled_images_have_label_minus_one():
    class Unlabelled(Holed):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return type(example)(example.image, None, example.caption, example.key)

    assert take(MediaStream(Unlabelled(), 16, 4, seed=0), 1)[0].labels.tolist() == [-1] * 4


def test_decoding_leaves_the_global_generator_alone(storage):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(MediaStream(Holed(), 16, 8, seed=1, num_workers=1), 2)
    assert torch.equal(torch.rand(3), expected)
