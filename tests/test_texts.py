"""Text data: what each kind of set holds, what is held out of it, and how it goes on for ever."""

import json
import tracemalloc

import datasets
import pytest

from latentlm_core.data import text_sources, text_stream
from latentlm_core.data.texts import TextItem, open_endless_texts, open_texts
from latentlm_core.errors import DataError

datasets.disable_progress_bars()
DOCUMENTS = [f"Document {number} says {'so ' * (number % 5)}much." for number in range(45)]
HELD_OUT = DOCUMENTS[::20]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def write_jsonl(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts), "utf-8")
    return str(path)


def write_csv(path, texts):
    rows = [f'{index},"{text}"' for index, text in enumerate(texts)]
    path.write_text("\n".join(["id,text", *rows]), "utf-8")
    return str(path)


def write_folder(path, texts):
    for index, text in enumerate(texts):
        (path / f"{index:03d}.{'md' if index % 2 else 'txt'}").write_text(text, "utf-8")
    return str(path)


def write_parquet(path, texts, name="part-0", column="text"):
    table = datasets.Dataset.from_dict({"id": list(range(len(texts))), column: texts})
    table.to_parquet(path / f"{name}.parquet")
    return str(path)


def written(kind, root, texts):
    match kind:
        case "jsonl":
            return write_jsonl(root / "it.jsonl", texts)
        case "csv":
            return write_csv(root / "it.csv", texts)
        case "folder":
            return write_folder(root, texts)
    return write_parquet(root, texts)


every_kind = pytest.mark.parametrize("kind", ["jsonl", "csv", "folder", "parquet"])


def texts(items):
    return [item.text for item in items]


def first(sequence, count):
    return [sequence[place].text for place in range(count)]


@every_kind
def test_each_kind_gives_its_documents(root, kind):
    spec = written(kind, root, DOCUMENTS)
    assert texts(open_texts(spec)) == HELD_OUT
    assert texts(open_texts(spec, "train")) == [t for t in DOCUMENTS if t not in HELD_OUT]


