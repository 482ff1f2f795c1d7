"""Captions and questions of images: from folders and tables into shards and out again."""

import dataclasses
import json

import datasets
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from latentlm_core.data.base import Question
from latentlm_core.data.shard_file import Encoded
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import open_source
from latentlm_core.errors import CorruptFileError, DataError
from tests.tiny_latents import Holed, content, forge

ASKED = (Question("which colour?", "grün"), Question('what does it say?\n"', "nothing, \u2028"))


class Asking(Holed):
    """Shapes, some of which have questions."""

    def __init__(self, asked, **options):
        super().__init__(**options)
        self._asked = asked

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), questions=self._asked(index))


def of_every_third(index):
    return ASKED[: 1 + index % 2] if index % 3 == 0 and index < 32 else ()


def test_questions_travel_into_shards_and_back(encode, tmp_path):
    encode(source=Asking(of_every_third, broken=[4]))
    latents = LatentSet.open(tmp_path / "a" / "set")
    assert latents.has_captions
    assert latents.has_questions
    kept = [index for index in range(50) if index != 4]
    for place, index in enumerate(kept):
        assert latents.questions(place) == latents.read_one(place).questions
        assert latents.questions(place) == of_every_third(index)
    assert isinstance(latents.questions(0)[0], Question)
    with pytest.raises(IndexError):
        latents.questions(49)
    names = [set(load_file(path)) for path in sorted((tmp_path / "a" / "set").glob("shard-*"))]
    assert [("questions" in found, "questions_offsets" in found) for found in names] == [
        *[(True, True)] * 2,
        *[(False, False)] * 2,
    ]


def test_a_set_without_questions_has_the_bytes_that_it_always_had(encode, tmp_path):
    encode()
    encode("b", source=Asking(lambda index: ()))
    plain = content(tmp_path / "a" / "set")
    assert plain == content(tmp_path / "b" / "set")
    latents = LatentSet.open(tmp_path / "a" / "set")
    assert not latents.has_questions
    assert latents.read_one(7).questions == latents.questions(7) == ()
    assert set(load_file(tmp_path / "a" / "set" / "shard-00000.safetensors")) == {
        *("mean", "offsets", "label", "key", "key_offsets", "caption", "caption_offsets")
    }


def test_a_set_without_captions_says_so(encode, tmp_path):
    class Silent(Holed):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), caption=None)

    encode(source=Silent())
    assert not LatentSet.open(tmp_path / "a" / "set").has_captions


def test_parts_with_and_without_questions_are_joined_example_by_example(encode):
    plan = encode()

    def part(*questions, count):
        return Encoded(
            mean=torch.zeros(1, count, 3),
            log_variance=None,
            lengths=torch.ones(count, dtype=torch.int64),
            labels=torch.zeros(count, dtype=torch.int64),
            captions=(None,) * count,
            keys=("",) * count,
            questions=questions,
        )

    joined = Encoded.join(plan, [part(count=2), part(ASKED, (), count=2), part(count=1)])
    assert joined.questions == ((), (), ASKED, (), ())


def cells(*texts):
    """The pair of tensors of a shard of 16 examples whose first cells are these."""
    parts = [text if isinstance(text, bytes) else text.encode() for text in texts]
    parts += [b""] * (16 - len(parts))
    return {
        "questions": torch.tensor([*b"".join(parts)], dtype=torch.uint8),
        "questions_offsets": torch.tensor([0, *map(len, parts)]).cumsum(0),
    }


@pytest.mark.parametrize(
    "cell",
    [
        *("{}", "3", "[", "null", '[["which?"]]', '[["which?", 3]]', '[["a", "b", "c"]]'),
        *("[" * 5000, '[["\\ud800", "a"]]', '["ab"]', b"\xff"),
    ],
)
def test_a_damaged_cell_names_its_file(encode, tmp_path, cell):
    encode()
    folder = tmp_path / "a" / "set"
    forge(folder, 1, **cells("", '[["which?", "one"]]', cell))
    latents = LatentSet.open(folder)
    assert latents.questions(16) == ()
    assert latents.questions(17) == (Question("which?", "one"),)
    for read in (latents.questions, latents.read_one):
        with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: questions 2 is no"):
            read(18)


@pytest.mark.parametrize(
    "changed",
    [
        {"questions_offsets": None},
        {"questions": None},
        {"questions": torch.zeros(19)},
        {"questions_offsets": torch.arange(17)},
    ],
)
def test_a_shard_with_half_of_its_questions_is_refused(encode, tmp_path, changed):
    encode()
    folder = tmp_path / "a" / "set"
    forge(folder, 1, **(cells('[["which?", "one"]]') | changed))
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors: "):
        LatentSet.open(folder)


