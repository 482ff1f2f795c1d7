"""Text tokenizers: whole round trips, training that repeats, files that are not believed."""

import hashlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.tokenizers.text import (
    Marks,
    TextConfig,
    TextTokenizer,
    has_content,
    make_tokenizer,
    normalise,
    train_bpe,
)
from latentlm_core.tokenizers.text_bytes import MAX_TOKEN_BYTES

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BPE_320 = TextConfig(kind="bpe", vocab_size=320)

any_text = st.text(st.characters(exclude_categories=()))
"""Lone surrogates too."""
rules = st.sampled_from(["speech", "words"])


def digit_strings(count: int = 300) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(DIGITS, k=draw.randint(3, 7))) for _ in range(count)]


BPE = train_bpe(digit_strings(), BPE_320)
BYTES = TextTokenizer(TextConfig())
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@both
@given(text=any_text)
def test_any_text_comes_back_whole(tokenizer, text):
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == whole
    assert all(0 <= index < tokenizer.num_text_ids for index in ids)


@both
@pytest.mark.parametrize("text", ["", " ", "a", " a", "  a ", "\n", "\0", "\ufeffa", "a\u3000"])
def test_white_space_comes_back_whole(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@both
def test_no_text_has_no_ids(tokenizer):
    assert tokenizer.encode("") == []


@both
@given(text=any_text)
def test_the_bytes_of_all_ids_are_those_of_the_text(tokenizer, text):
    sizes = tokenizer.num_bytes(tokenizer.encode(text))
    read = tokenizer.decode(tokenizer.encode(text)).encode()
    space = 1 if tokenizer is BPE and text else 0
    assert sum(sizes) == len(read) + space
    assert all(size > 0 for size in sizes)


def test_the_space_before_a_word_counts_as_its_own():
    assert BPE.num_bytes(BPE.encode("three one")) == [6, 4]
    assert BYTES.num_bytes(BYTES.encode("é1")) == [1, 1, 1]


def test_ids_of_bytes_are_the_bytes():
    assert BYTES.encode("aé") == [0x61, 0xC3, 0xA9]
    assert BPE.encode("\x7f")[-1] == 0x7F


@both
def test_marks_are_distinct_and_follow_the_text_ids(tokenizer):
    first = tokenizer.num_text_ids
    assert tokenizer.marks == Marks(*range(first, first + 6))
    assert tokenizer.vocab_size == first + 6


@both
@given(ids=st.lists(st.integers(-2, 400)))
def test_decoding_leaves_out_what_is_no_text(tokenizer, ids):
    text = [index for index in ids if 0 <= index < tokenizer.num_text_ids]
    assert tokenizer.decode(ids) == tokenizer.decode(text)


@both
def test_marks_decode_to_nothing(tokenizer):
    marks = tokenizer.marks
    assert tokenizer.decode([marks.bos, *tokenizer.encode("one"), *marks]) == "one"


def test_bytes_that_are_no_utf8_are_replaced():
    assert BYTES.decode([0x61, 0xC3, 0x62]) == "a\ufffdb"


def test_each_digit_is_one_token_at_320_ids_wherever_it_stands():
    assert BPE.num_text_ids <= 320
    single = [BPE.encode(word) for word in DIGITS]
    assert [len(ids) for ids in single] == [1] * 10
    assert BPE.encode(" ".join(DIGITS)) == [index for ids in single for index in ids]


def test_fewer_ids_than_wanted_where_there_is_no_more_to_merge():
    tokenizer = train_bpe(digit_strings(), TextConfig(kind="bpe", vocab_size=5000))
    assert 256 < tokenizer.num_text_ids < 320


def test_a_pair_that_occurs_once_is_not_merged():
    assert train_bpe(["ab", "ab", "cd"], BPE_320).num_text_ids == 258
    assert len(BPE.encode("xyxy")) == 5


def test_a_token_that_two_merges_make_has_one_id():
    a, b, c = b"abc"
    tokenizer = TextTokenizer(TextConfig(kind="bpe"), [(a, b), (256, c), (b, c), (a, 258)])
    assert tokenizer.num_text_ids == 259
    assert tokenizer.encode("abc") == [0x20, 257]


def test_training_repeats_and_depends_on_no_order():
    texts = digit_strings()
    assert train_bpe(texts, BPE_320).to_json() == BPE.to_json()
    assert train_bpe(iter(texts[::-1]), BPE_320).sha256 == BPE.sha256
    assert train_bpe(digit_strings(20), TextConfig(kind="bpe", vocab_size=270)).sha256 != BPE.sha256


def test_training_sees_normalised_text():
    shouted = [text.upper() for text in digit_strings()]
    quiet = TextConfig(kind="bpe", vocab_size=320, normalise="speech")
    tokenizer = train_bpe(shouted, quiet)
    assert len(tokenizer.encode("Seven")) == 1
    assert tokenizer.decode(tokenizer.encode("Seven ")) == "seven"


@given(texts=st.lists(st.text("ab \n\x00é", max_size=200), min_size=1))
def test_what_training_makes_can_be_written_and_read(texts):
    tokenizer = train_bpe(["a", *texts], TextConfig(kind="bpe", vocab_size=300))
    again = TextTokenizer.from_json(tokenizer.to_json(), "it")
    assert [again.decode(again.encode(text)) for text in texts] == texts


def test_tokens_are_bounded():
    tokenizer = train_bpe(["a" * 1000] * 2, TextConfig(kind="bpe"))
    lengths = [len(tokenizer.decode([index])) for index in range(256, tokenizer.num_text_ids)]
    assert MAX_TOKEN_BYTES // 2 <= max(lengths) <= MAX_TOKEN_BYTES


@pytest.mark.parametrize("texts", [[], ["", " ", "..."]])
def test_a_bpe_needs_text(texts):
    with pytest.raises(DataError, match="trained on text"):
        make_tokenizer(BPE_320, texts)


def test_an_error_of_the_data_comes_through_training():
    def broken():
        yield "one two"
        raise CorruptFileError("clip 7 is broken.")

    with pytest.raises(CorruptFileError, match="clip 7"):
        train_bpe(broken(), BPE_320)


def test_make_tokenizer_builds_either_kind():
    def unread():
        pytest.fail("a tokenizer of bytes reads no text")
        yield ""

    assert make_tokenizer(TextConfig(), unread()).sha256 == BYTES.sha256
    assert make_tokenizer(BPE_320, digit_strings()).sha256 == BPE.sha256


def test_the_size_of_a_bpe_is_bounded():
    for size in (255, (1 << 20) + 1):
        with pytest.raises(ValidationError):
            TextConfig(kind="bpe", vocab_size=size)


@pytest.mark.parametrize(
    ("text", "speech", "words"),
    [
        ("Three, one – “FOUR”.", 'three, one - "four".', "three one four"),
        ("Don’t say\u00a0'hello'\n", "don't say 'hello'", "don't say hello"),
        ("\ufeffsoft\u00adly ﬁve\x00", "softly five", "softly five"),
        ("नमस्ते, दुनिया", "नमस्ते, दुनिया", "नमस्ते दुनिया"),
        ("cafe\u0301 ①", "café 1", "café 1"),
        (" \u200b\t", "", ""),
        ("…!", "...!", ""),
        ("can´t", "can't", "can't"),
        ("می\u200cروم", "می\u200cروم", "می\u200cروم"),
    ],
)
def test_normalisation(text, speech, words):
    assert normalise(text, "speech") == speech
    assert normalise(text, "words") == words
    assert normalise(text, "none") == text


@given(text=any_text, rule=rules)
def test_normalisation_is_settled_after_once(text, rule):
    once = normalise(text, rule)
    assert normalise(once, rule) == once
    assert once == " ".join(once.split())
    assert once == once.lower()


@given(text=any_text, rule=rules)
def test_a_tokenizer_applies_its_normalisation(text, rule):
    tokenizer = TextTokenizer(TextConfig(normalise=rule))
    assert tokenizer.decode(tokenizer.encode(text)) == normalise(text, rule)


@pytest.mark.parametrize("text", ["a", "3", "何", "①", "...x", "٣", "\ud800a"])
def test_has_content(text):
    assert has_content(text)


@pytest.mark.parametrize("text", ["", " \n\u00a0", "...!?", "\u200b", "\ud800", "—", "\u0301"])
def test_has_no_content(text):
    assert not has_content(text)


@given(text=any_text, rule=rules)
def test_normalisation_keeps_content(text, rule):
    assert has_content(normalise(text, rule)) == has_content(text)


@both
def test_a_file_gives_the_same_tokenizer(tokenizer):
    text = tokenizer.to_json()
    again = TextTokenizer.from_json(text, "it")
    assert again.to_json() == text
    assert again.config == tokenizer.config
    assert again.marks == tokenizer.marks
    assert again.sha256 == hashlib.sha256(text.encode("ascii")).hexdigest() == tokenizer.sha256
    assert again.encode("three x") == tokenizer.encode("three x")


def test_the_digests_of_exports_that_are_there_stay():
    bpe = TextTokenizer(TextConfig(kind="bpe"), [(97, 98), (256, 99)])
    digests = [tokenizer.sha256[:16] for tokenizer in (BYTES, bpe)]
    assert digests == ["7d3fa391663999d4", "77c6733973e302cc"]


def document(**changes):
    plain = {"format": "latentlm-text", "version": 1, "config": {"kind": "bpe"}, "merges": []}
    return json.dumps(plain | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Invalid JSON"),
        ("[" * 100_000, "recursion limit"),
        ("[]", "should be an object"),
        ('{"config": {}}', "names no format or version"),
        ('{"a\\n\\u202e": 1, "config": {}}', r"a\\n\\u202e"),
        (document(format="other"), "'format'.*latentlm-text"),
        (document(version=2), "'version'.*should be 1"),
        (document(config={"kind": "words"}), "'config.kind'.*'bytes', 'bpe', 'library'"),
        (document(config={"kind": "bytes"}, merges=[[1, 2]]), "bytes has no merges"),
        (document(config={"kind": "bpe", "vocab_size": 256}, merges=[[1, 2]]), "257 text ids"),
        (document(merges=[[1, 256]]), "not made before it"),
        (document(merges=[[-1, 1]]), "not made before it"),
        (document(merges=[[1, 2.5]]), "'merges.0.1'.*valid integer"),
        (document(merges=[[1, True]]), "'merges.0.1'.*valid integer"),
        (document(merges=[[1, 10**400]]), "not made before it"),
        (document(merges=[[1, 1], *([i, i] for i in range(256, 300))]), "longer than 64 bytes"),
    ],
)
def test_a_file_that_is_something_else_is_one_sentence(text, reason):
    with pytest.raises(CorruptFileError, match=reason) as caught:
        TextTokenizer.from_json(text, "text.json")
    message = str(caught.value)
    assert message.startswith("text.json is ")
    assert message.isprintable()
    assert len(message) < 250


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
pairs = st.lists(st.tuples(st.integers(0, 270), st.integers(0, 270)), max_size=30)
documents = st.fixed_dictionaries(
    {"merges": pairs | json_values},
    optional=dict.fromkeys(("format", "version", "config", "other"), json_values),
).map(lambda changes: document(**changes))


@given(text=any_text | json_values.map(json.dumps) | documents, sentence=st.text(max_size=40))
def test_a_hostile_file_is_refused_or_makes_a_whole_tokenizer(text, sentence):
    try:
        tokenizer = TextTokenizer.from_json(text, "text.json")
    except CorruptFileError:
        return
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    assert TextTokenizer.from_json(tokenizer.to_json(), "it").sha256 == tokenizer.sha256
