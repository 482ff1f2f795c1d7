"""Batches whose rows are shared: all shares together are the batch that one process has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentlm_core.data import speech_stream as speech_stream_module
from latentlm_core.data import stream as stream_module
from latentlm_core.data.packing import LatentStream, SequenceBatch
from latentlm_core.data.stream import MediaStream
from latentlm_core.draws import Rows
from latentlm_core.errors import ConfigError
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.training.tasks import BatchStream
from tests import test_packing, test_utterances
from tests.test_speech_stream import Noise, speech_stream
from tests.test_stream import Holed
from tests.tiny_mix import mixture
from tests.tiny_multimodal import make_sets

BROKEN = (1, 2, 7, 20)
Open = Callable[[], BatchStream]


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, Open]:
    """Streams of sequences by kind, opened anew each time."""

    def folder() -> Path:
        return tmp_path_factory.mktemp("shared")

    images, home = test_packing.make_latents(folder(), flip=True), make_sets(folder())
    speech = test_utterances.encode(folder(), PosteriorKind.GAUSSIAN)
    settings = test_utterances.CONFIG.model_copy(update={"batch_size": 12})
    return {
        "classes": lambda: LatentStream(images, test_packing.CONFIG, 3),
        "speech": lambda: test_utterances.SpeechSequences(
            speech, test_utterances.BYTES, settings, 3
        ),
        "mix": lambda: mixture(home, seed=3),
    }


def same_sequences(left: SequenceBatch, right: SequenceBatch) -> bool:
    return (
        torch.equal(left.ids, right.ids)
        and torch.equal(left.latents, right.latents)
        and torch.equal(left.layout.latent_targets, right.layout.latent_targets)
        and left.keys == right.keys
    )


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["classes", "speech", "mix"])
def test_shares_of_sequences_are_the_batch(opened, kind, count):
    numbers = [0, 5, 3]
    wanted = list(opened[kind]().batches(numbers))
    taken = [list(opened[kind]().batches(numbers, (index, count))) for index in range(count)]
    assert [len(batches) for batches in taken] == [len(numbers)] * count
    for whole, *shares in zip(wanted, *taken, strict=True):
        assert torch.equal(torch.cat([share.ids for share in shares]), whole.ids)
        assert torch.equal(torch.cat([share.latents for share in shares]), whole.latents)
        for name in ("kind", "document", "position", "span", "predict"):
            maps = [getattr(share.layout, name) for share in shares]
            assert torch.equal(torch.cat(maps), getattr(whole.layout, name))
        assert sorted(key for share in shares for key in share.keys) == sorted(whole.keys)
        num_targets = len(whole.layout.latent_targets)
        ends = [0]
        for share in shares:
            own = share.layout.latent_targets
            assert share.targets == Rows(ends[-1], ends[-1] + len(own), num_targets)
            ends.append(ends[-1] + len(own))
        assert ends[-1] == num_targets


@pytest.mark.parametrize("kind", ["classes", "speech", "mix"])
def test_a_share_of_one_is_the_batch_itself(opened, kind):
    (batch,) = opened[kind]().batches([4])
    assert batch.share(0, 1) is batch
    (again,) = opened[kind]().batches([4], (0, 1))
    assert same_sequences(batch, again)
    assert batch.rows is batch.targets is None


def test_a_share_knows_which_examples_it_has(opened):
    """A packed row of the mix has several documents: keys go where their tokens go."""
    (whole,) = opened["mix"]().batches([0])
    assert whole.row_of is not None
    assert len(set(whole.row_of)) < len(whole.keys)
    for index in range(2):
        share = whole.share(index, 2)
        num_documents = (share.layout.document.max(dim=1).values + 1).sum()
        assert len(share) == num_documents
        assert share.row_of is not None
        assert set(share.row_of) == set(range(len(share.ids)))


def test_too_many_processes_for_a_batch_are_refused(opened):
    for stream, size in ((opened["classes"](), 20), (images(), 8), (recordings(), 8)):
        sentence = f"A batch of {size} rows cannot be shared by {size + 1} processes"
        with pytest.raises(ConfigError, match=sentence):
            next(iter(stream.batches([0], (0, size + 1))))


def images(asked: list[int] | None = None) -> MediaStream:
    return MediaStream(Watched(Holed(30, BROKEN), asked), 16, 8, seed=1)


def recordings(asked: list[int] | None = None):
    return speech_stream(Watched(Noise(30, BROKEN), asked))


class Watched:
    """A source that notes what it is asked for."""

    def __init__(self, source, asked: list[int] | None) -> None:
        self.name, self.classes = source.name, source.classes
        self._source, self._asked = source, asked

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):
        if self._asked is not None:
            self._asked.append(index)
        return self._source[index]


@pytest.fixture(params=["memory", "read again"])
def storage(request, monkeypatch):
    if request.param == "read again":
        for module in (stream_module, speech_stream_module):
            monkeypatch.setattr(module, "MEMORY_BYTES", 0)
    return request.param


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("opened_media", [images, recordings])
def test_shares_of_media_are_the_batch(opened_media, count, storage):
    numbers = [0, 7, 3, 4]
    wanted = list(opened_media().batches(numbers))
    taken = [list(opened_media().batches(numbers, (index, count))) for index in range(count)]
    for whole, *shares in zip(wanted, *taken, strict=True):
        assert torch.equal(torch.cat([share.media for share in shares]), whole.media)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert sum((share.keys for share in shares), ()) == whole.keys
        cut = [whole.share(index, count) for index in range(count)]
        for share, other in zip(shares, cut, strict=True):
            assert (share.rows, share.num_sharers) == (other.rows, other.num_sharers)
            assert torch.equal(share.media, other.media)


@pytest.mark.parametrize("opened_media", [images, recordings])
def test_only_own_media_are_decoded(opened_media, monkeypatch):
    """Of two batches a quarter each; first it is probed whether everything fits."""
    for module in (stream_module, speech_stream_module):
        monkeypatch.setattr(module, "MEMORY_BYTES", 0)
    asked: list[int] = []
    stream = opened_media(asked)
    list(stream.batches([]))
    asked.clear()
    taken = list(stream.batches([0, 1], (1, 4)))
    assert [len(batch) for batch in taken] == [2, 2]
    assert 4 <= len(asked) <= 4 + len(BROKEN)
