"""Mixes of text, pairs and interleaved documents: shares, order, packing, what is held out."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from latentlm_core.data.document_format import ImageSpan
from latentlm_core.data.documents import Document, pack, pad
from latentlm_core.data.mix_parts import (
    CaptionedImages,
    ComposedPart,
)
from latentlm_core.data.mixture import (
    Mixture,
    PartSpec,
    _before,
    is_mix,
    parse_mix,
)
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import generator
from latentlm_core.training.lm_task import LMLossConfig, LMTask
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.step import Stepper
from tests.test_models import tiny_latent_lm
from tests.tiny_mix import (
    CHANNELS,
    CONFIG,
    FORMAT,
    TEXT,
    captioned_of,
    direction_of,
    drawn,
    mixture,
    pairs,
)
from tests.tiny_multimodal import NUM_IMAGES, NUM_LATENTS, ROW_LENGTH, make_sets


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_sets(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def captioned(home) -> CaptionedImages:
    return captioned_of(home)


# --- the spec --------------------------------------------------------------------------------


def test_a_mix_has_kinds_sources_and_weights_that_sum_to_one():
    assert parse_mix("text:pydoc=2, latents/x=1 ,interleaved:latents/x=1") == (
        PartSpec("text", "pydoc", None, 0.5),
        PartSpec("pairs", "latents/x", None, 0.25),
        PartSpec("interleaved", "latents/x", None, 0.25),
    )
    assert parse_mix("interleaved:latents/x+a/docs.jsonl,text:hf:org/name:train=3") == (
        PartSpec("interleaved", "latents/x", "a/docs.jsonl", 0.25),
        PartSpec("text", "hf:org/name:train", None, 0.75),
    )
    assert parse_mix("text:a=b=1e1") == (PartSpec("text", "a=b", None, 1.0),)
    assert parse_mix("text:a=b") == (PartSpec("text", "a=b", None, 1.0),)


def test_a_part_of_no_weight_is_left_out():
    assert parse_mix("text:a=0,b=3") == (PartSpec("pairs", "b", None, 1.0),)


def test_a_name_alone_is_no_mix():
    assert [is_mix(spec) for spec in ("latents/x", "x", "a/b=c")] == [False] * 3
    assert all(map(is_mix, ("x=1", "x,y", "text:x", "interleaved:x")))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("text:a,,latents/x", "has an empty part"),
        ("text:a,", "has an empty part"),
        ("text:=2,latents/x", "has an empty part"),
        ("interleaved:", "has an empty part"),
        ("interleaved:+docs.jsonl", "has an empty part"),
        ("interleaved:latents/x+=1", "has an empty part"),
        ("=1,latents/x", "has an empty part"),
        ("text:a=0,latents/x=0.0", "sum to zero"),
        ("text:a=-1,latents/x=2", "weight of text:a is -1; it must be 0 or more"),
        ("text:a=nan,latents/x=2", "weight of text:a is nan"),
        ("text:a=inf,latents/x=2", "weight of text:a is inf"),
    ],
)
def test_what_is_no_mix_gets_a_sentence(spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_mix(spec)


# --- batches ---------------------------------------------------------------------------------


def documents_of(stream: Mixture, count: int, monkeypatch) -> list[Document]:
    """The documents of the first batches."""
    with monkeypatch.context() as patch:
        patch.setattr("latentlm_core.data.mixture.pack", lambda documents, _: documents)
        return [document for number in range(count) for document in stream.batch(number)]


def kind_of(document: Document) -> str:
    if document.key.endswith(".txt"):
        return "text"
    return "interleaved" if "+" in document.key else "pairs"


@pytest.mark.parametrize("weights", [(2, 1, 1), (1, 6, 3)])
def test_shares_of_the_elements_are_as_the_weights_say(home, monkeypatch, weights):
    latents = home / "latents/shapes"
    text, pair, page = weights
    spec = f"text:{home / 'texts'}={text},{latents}={pair},interleaved:{latents}={page}"
    documents = documents_of(mixture(home, spec), 80, monkeypatch)
    elements = dict.fromkeys(("text", "pairs", "interleaved"), 0)
    for document in documents:
        elements[kind_of(document)] += len(document)
    total = sum(elements.values())
    assert total / 80 == pytest.approx(CONFIG.batch_elements, rel=0.05)
    for weight, count in zip(weights, elements.values(), strict=True):
        assert count / total == pytest.approx(weight / sum(weights), rel=0.1)


def test_a_batch_depends_on_seed_and_number_alone(home):
    wanted = [mixture(home, seed=3).batch(number) for number in (5, 6)]
    stream = mixture(home, seed=3).batches(range(5, 99))
    for batch in wanted:
        again = next(stream)
        assert again.keys == batch.keys
        assert torch.equal(again.ids, batch.ids)
        assert torch.equal(again.latents, batch.latents)
    assert mixture(home, seed=4).batch(5).keys != wanted[0].keys


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 1.3, 2.75, 17.123])
def test_every_place_of_a_part_is_in_one_batch(rate):
    ends = [_before(number, rate) for number in range(200)]
    assert ends[:2] == [0, math.ceil(rate)]
    counts = {after - before for before, after in pairwise(ends)}
    assert counts <= {math.floor(rate), math.ceil(rate)}
    assert ends[-1] == pytest.approx(199 * rate, abs=1)


def test_each_text_and_image_comes_once_an_epoch(home, monkeypatch):
    stream = mixture(home, f"text:{home / 'texts'},{home / 'latents/shapes'}")
    documents = documents_of(stream, 40, monkeypatch)
    for kind, count in (("pairs", 24), ("text", 19)):
        keys = [document.key for document in documents if kind_of(document) == kind]
        assert len(keys) >= 3 * count
        epochs = [keys[start : start + count] for start in (0, count, 2 * count)]
        assert [len(set(epoch)) for epoch in epochs] == [count] * 3
        assert len({frozenset(epoch) for epoch in epochs}) == 1


def test_what_is_held_out_is_never_trained_on(home, monkeypatch):
    stream = mixture(home)
    held_out = {key for batch in stream.held_out() for key in batch.keys}
    images = {key for key in held_out if key.endswith(".png") and "+" not in key}
    trained = documents_of(stream, 40, monkeypatch)
    seen = {name for document in trained for name in document.key.split("+")}
    assert len(images) >= 4  # some have no words, so nothing of them is told
    assert not seen & {name for key in held_out for name in key.split("+")}
    assert len(seen) == NUM_IMAGES["train"] - 6 + 19
    for one, other in zip(stream.held_out(), mixture(home).held_out(), strict=True):
        assert torch.equal(one.latents, other.latents)


def test_a_document_too_long_for_a_row_is_left_out(home, monkeypatch):
    """Of three images; those of two take their places."""
    spec = f"interleaved:{home / 'latents/shapes'}"
    stream = mixture(home, spec)
    documents = documents_of(stream, 20, monkeypatch)
    assert max(map(len, documents)) <= ROW_LENGTH
    assert 0.1 < stream.left_out[0] < 0.7
    assert mixture(home, spec, row_length=200).left_out == (0.0,)
    short = mixture(home, spec, row_length=60)
    assert len([key for batch in short.held_out() for key in batch.keys]) < 3
    assert len([key for batch in stream.held_out() for key in batch.keys]) == 3


@pytest.mark.parametrize(
    ("spec", "changes", "sentence"),
    [
        ("{latents}", {"row_length": 8}, "No document of shapes fits in a row of 8 elements"),
        ("text:pydoc", {"batch_elements": 64, "row_length": 4096}, "64 elements holds no whole"),
    ],
)
def test_rows_and_batches_too_small_get_a_sentence(home, spec, changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        mixture(home, spec.format(latents=f"{home / 'latents/shapes'}=1"), **changes)
    assert "--set data." in str(caught.value.hint)


# --- packing ---------------------------------------------------------------------------------


def all_kinds(captioned: CaptionedImages) -> list[Document]:
    """Texts, and images in every direction and in interleaved documents."""
    pair = pairs(captioned, condition_drop=0.3)
    page = ComposedPart(captioned, FORMAT, 2, 0.2, seed=0)
    texts = [FORMAT.stretch(FORMAT.text_ids(text), text) for text in ("a text", "another")]
    documents = [*drawn(pair, 24), *drawn(page, 6), *texts]
    found = {direction_of(document) for document in documents[:24]}
    assert found == {"draw", "dropped", "describe", "ask"}
    return documents


def fixed_loss(model: LatentLM) -> None:
    """Let timesteps and noise follow from the latent, wherever it stands."""
    head = model.head

    def loss(x0, condition, _):
        t = torch.full((1, len(x0)), 600)
        noise = (37 * x0).sin().unsqueeze(0)
        output = head(head.schedule.add_noise(x0, noise, t), t, condition.unsqueeze(0))
        return (output - head.schedule.target(x0, noise, t)).square().sum(-1), t

    head.loss = loss


def writer() -> LatentLM:
    return tiny_latent_lm(
        vocab_size=TEXT.vocab_size, latent_channels=CHANNELS, predicts_text=True
    ).eval()


def test_documents_learn_packed_what_they_learn_alone(captioned):
    model, documents = writer(), all_kinds(captioned)
    fixed_loss(model)
    packed, alone = pack(documents, ROW_LENGTH), pad(documents)
    assert len(packed.ids) < len(alone.ids) == len(documents)
    with torch.no_grad():
        ours, theirs = (
            model(batch.ids, batch.latents, batch.layout, Draws(generator()))
            for batch in (packed, alone)
        )
    assert ours.text.numel() == sum(int((d.learn[1:] & Kind.TEXT).sum()) for d in documents)
    for mine, other in ((ours.text, theirs.text), (ours.latent[0], theirs.latent[0])):
        assert len(mine.unique()) > len(mine) / 4  # they tell documents apart
        torch.testing.assert_close(mine.sort().values, other.sort().values, rtol=1e-4, atol=1e-4)


def test_attention_never_crosses_documents(captioned):
    model, batch = writer(), pack(all_kinds(captioned), ROW_LENGTH)
    row = int((batch.layout.document.max(1).values > 0).nonzero()[0, 0])
    fed = slice(None, -1)
    with torch.no_grad():
        before = model.states(batch.ids[:, fed], batch.latents[:, fed], batch.layout)
        for number in range(int(batch.layout.document[row].max()) + 1):
            own = torch.zeros_like(batch.ids, dtype=torch.bool)
            own[row, fed] = batch.layout.document[row] == number
            ids = torch.where(own, (batch.ids + 1) % TEXT.num_text_ids, batch.ids)
            latents = torch.where(own.unsqueeze(-1), batch.latents + 1, batch.latents)
            after = model.states(ids[:, fed], latents[:, fed], batch.layout)
            moved = (after - before).abs().amax(-1) > 1e-6
            assert torch.equal(moved, own[:, fed])


def test_batches_without_text_or_images_train_the_same_parameters(captioned):
    text = FORMAT.stretch(FORMAT.text_ids("some words"), "text")
    picture = FORMAT.document(
        [FORMAT.nothing, ImageSpan(torch.randn(NUM_LATENTS, CHANNELS))], "image"
    )
    picture.learn[-1] = 0  # not even its end
    for document, idle in ((text, "head."), (picture, "text_")):
        task = LMTask(writer(), LMLossConfig())
        runner = Stepper(
            task.modules,
            {"model": OptimizerConfig(lr=1e-3)},
            total_steps=10,
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        figures = runner.step(task.turns(0), [pack([document], ROW_LENGTH)], 0)
        assert float(figures["loss/model"].total) > 0
        for name, parameter in task.model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all()
            if name.startswith(idle):
                assert not parameter.grad.any(), name
        trained = [name for name, each in task.model.named_parameters() if each.grad.any()]
        assert any(name.startswith("backbone.") for name in trained)