# Folders


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them in a sub-folder; the first has a caption beside it."""
    for name in ("1.png", "2.png", "more/3.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (4, 4)).save(tmp_path / "data" / name)
    (tmp_path / "data" / "1.txt").write_text("from the text file")
    return tmp_path / "data"


def write_rows(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_metadata_gives_captions_and_questions_and_text_files_the_rest(folder):
    asked = [{"question": "how many?", "answer": "two"}]
    write_rows(
        folder,
        {"file_name": "2.png", "text": "a bear", "width": 4},
        "",
        {"file_name": "more/./3.png", "caption": ["two\nbears", " ", "a pair"], "questions": asked},
        {"file_name": "1.png", "questions": [{"question": " q ", "answer": ["b", "a", "a", ""]}]},
        {"file_name": "2.png", "text": None, "caption": "a brown bear", "questions": asked},
    )
    source = open_source(str(folder))
    found = [(source[index].caption, source[index].questions) for index in range(3)]
    assert found == [
        ("from the text file", (Question("q", "a"),)),
        ("a bear\na brown bear", (Question("how many?", "two"),)),
        ("two bears\na pair", (Question("how many?", "two"),)),
    ]


def test_metadata_may_begin_with_a_byte_order_mark_and_lies_in_the_folder_of_a_split(folder):
    PIL.Image.new("L", (4, 4)).save(folder / "more" / "4.png")
    split = folder.parent / "parts" / "train"
    split.parent.mkdir()
    (folder / "more").rename(split)
    (split / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name":"4.png","text":"four"}\r\n')
    source = open_source(str(split.parent))
    assert [source[index].caption for index in range(2)] == [None, "four"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "4.png", "text": "x"}, r"names '4\.png', which is no image of its folder"),
        ({"file_name": "../1.png"}, r"names '\.\./1\.png', which is no image"),
        ({"file_name": "/etc/passwd"}, "names '/etc/passwd', which is no image"),
        ({"file_name": "1.txt"}, "which is no image"),
        ({"file_name": "a\0b"}, "which is no image"),
        ('{"file_name": "1.png"', "is not of its form: Invalid JSON"),
        ("[" * 100_000, "is not of its form"),
        ("3", "is not of its form"),
        ({"text": "no file"}, "is not of its form: file_name: Field required"),
        ({"file_name": "1.png", "caption": 3}, "is not of its form: caption"),
        (
            {"file_name": "1.png", "questions": [{"question": "which?"}]},
            r"is not of its form: questions\.0\.answer: Field required",
        ),
    ],
)
def test_bad_metadata_is_one_sentence_with_file_and_line(folder, row, message):
    write_rows(folder, {"file_name": "1.png", "text": "fine"}, row)
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(folder))
    assert str(caught.value).startswith(f"Line 2 of {folder / 'metadata.jsonl'} ")
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_text_is_one_sentence(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.png"}')
    with pytest.raises(CorruptFileError, match=r"Line 1 of .*metadata\.jsonl is not of its form"):
        open_source(str(folder))


# Tables

TEXT = datasets.Value("string")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """``table(name=(feature, cells), ...)`` opens a parquet file with three images."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")

    def make(**columns):
        features = {"image": datasets.Image()} | {key: kind for key, (kind, _) in columns.items()}
        rows = {"image": [PIL.Image.new("L", (4, 4))] * 3}
        rows |= {key: values for key, (_, values) in columns.items()}
        (tmp_path / "data").mkdir()
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        made.to_parquet(str(tmp_path / "data" / "train-0.parquet"))
        source = open_source(str(tmp_path / "data"))
        return [source[index] for index in range(3)]

    return make


def test_lists_of_captions_are_lines(table):
    captions = [["one", "a\nfirst", ""], [], None]
    found = table(caption=(datasets.List(TEXT), captions))
    assert [example.caption for example in found] == ["one\na first", None, None]


def test_columns_of_a_question_and_an_answer(table):
    found = table(
        question=(TEXT, ["which?", None, "how many?"]), answer=(TEXT, ["one", "two", " "])
    )
    assert [example.questions for example in found] == [(Question("which?", "one"),), (), ()]


def test_the_most_frequent_answer_counts_and_of_equals_the_first(table):
    answers = [["two", "one", "one"], ["b", "a", "a", "b"], []]
    found = table(question=(TEXT, ["q"] * 3), answer=(datasets.List(TEXT), answers))
    assert [example.questions for example in found] == [
        *((Question("q", "one"),), (Question("q", "b"),), ())
    ]


def test_a_column_of_questions_goes_before_single_ones(table):
    pair = datasets.List({"question": TEXT, "answer": TEXT})
    rows = [
        [{"question": "a?", "answer": "a"}, {"question": "b?", "answer": "b"}],
        [{"question": "c?", "answer": None}],
        None,
    ]
    single = ["no"] * 3
    found = table(questions=(pair, rows), question=(TEXT, single), answer=(TEXT, single))
    assert [example.questions for example in found] == [
        *((Question("a?", "a"), Question("b?", "b")), (), ())
    ]


def test_a_question_without_a_column_of_answers_is_no_question(table):
    found = table(question=(TEXT, ["q"] * 3), answer=(datasets.Value("int64"), [1, 2, 3]))
    assert [example.questions for example in found] == [()] * 3
