"""Targets that hold text: captions and tables beside media, sets of texts, text tokenizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from latentlm_core.data.audio import write_wav
from latentlm_core.data.folders import FolderSource
from latentlm_core.data.media import write_png
from latentlm_core.data.speech_sources import open_speech
from latentlm_core.data.texts import open_endless_texts, open_texts
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer, make_tokenizer, train_bpe
from tests.hostile import Target, in_turn
from tests.hostile_changes import (
    changed_bytes,
    changed_json,
    changed_json_bytes,
    lines_of,
    names,
    odd_json,
)

TEXTS = [
    "a red seven",
    "one two three",
    "caf\u00e9 \u4e09 \U0001f600",
    "'quoted', (twice) -- 10,000",
]


def place(path: Path, content: bytes) -> None:
    """Write a file, unsynced, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


CAPTIONS = [
    {
        "file_name": "a.png",
        "text": "a bear",
        "questions": [{"question": "what?", "answer": "bear"}],
    },
    {"file_name": "sub/b.png", "caption": ["one", "two"], "extra": 1},
]


def make_png(folder: Path) -> bytes:
    """An image."""
    write_png(folder / "a.png", np.zeros((2, 2, 3), np.uint8))
    return (folder / "a.png").read_bytes()


def use_captions(made: bytes, case: tuple[bytes, bytes], folder: Path) -> None:
    """A folder of images with a table of captions and a text beside an image."""
    table, text = case
    for name in ("a.png", "sub/b.png"):
        place(folder / name, made)
    (folder / "metadata.jsonl").write_bytes(table)
    (folder / "a.txt").write_bytes(text)
    source = FolderSource(folder, "images")
    assert [source[index].key for index in range(2)] == ["a.png", "sub/b.png"]


CAPTION_TABLES = Target(
    "captions",
    make_png,
    lambda made: (b'{"file_name": "a.png", "text": "a bear"}', b"a bear"),
    lambda made: st.tuples(lines_of(CAPTIONS), st.binary(max_size=30) | st.just(b"x" * 70_000)),
    use_captions,
)

SPOKEN = [
    {"file_name": "a.wav", "text": "three one four", "speaker": "anna"},
    {"path": "sub/b.wav", "transcription": "two", "speaker_id": 7},
]
TABLES = {
    "metadata.csv": b'path,text,speaker\na.wav,"three, one",anna\nsub/b.wav,two,bert\n',
    "metadata.tsv": b"path\ttext\tspeaker\na.wav\tthree\tanna\nsub/b.wav\ttwo\tbert\n",
    "wavs/metadata.csv": b"a|THREE|three\nb|TWO|two\n",
    "x.trans.txt": b"a three one four\nb two\n",
}


@st.composite
def table(draw: st.DrawFn, sound: bytes) -> bytes:
    """A table with cells of another kind, or damaged bytes."""
    if draw(st.booleans()):
        return draw(changed_bytes(sound))
    cells = draw(st.lists(names, min_size=1, max_size=4))
    rows = [b"path,text,speaker"] * draw(st.integers(0, 1))
    rows += [",".join(cells).encode("utf-8", "replace"), b'a.wav,"x']
    rows += draw(st.lists(st.binary(max_size=20), max_size=3))
    return draw(st.sampled_from([b"\n", b"\r\n", b"\x00", b"\r"])).join(rows)


