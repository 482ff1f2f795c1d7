"""The parts of a mix: directions of pairs, stretches of texts, interleaved documents."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentlm_core import workflows
from latentlm_core.data.mix_documents import FilePart, read_documents
from latentlm_core.data.mix_parts import (
    CaptionedImages,
    ComposedPart,
    Directions,
    TextPart,
    captions_of,
)
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.text_sources import TextItem
from latentlm_core.data.texts import open_endless_texts
from latentlm_core.errors import DataError
from latentlm_core.layout import Kind
from latentlm_core.runtime import generator
from tests.tiny_mix import (
    CHANNELS,
    FORMAT,
    MARKS,
    TEXT,
    captioned_of,
    direction_of,
    drawn,
    mixture,
    pairs,
    written,
)
from tests.tiny_multimodal import NUM_IMAGES, NUM_LATENTS, make_sets


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_sets(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def captioned(home) -> CaptionedImages:
    return captioned_of(home)


@pytest.fixture(scope="module")
def latents(captioned) -> LatentSet:
    return captioned.latents


# --- pairs -----------------------------------------------------------------------------------


def test_directions_follow_the_weights_where_an_example_has_words(captioned):
    part = pairs(captioned, directions=Directions(draw=2.0, describe=1.0, ask=1.0))
    documents = drawn(part, 1200)
    wordless = {f"{number:02d}.png" for number in range(4, NUM_IMAGES["train"], 5)}
    counts = Counter(direction_of(d) for d in documents if d.key not in wordless)
    total = sum(counts.values())
    assert {d.key for d in documents} & wordless
    assert {direction_of(d) for d in documents if d.key in wordless} == {"dropped"}
    for name, share in (("draw", 0.5), ("describe", 0.25), ("ask", 0.25)):
        assert counts[name] / total == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", ["draw", "describe", "ask"])
def test_a_direction_alone(captioned, name):
    only = Directions(**{"draw": 0.0, "describe": 0.0, "ask": 0.0, name: 1.0})
    found = {direction_of(document) for document in drawn(pairs(captioned, directions=only), 24)}
    assert found - {"dropped"} == {name}


def test_the_condition_is_dropped_of_a_share_of_what_is_drawn(captioned):
    only = Directions(draw=1.0, describe=0.0, ask=0.0)
    documents = drawn(pairs(captioned, directions=only, condition_drop=0.25), 1200)
    captioned = [d for d in documents if int(d.key[:2]) % 5 != 4]
    dropped = sum(direction_of(document) == "dropped" for document in captioned)
    assert dropped / len(captioned) == pytest.approx(0.25, abs=0.05)


def test_words_are_those_of_the_example(captioned, latents):
    for document in drawn(pairs(captioned), 60):
        index = next(i for i in range(len(latents)) if latents.key(i) == document.key)
        record = latents.read_one(index)
        said = set(written(document)) - {"bos", "eos", "null", "[]"}
        questions = {f"{question}\n{answer}" for question, answer in record.questions}
        assert said <= {record.caption} | questions


def test_an_image_may_be_asked_several_questions_in_a_row(captioned, latents):
    """In an order that is drawn, each answer with its end, and nothing but answers is learned."""
    only = Directions(draw=0.0, describe=0.0, ask=1.0)
    part = pairs(captioned, directions=only, max_questions=2)
    asked = [document for document in drawn(part, 100) if direction_of(document) == "ask"]
    orders = Counter()
    for document in asked:
        _, picture, *rest = written(document)
        index = next(i for i in range(len(latents)) if latents.key(i) == document.key)
        one, other = (f"{question}\n{answer}" for question, answer in latents.questions(index))
        assert picture == "[]"
        assert rest in ([one, "eos", other, "eos"], [other, "eos", one, "eos"])
        orders[rest[0]] += 1
        learned = document.ids[document.learn == int(Kind.TEXT)].tolist()
        answers = [answer.split("\n")[1] for answer in rest[::2]]
        assert learned == [t for a in answers for t in (*TEXT.encode(a), MARKS.eos)]
    assert sum(orders[one] for one in orders if one.startswith("which shape")) > 20
    assert sum(orders[one] for one in orders if one.startswith("which colour")) > 20


def test_latents_are_drawn_anew_around_their_means(captioned, latents):
    record, source = latents.read_one(3), generator("draws")
    pictures = torch.stack([captioned.picture(record, source) for _ in range(2000)])
    assert pictures.shape[1:] == (NUM_LATENTS, CHANNELS)
    assert pictures.std(0).min() > 0.5
    mean = captioned.stats.normalise(record.mean)
    torch.testing.assert_close(pictures.mean(0), mean, rtol=0, atol=0.3)


def test_whether_a_leading_image_is_learned(captioned):
    for learn in (False, True):
        part = pairs(captioned, learn_leading=learn, directions=Directions(draw=0.0))
        for document in drawn(part, 24):
            if direction_of(document) == "dropped":
                continue
            latent = document.kind == int(Kind.LATENT)
            assert bool((document.learn[latent] == int(Kind.LATENT)).all()) is learn
            assert bool(document.learn[latent].any()) is learn


def test_several_captions_are_lines():
    assert captions_of(" a cat \n\nan animal\n") == ["a cat", "an animal"]
    assert captions_of(None) == captions_of(" \n") == []


def test_a_caption_of_spaces_is_none(captioned, monkeypatch):
    read = LatentSet.read_one
    monkeypatch.setattr(
        LatentSet, "read_one", lambda *given: replace(read(*given), caption=" \n", questions=())
    )
    with pytest.raises(DataError, match="no captions and no questions"):
        pairs(captioned)


def test_a_set_without_words_is_refused(home, tmp_path):
    for path in (home / "shapes/train").glob("*4.png"):
        shutil.copy(path, tmp_path)
    out = tmp_path / "set"
    workflows.tokenize(data=str(tmp_path), vae=str(home / "runs/vae"), out=out, device="cpu")
    for spec, sentence in (("{}=1", "no captions and no"), ("interleaved:{}", "no captions to")):
        with pytest.raises(DataError, match=sentence) as caught:
            mixture(home, spec.format(out))
        assert "coloured-digits" in str(caught.value.hint)


def test_a_set_without_what_the_directions_want_is_refused(captioned):
    with pytest.raises(DataError, match="for the directions that are wanted"):
        pairs(captioned, directions=Directions(draw=0.0, describe=0.0, ask=0.0))


# --- texts -----------------------------------------------------------------------------------


class Long:
    """One text of a thousand bytes, no two stretches of which are alike."""

    name = "long"
    held_out = (TextItem("held out " * 60, "held"),)

    def __getitem__(self, place: int) -> TextItem:
        return TextItem("".join(f"{number:04d}" for number in range(250)), "long")


def test_of_a_long_text_a_stretch_is_drawn():
    documents = drawn(TextPart(Long(), FORMAT, row_length=64), 300)
    assert {len(document) for document in documents} == {64}
    whole = FORMAT.text_ids(Long()[0].text)
    stretches = [whole[start : start + 64] for start in range(len(whole) - 63)]
    starts = [stretches.index(document.ids.tolist()) for document in documents]
    assert all(document.learn.eq(int(Kind.TEXT)).all() for document in documents)
    assert len(set(starts)) > 200
    assert min(starts) < 30
    assert max(starts) > len(stretches) - 30


def test_a_long_text_is_encoded_once(monkeypatch):
    encoded = []
    text_ids = FORMAT.text_ids
    monkeypatch.setattr(FORMAT, "text_ids", lambda text: encoded.append(text) or text_ids(text))
    part = TextPart(Long(), FORMAT, row_length=64)
    first, second = drawn(part, 2)
    assert first.ids.tolist() != second.ids.tolist()
    assert encoded == [Long()[0].text]


def test_all_of_a_long_text_validates_once():
    stretches = list(TextPart(Long(), FORMAT, row_length=64).held_out(generator()))
    predicted = torch.cat([stretch.ids[1:] for stretch in stretches]).tolist()
    assert predicted == FORMAT.text_ids(Long.held_out[0].text)[1:]
    assert max(map(len, stretches)) == 64


def test_a_short_text_is_whole(home):
    part = TextPart(open_endless_texts(str(home / "texts"), 0, 0.1), FORMAT, row_length=2000)
    for document in drawn(part, 19):
        assert written(document) == ["bos", (home / "texts" / document.key).read_text(), "eos"]


# --- interleaved -----------------------------------------------------------------------------


def test_a_composed_document_has_captions_before_their_images(captioned, latents):
    captions = {latents.key(i): latents.caption(i) for i in range(len(latents))}
    documents = drawn(ComposedPart(captioned, FORMAT, max_images=4, held_out=0.2, seed=0), 120)
    counts = Counter(len(document.key.split("+")) for document in documents)
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 25
    for document in documents:
        wanted = ["bos"]
        for key in document.key.split("+"):
            wanted += [*filter(None, [captions[key]]), "[]"]
        assert written(document) == [*wanted, "eos"]
        learned = document.learn[document.kind == int(Kind.LATENT)].view(-1, NUM_LATENTS)
        told = [bool(captions[key]) for key in document.key.split("+")]
        assert learned.any(1).tolist() == told


def test_documents_of_a_file_are_as_they_are_written(captioned, latents, tmp_path):
    rows = [["see ", {"image": "01.png"}, " and ", {"image": "02.png"}], [{"image": "03.png"}, "x"]]
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"pieces": row}) + "\n" for row in rows))
    part = FilePart("docs", read_documents(file, latents), captioned, FORMAT, 0.0, seed=0)
    documents = sorted(drawn(part, 2), key=lambda document: document.key)
    assert [document.key for document in documents] == ["docs:1", "docs:2"]
    assert written(documents[0]) == ["bos", "see ", "[]", " and ", "[]", "eos"]
    assert written(documents[1]) == ["bos", "[]", "x", "eos"]
    learned = [d.learn[d.kind == int(Kind.LATENT)].any() for d in documents]
    assert [bool(each) for each in learned] == [True, False]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no documents"),
        ("{", "docs.jsonl:1 is not of the form"),
        ("[]", "docs.jsonl:1 is not of the form"),
        ('{"pieces": 3}', "docs.jsonl:1 is not of the form"),
        ('{"pieces": [3]}', "docs.jsonl:1 is not of the form"),
        ('{"pieces": ["a"]}\n{"pieces": [{"picture": "a"}]}', "docs.jsonl:2 is not of the form"),
        ('{"pieces": []}', "docs.jsonl:1 has no pieces"),
        ('{"pieces": "words"}', "docs.jsonl:1 is not of the form"),
        ('\n{"pieces": ["a\u2028b"]}\n\n{}', "docs.jsonl:4 is not of the form"),
        ('{"pieces": [{"image": "none.png"}]}', "names the image 'none.png', which"),
        ("[" * 100_000, "docs.jsonl:1 is not of the form"),
    ],
)
def test_a_file_that_is_none_gets_a_sentence(latents, tmp_path, text, sentence):
    (tmp_path / "docs.jsonl").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_documents(tmp_path / "docs.jsonl", latents)


def test_a_file_that_cannot_be_read_gets_a_sentence(latents, tmp_path):
    (tmp_path / "docs.jsonl").write_bytes(b"\xff\xfe")
    for name in ("docs.jsonl", "nothing.jsonl", ""):
        with pytest.raises(DataError, match="cannot be read"):
            read_documents(tmp_path / name, latents)


def test_a_mix_with_a_file(home, tmp_path):
    file = tmp_path / "docs.jsonl"
    rows = [{"pieces": [f"number {n} ", {"image": f"{n:02d}.png"}]} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = mixture(
        home, f"interleaved:{home / 'latents/shapes'}+{file}=1,text:{home / 'texts'}=1"
    )
    keys = {key for number in range(8) for key in stream.batch(number).keys}
    held_out = {key for batch in stream.held_out() for key in batch.keys}
    assert not keys & held_out
    assert len({key for key in keys | held_out if key.startswith(str(file))}) == 20