@every_kind
def test_an_epoch_is_every_document_that_is_not_held_out(root, kind):
    spec = written(kind, root, DOCUMENTS)
    endless = open_endless_texts(spec, 7, 0.5)
    epochs = [[endless[42 * epoch + place].text for place in range(42)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(set(DOCUMENTS) - set(HELD_OUT))
    assert epochs[0] != epochs[1]
    assert texts(endless.held_out) == HELD_OUT
    assert endless.name == spec


def test_a_place_follows_from_the_seed_alone(root):
    spec = written("jsonl", root, DOCUMENTS)
    whole = first(open_endless_texts(spec, 7, 0.1), 100)
    assert open_endless_texts(spec, 7, 0.1)[77].text == whole[77]
    assert first(open_endless_texts(spec, 8, 0.1), 100) != whole


def test_the_share_bounds_what_validates_and_not_what_is_held_out(root):
    spec = written("jsonl", root, DOCUMENTS)
    sizes = {share: len(open_endless_texts(spec, 0, share).held_out) for share in (0.0, 0.01, 0.05)}
    assert sizes == {0.0: 0, 0.01: 1, 0.05: 2}
    trained = {text for share in sizes for text in first(open_endless_texts(spec, 0, share), 42)}
    assert trained == set(DOCUMENTS) - set(HELD_OUT)


@every_kind
def test_empty_documents_are_left_out(root, kind):
    spec = written(kind, root, ["a", "", "b", " ", "", *["c"] * 20, "\t"])
    assert texts(open_texts(spec)) == ["a", "c"]
    assert set(first(open_endless_texts(spec, 0, 0.5), 60)) == {"b", "c"}
    nothing = root / "nothing"
    nothing.mkdir()
    with pytest.raises(DataError, match="text"):
        open_endless_texts(written(kind, nothing, [" ", " "]), 0, 0.1)[0]


def test_pydoc_is_in_every_installation():
    train, test = open_texts("pydoc", "train"), open_texts("pydoc")
    assert sum(len(item.text) for item in (*train, *test)) > 400_000
    assert len(train) > 15 * len(test) > 0
    assert "assert" in (*texts(test), *texts(train))[0]
    assert open_endless_texts("pydoc", 0, 0.05).held_out[0] == test[0]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_the_end_of_the_only_document_is_held_out(root, suffix):
    path = root / f"book{suffix}"
    path.write_text("".join(f"Line {number}.\n" for number in range(100)), "utf-8")
    (kept,), (held,) = open_texts(str(path), "train"), open_texts(str(path))
    assert kept.text + held.text == path.read_text("utf-8")
    assert held.text.startswith("Line ")
    assert 3 <= held.text.count("\n") <= 7
    assert (kept.key, held.key) == (f"book{suffix}", f"book{suffix}#end")
    endless = open_endless_texts(str(path), 0, 0.05)
    assert endless[0] == endless[3] == kept
    assert list(endless.held_out) == [held]
    (whole,) = open_texts(str(path), "all")
    assert whole == TextItem(kept.text + held.text, kept.key)


def test_one_line_is_parted_too(root):
    (root / "a.txt").write_text("ab " * 100)
    (kept,), (held,) = open_texts(str(root / "a.txt"), "train"), open_texts(str(root / "a.txt"))
    assert (len(kept.text), len(held.text)) == (285, 15)
    (root / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt is too short"):
        open_texts(str(root / "a.txt"))


def test_a_folder_is_read_to_its_bottom_and_not_where_it_is_hidden(root):
    for name in ("b.txt", "a/z.md", "a/deep/er.txt", ".git/x.txt", "a/.x.md", "a/x.rst"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    items = [*open_texts(str(root)), *open_texts(str(root), "train")]
    assert items == [TextItem(name, name) for name in ("a/deep/er.txt", "a/z.md", "b.txt")]


def test_the_split_of_a_set_is_held_out_where_it_has_one(root):
    for split, count in (("train", 8), ("val", 4)):
        (root / "folder" / split).mkdir(parents=True)
        for number in range(count):
            (root / "folder" / split / f"{number}.txt").write_text(f"{split} {number}")
    write_parquet(root, [f"train {number}" for number in range(8)], "train-0")
    write_parquet(root, [f"val {number}" for number in range(4)], "validation-0")
    for spec in (str(root / "folder"), str(root)):
        assert texts(open_texts(spec)) == [f"val {number}" for number in range(4)]
        endless = open_endless_texts(spec, 0, 0.2)
        assert set(first(endless, 8)) == {f"train {number}" for number in range(8)}
        assert texts(endless.held_out) == ["val 0", "val 2"]
        with pytest.raises(DataError, match="parted already, into train and test"):
            open_texts(spec, "all")


def test_texts_that_are_no_utf8_are_read_all_the_same(root):
    (root / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9\r\n" * 2)
    assert open_texts(str(root / "a.txt"), "train")[0].text == "caf�\n"
    (root / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "caf\xe9 \\ud800"}\r\n')
    assert open_texts(str(root / "a.jsonl"), "train")[0].text == "caf� �"
    (root / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\nx\r\ncaf\xe9\r\n")
    assert open_texts(str(root / "a.csv"), "train")[0].text == "caf�"


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_cells_of_a_csv_hold_commas_quotes_and_line_ends(root, monkeypatch, chunk):
    monkeypatch.setattr(text_sources, "_CHUNK", chunk)
    path = root / "a.csv"
    path.write_text('a,Text,text\n0,no,first\n1,"n\no","a ""b"",\nc\n"\n\n2,no,last', newline="")
    train = open_texts(str(path), "train")
    assert texts(train) == ['a "b",\nc\n', "last"]
    assert train[1].key == "00000003"


def test_cells_of_a_csv_may_be_long(root):
    spec = write_csv(root / "a.csv", ["x", "long " * 100_000])
    assert len(open_texts(spec, "train")[0].text) == 500_000


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_lines_are_found_across_chunks(root, monkeypatch, chunk):
    monkeypatch.setattr(text_sources, "_CHUNK", chunk)
    spec = write_jsonl(root / "a.jsonl", DOCUMENTS[:5])
    assert texts(open_texts(spec, "train")) == DOCUMENTS[1:5]
    (root / "a.jsonl").write_text((root / "a.jsonl").read_text()[:-1])
    assert texts(open_texts(spec, "train")) == DOCUMENTS[1:5]


def test_a_long_jsonl_is_not_held_in_memory(root):
    spec = write_jsonl(root / "a.jsonl", ["text " * 2000] * 2000)
    tracemalloc.start()
    endless = open_endless_texts(spec, 0, 0.01)
    assert endless[1234].text.startswith("text text")
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (root / "a.jsonl").stat().st_size > 20_000_000
    assert used < 2_000_000


@pytest.mark.parametrize("column", ["text", "content", "article"])
def test_usual_names_of_columns_are_known(root, column):
    write_parquet(root, DOCUMENTS, column=column)
    assert texts(open_texts(str(root))) == HELD_OUT
    line = json.dumps({"id": 1, "url": "u", column: "a"})
    (root / "a.jsonl").write_text(f"\n{line}\n{line}")
    assert texts(open_texts(str(root / "a.jsonl"), "train")) == ["a", "a"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"id": 1, "words": "x"}', "no text column; it has: id, words"),
        ("a.jsonl", '{"id": 1, "text": 2}', "no text column; it has: id, text"),
        ("a.jsonl", "\n\n", "no text column; it has: nothing"),
        ("a.jsonl", "{}\n", "no text column; it has: nothing"),
        ("a.csv", "id,words\n1,x", "no text column; it has: id, words"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y}\n', "a.jsonl, line 3 is no JSON"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', "a.jsonl, line 2 is no JSON object"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2: text is no text"),
        ("a.jsonl", '{"text": "x"}\n{"text": 0}\n', "a.jsonl, line 2: text is no text"),
        ("a.csv", "id,text\n1,x\n2,y,z\n", "a.csv, row 3 has 3 cells, not 2"),
        ("a.csv", 'id,text\n1,x\n2,5" wide\n3,6" wide\n', "a.csv, row 3 is no CSV"),
        ("a.csv", 'id,text\n1,x\n2,"never closed\n', "a.csv, row 3 is no CSV"),
        ("a.csv", "id,text\n", "no documents to train on"),
        ("a.jsonl", "", "is empty"),
        ("a.docx", "x", r"no file of texts, whose names end in \.txt, \.md, \.jsonl, \.csv"),
        ("a.txt", " \n" * 50, "too short to hold some of it out"),
        ("a.parquet", "PAR1", "no file of texts"),
    ],
)
def test_what_is_broken_is_named(root, name, content, reason):
    (root / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        open_texts(str(root / name), "train")


def test_a_table_without_text_names_its_columns(root):
    write_parquet(root, [1, 2, 3])
    for spec in (str(root), f"stream:{root}"):
        with pytest.raises(DataError, match="no text column; it has: id, text") as caught:
            open_texts(spec)
        assert "article" in caught.value.hint


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_a_damaged_table_is_one_sentence(root, prefix):
    (root / "a.parquet").write_bytes(b"PAR1" * 10)
    with pytest.raises(DataError, match="set cannot be read"):
        open_texts(f"{prefix}{root}")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("pydocs", "no set of texts 'pydocs'. Did you mean pydoc"),
        ("", "no set of texts ''"),
        ("stream:", "not of the form stream:hf:ORG/NAME"),
        ("nowhere/at/all", "no file or folder nowhere/at/all"),
        ("absent.txt", "no file or folder absent.txt"),
        ("hf:", "not of the form hf:ORG/NAME"),
        ("hf:a/b/c", "not of the form hf:ORG/NAME"),
        ("stream:hf:a/b/c", "not of the form hf:ORG/NAME"),
        ("stream:pydoc", "not of the form stream:hf:ORG/NAME"),
        ("stream:set", "no parquet files"),
        ("set", "holds no .txt, .md or .parquet files"),
    ],
)
def test_a_name_that_stands_for_nothing(root, spec, reason):
    for open_it in (open_texts, lambda name: open_endless_texts(name, 0, 0.1)):
        with pytest.raises(DataError, match=reason):
            open_it(spec)


def test_there_is_no_other_split():
    with pytest.raises(DataError, match=r"no split 'tset'\. Did you mean test"):
        open_texts("pydoc", "tset")


def test_slices_of_texts_are_texts(root):
    found = open_texts(written("jsonl", root, DOCUMENTS), "train")
    assert texts(found[2:4]) == [found[2].text, found[3].text]
    assert found[-1].text == DOCUMENTS[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_set_of_the_hub_opens_by_name(tmp_path, stream):
    """A local folder of the form ORG/NAME stands in for a repository on the hub."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write_parquet(folder, DOCUMENTS, "train-00000")
    write_parquet(folder, ["held"] * 3, "test-00000")
    spec = f"{'stream:' if stream else ''}hf:org/name"
    assert texts(open_texts(spec)) == ["held"] * 3
    assert set(first(open_endless_texts(spec, 0, 0.1), 45)) == set(DOCUMENTS)
    with pytest.raises(DataError, match=r"no split 'trian'\. Did you mean train"):
        open_texts(f"{spec}:trian")


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_a_set_of_the_hub_without_a_split_to_train_on(tmp_path, prefix):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write_parquet(folder, DOCUMENTS, "test-00000")
    with pytest.raises(DataError, match=r"no split 'train'\. Known: test"):
        open_endless_texts(f"{prefix}hf:org/name", 0, 0.1)


def test_a_split_that_is_named_is_the_whole_set(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write_parquet(folder, ["other"] * 3, "train-00000")
    write_parquet(folder, DOCUMENTS, "test-00000")
    assert texts(open_texts("hf:org/name:test")) == HELD_OUT


@pytest.fixture
def stream(root, monkeypatch):
    """Fifty documents, of which two are empty, in two files; the first ten are held out."""
    monkeypatch.setattr(text_stream, "NUM_HELD_OUT", 10)
    write_parquet(root, ["", *map(str, range(20))], "a")
    write_parquet(root, [*map(str, range(20, 40)), " ", *map(str, range(40, 48))], "b")
    return f"stream:{root}"


def test_a_stream_is_read_in_order_and_begins_again(stream):
    endless = open_endless_texts(stream, 3, 0.1)
    expected = [str(number) for number in range(10, 48)]
    assert first(endless, 3 * 38) == expected * 3
    assert texts(endless.held_out) == [str(number) for number in range(10)]
    assert endless.held_out == open_texts(stream)


def test_a_stream_is_found_again_at_any_place(stream):
    for place in (0, 1, 37, 38, 75, 76, 500):
        endless = open_endless_texts(stream, 3, 0.1)
        assert [endless[p].text for p in (place, place, place + 1, 5)] == [
            str(10 + p % 38) for p in (place, place, place + 1, 5)
        ]


def test_a_stream_is_not_read_again_to_go_on(stream, monkeypatch):
    endless = open_endless_texts(stream, 3, 0.1)
    opened = []
    read = text_stream._read
    monkeypatch.setattr(text_stream, "_read", lambda *given: opened.append(1) or read(*given))
    first(endless, 38)
    assert not opened
    assert (endless[38].text, endless[37].text, len(opened)) == ("10", "47", 1)


def test_what_a_stream_holds_out_may_not_validate(stream):
    endless = open_endless_texts(stream, 3, 0.0)
    assert (endless[0].text, len(endless.held_out)) == ("10", 0)


def test_a_stream_with_a_test_split_holds_nothing_else_out(root, monkeypatch):
    monkeypatch.setattr(text_stream, "NUM_HELD_OUT", 10)
    write_parquet(root, DOCUMENTS, "train")
    write_parquet(root, [*map(str, range(20))], "test")
    endless = open_endless_texts(f"stream:{root}", 0, 0.1)
    assert first(endless, 45) == DOCUMENTS
    assert texts(endless.held_out) == [str(number) for number in range(10)]


def test_a_stream_that_is_held_out_whole_cannot_be_trained_on(root):
    write_parquet(root, DOCUMENTS)
    with pytest.raises(DataError, match="no more than 256 documents"):
        open_endless_texts(f"stream:{root}", 0, 0.1)[0]
    with pytest.raises(DataError, match="only the split 'test'"):
        open_texts(f"stream:{root}", "train")


def test_a_stream_whose_columns_are_unknown_is_read_by_its_first_row(monkeypatch):
    monkeypatch.setattr(text_stream, "NUM_HELD_OUT", 1)
    table = datasets.IterableDataset.from_generator(
        lambda: ({"id": n, "content": str(n)} for n in range(4))
    )
    assert table.features is None
    assert first(text_stream.StreamedTexts(table, None, "it"), 4) == ["1", "2", "3", "1"]