@st.composite
def spoken(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a table of recordings."""
    name = draw(st.sampled_from([*TABLES, "metadata.jsonl"]))
    return name, draw(lines_of(SPOKEN) if name.endswith("jsonl") else table(TABLES[name]))


def make_wav(folder: Path) -> bytes:
    """A tenth of a second of silence."""
    write_wav(folder / "a.wav", np.zeros(800, np.float32), 8000)
    return (folder / "a.wav").read_bytes()


def use_spoken(made: bytes, case: tuple[str, bytes], folder: Path) -> None:
    """A folder of recordings with a table, read by the folder's name and by the table's."""
    name, content = case
    root = folder / "set"
    for wav in ("a.wav", "sub/b.wav", "wavs/a.wav"):
        place(root / wav, made)
    path = root / name.rpartition("/")[2]
    path.write_bytes(content)
    in_turn([lambda: _read_speech(str(root)), lambda: _read_speech(str(path))])


def _read_speech(spec: str) -> None:
    source = open_speech(spec)
    for index in range(min(len(source), 20)):
        source[index]


SPEECH_TABLES = Target(
    "speech tables",
    make_wav,
    lambda made: ("metadata.csv", TABLES["metadata.csv"]),
    lambda made: spoken(),
    use_spoken,
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a file of documents."""
    rows = [{"text": text, "id": place} for place, text in enumerate(TEXTS)]
    name = draw(st.sampled_from(["a.jsonl", "a.csv", "a.txt", "a.md", "a.JSONL", "a.bin"]))
    if name.lower().endswith("jsonl"):
        return name, draw(lines_of(rows))
    sound = ("text,id\n" + "\n".join(f'"{text}",{len(text)}' for text in TEXTS)).encode()
    return name, draw(table(sound) | changed_bytes(sound) | st.binary(max_size=50))


def use_documents(_made: None, case: tuple[str, bytes], folder: Path) -> None:
    """A file of documents, as it is trained on and as it is read once; its folder too."""
    name, content = case
    (folder / name).write_bytes(content)
    specs = [str(folder / name), str(folder)]
    in_turn(
        [reader for spec in specs for reader in (lambda s=spec: _train(s), lambda s=spec: _read(s))]
    )


def _train(spec: str) -> None:
    texts = open_endless_texts(spec, seed=0, held_out=0.1)
    for place in range(6):
        texts[place].text.encode()


def _read(spec: str) -> None:
    for item in open_texts(spec):
        item.text.encode()


DOCUMENTS = Target(
    "texts",
    lambda folder: None,
    lambda made: ("a.txt", b"a line\n" * 50),
    lambda made: documents(),
    use_documents,
)


def make_text_json(_folder: Path) -> list[Any]:
    """The files of a byte tokenizer, a BPE and a library's."""
    library = {"kind": "library", "normalise": "none"}
    return [
        json.loads(TextTokenizer(TextConfig()).to_json()),
        json.loads(train_bpe(TEXTS * 5, TextConfig(kind="bpe", vocab_size=300)).to_json()),
        json.loads(
            TextTokenizer(TextConfig(**library), library=make_libraries(_folder)[0]).to_json()
        ),
    ]


def use_text_json(_made: list[Any], content: bytes, _folder: Path) -> None:
    """A tokenizer out of a file writes and reads every text."""
    tokenizer = TextTokenizer.from_json(content.decode("utf-8", "replace"), "text.json")
    _speak(tokenizer)


def _speak(tokenizer: TextTokenizer) -> None:
    in_turn([lambda text=text: _round(tokenizer, text) for text in (*TEXTS, "", "\ud800", "a\x00")])
    tokenizer.decode(range(min(tokenizer.vocab_size, 300)))


def _round(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.num_text_ids for token in ids)
    tokenizer.decode(ids)
    tokenizer.num_bytes(ids)


TEXT_JSON = Target(
    "text tokenizers",
    make_text_json,
    lambda made: json.dumps(made[1]).encode(),
    lambda made: st.sampled_from(made).flatmap(changed_json_bytes) | odd_json,
    use_text_json,
)


def make_libraries(_folder: Path) -> list[str]:
    """A tokenizer.json of each kind of model."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"]))
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(TEXTS, trainers.WordPieceTrainer(special_tokens=["[UNK]"]))
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Replace(" ", "\u2581")
    unigram.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>"))
    words = Tokenizer(models.WordLevel({"a": 0, "red": 1, "[UNK]": 2}, unk_token="[UNK]"))
    return [tokenizer.to_str() for tokenizer in (bpe, pieces, unigram, words)]


def changed_library(made: list[str]) -> st.SearchStrategy[bytes]:
    """A tokenizer.json with something changed, mostly outside of its vocabulary."""

    def of(sound: Any) -> st.SearchStrategy[bytes]:
        model = sound["model"]
        head = {
            **sound,
            "model": {key: model[key] for key in model if key not in ("vocab", "merges")},
        }
        whole = {key: model[key] for key in model if key in ("vocab", "merges")}
        changed = changed_json(head).map(
            lambda value: (
                {**value, "model": {**whole, **value["model"]}}
                if isinstance(value, dict) and isinstance(value.get("model"), dict)
                else value
            )
        )
        return changed.map(lambda value: json.dumps(value).encode("utf-8", "replace"))

    parsed = [json.loads(text) for text in made]
    return st.sampled_from(parsed).flatmap(lambda sound: of(sound) | changed_json_bytes(sound))


def use_library(_made: list[str], content: bytes, folder: Path) -> None:
    """A tokenizer.json in a folder, as a recipe names it."""
    (folder / "tokenizer.json").write_bytes(content)
    _speak(make_tokenizer(TextConfig(kind="library", source=str(folder)), []))


LIBRARIES = Target(
    "tokenizer.json", make_libraries, lambda made: made[0].encode(), changed_library, use_library
)
