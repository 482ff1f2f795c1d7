import json

import datasets
import numpy as np
import pytest
import soundfile

from latentlm_core.data import digit_strings
from latentlm_core.data.audio import write_wav
from latentlm_core.data.base import Clip
from latentlm_core.data.digit_strings import DIGITS, DigitStringSource
from latentlm_core.data.speech_sources import (
    open_speech,
    open_speech_with_held_out,
    pair_reference,
)
from latentlm_core.data.synthetic_speech import sentences
from latentlm_core.errors import DataError, MissingExtraError

RATE = 8000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def tone(value=1, seconds=0.2):
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.01 * value * np.sin(2 * np.pi * 300 * time)).astype(np.float32)


@pytest.fixture
def write(root):
    """Write a small tone, and its transcript where one is given, under tmp_path/data."""

    def one(name, text=None, suffix=".txt", value=1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".flac":
            soundfile.write(path, tone(value), RATE)
        else:
            write_wav(path, tone(value), RATE)
        if text is not None:
            path.with_suffix(suffix).write_text(text, "utf-8")
        return path

    return one


def keys(source):
    return [source[index].key for index in range(len(source))]


def texts(source):
    return [source[index].text for index in range(len(source))]


def speakers(source):
    labels = [source[index].speaker for index in range(len(source))]
    return [None if label is None else source.classes[label] for label in labels]


def test_librispeech_reads_transcripts_and_speakers(root, write):
    for speaker, chapter, part in [
        *[("61", "7", "train-clean-100"), ("100", "8", "train-clean-360")],
        *[("19", "5", "test-clean"), ("20", "5", "dev-clean")],
    ]:
        write(f"{part}/{speaker}/{chapter}/{speaker}-{chapter}-0000.flac")
        write(f"{part}/{speaker}/{chapter}/{speaker}-{chapter}-0001.flac")
        lines = f"{speaker}-{chapter}-0000 ONE TWO\n{speaker}-{chapter}-0001 THREE\n"
        table = root / part / speaker / chapter / f"{speaker}-{chapter}.trans.txt"
        table.write_text(lines)
    train, test = open_speech_with_held_out(f"librispeech:{root}")
    assert keys(train)[::2] == ["61/7/61-7-0000.flac", "100/8/100-8-0000.flac"]
    assert texts(train) == ["ONE TWO", "THREE"] * 2
    assert (train.classes, speakers(train)) == (("100", "61"), ["61", "61", "100", "100"])
    assert (keys(test)[0], speakers(test)) == ("19/5/19-5-0000.flac", ["19", "19"])
    part = open_speech(f"librispeech:{root / 'test-clean'}")
    assert keys(part) == keys(test)
    assert keys(open_speech(str(root), "test")) == keys(test)


def test_libritts_reads_the_normalised_texts(root, write):
    path = write("test-clean/19/5/19_5_000_001.wav", "It is one.", ".normalized.txt")
    path.with_suffix(".original.txt").write_text("It is 1.")
    source = open_speech(f"libritts:{root / 'test-clean'}")
    assert (texts(source), speakers(source)) == (["It is one."], ["19"])
    with pytest.raises(DataError, match="has no split 'train'"):
        open_speech(f"libritts:{root}")


def test_ljspeech_reads_the_normalised_column_and_quotes_as_they_are(root, write):
    write("wavs/LJ001-0001.wav"), write("wavs/LJ001-0002.wav")
    rows = ['LJ001-0001|He said "4|He said "four', "LJ001-0002|two|"]
    (root / "metadata.csv").write_text("\n".join(rows) + "\n", "utf-8")
    source = open_speech(f"ljspeech:{root}")
    assert keys(source) == ["wavs/LJ001-0001.wav", "wavs/LJ001-0002.wav"]
    assert texts(source) == ['He said "four', "two"]
    assert (source.classes, source[1].speaker) == (("lj",), 0)
    rest, held = open_speech_with_held_out(str(root))
    assert (len(rest), len(held)) == (1, 1)


def test_one_folder_a_speaker_and_a_flat_folder(root, write):
    write("bo/2.wav", "zwei\n"), write("bo/1.wav"), write("al/x/3.flac", " drei ")
    source = open_speech(f"folder:{root}")
    assert keys(source) == ["al/x/3.flac", "bo/1.wav", "bo/2.wav"]
    assert texts(source) == ["drei", None, "zwei"]
    assert speakers(source) == ["al", "bo", "bo"]
    flat = open_speech(str(root / "bo"))
    assert (flat.classes, speakers(flat), texts(flat)) == ((), [None, None], [None, "zwei"])
    clip = flat[1]
    assert (clip.sample_rate, clip.samples.dtype, clip.samples.shape) == (RATE, np.float32, (1600,))


def test_split_folders_are_found(root, write):
    write("train/al/1.wav"), write("test/al/2.wav")
    train, test = open_speech_with_held_out(str(root))
    assert (keys(train), keys(test)) == (["al/1.wav"], ["al/2.wav"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_name_files_texts_and_speakers(root, write, kind):
    write("clips/1.wav", "beside"), write("clips/2.wav", "beside")
    rows = [
        {"file_name": "clips/2.wav", "transcript": "hello, there", "speaker_id": 7},
        {"file_name": "clips/../clips/1.wav", "transcript": "", "speaker_id": ""},
    ]
    mark = {"csv": ",", "tsv": "\t"}.get(kind)
    if kind == "jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        cells = [list(rows[0]), *[[f'"{cell}"' for cell in row.values()] for row in rows]]
        lines = ["\ufeff" + mark.join(cells[0]), *[mark.join(row) for row in cells[1:]]]
    table = root / f"metadata.{kind}"
    table.write_text("\n".join(lines) + "\n", "utf-8")
    for spec in (str(root), str(table)):
        source = open_speech(spec)
        assert keys(source) == ["clips/2.wav", "clips/1.wav"]
        assert texts(source) == ["hello, there", "beside"]
        assert (source.classes, speakers(source)) == (("7",), ["7", None])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            "path\n../secret.wav\n",
            r"Row 2 of .*names '\.\./secret\.wav', which is not",
        ),
        ("metadata.csv", "path\n/etc/passwd\n", "is not inside the folder"),
        ("metadata.jsonl", '{"path": "a/../../x.wav"}', "Row 1 of .*is not inside the folder"),
        (
            "metadata.csv",
            "sound,text\n1.wav,one\n",
            "Row 2 of .*names no file; it has: sound, text",
        ),
        ("metadata.jsonl", '{"path": "1.wav"}\n[1]\n', "Row 2 of .*is no JSON object"),
        ("metadata.jsonl", "[" * 100_000, "Row 1 of .*is no JSON object"),
        ("metadata.csv", "path\n" + "x" * 200_000, "Row 2 of .*is broken"),
        ("metadata.csv", b"path\n\xff\xfe.wav\n", "is not UTF-8 text"),
        ("metadata.csv", "", "holds no recordings"),
    ],
)
def test_a_bad_table_is_one_sentence(root, name, content, message):
    root.mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    (root / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        open_speech(str(root))
    assert "\n" not in str(caught.value)


def test_ljspeech_rows_stay_in_their_folder(root):
    (root / "wavs").mkdir(parents=True)
    (root / "metadata.csv").write_text("../../secret|one|one\n")
    with pytest.raises(DataError, match="is not inside the folder"):
        open_speech(str(root))
    (root / "metadata.csv").write_text("a|one|one\nno text\n")
    with pytest.raises(DataError, match=r"Row 2 of .* is not ID\|TEXT"):
        open_speech(str(root))


def test_missing_and_broken_files_are_found_when_they_are_read(root, write):
    write("1.wav").write_bytes(b"")
    (root / "metadata.csv").write_text("path\n1.wav\n2.wav\n")
    source = open_speech(str(root))
    with pytest.raises(DataError, match=r"^1\.wav is empty\.$"):
        source[0]
    with pytest.raises(DataError, match=r"^2\.wav is not there"):
        source[1]


def parquet(path, names, root, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": (root / name).read_bytes(), "path": None} for name in names]
    table = datasets.Dataset.from_dict({"sound": cells} | columns)
    table.cast_column("sound", datasets.Audio(decode=False)).to_parquet(str(path))


def test_parquet_folder_finds_audio_text_and_speaker(root, write, tmp_path):
    write("1.wav", value=1), write("2.wav", value=2)
    parquet(
        tmp_path / "set" / "train-0.parquet",
        ["1.wav", "2.wav"],
        root,
        transcription=["one", None],
        speaker_id=[7, 5],
    )
    parquet(tmp_path / "set" / "test-0.parquet", ["2.wav"], root, speaker=["x"])
    train, test = open_speech_with_held_out(str(tmp_path / "set"))
    assert (keys(train), texts(train)) == (["00000000", "00000001"], ["one", None])
    assert (train.classes, speakers(train)) == (("5", "7"), ["7", "5"])
    assert train[1].samples.max() == pytest.approx(0.02, abs=1e-3)
    assert (len(test), speakers(test), texts(test)) == (1, ["x"], [None])


def test_parquet_reads_no_file_outside_of_its_folder(root, write, tmp_path):
    secret = write("1.wav")
    folder = tmp_path / "set"
    folder.mkdir()
    inner = folder / "2.wav"
    inner.write_bytes(secret.read_bytes())
    cells = [{"bytes": None, "path": str(path)} for path in (secret, "../data/1.wav", "2.wav")]
    datasets.Dataset.from_dict({"audio": cells}).to_parquet(str(folder / "x.parquet"))
    source = open_speech(str(folder))
    for index in (0, 1):
        with pytest.raises(DataError, match=r"^0000000\d names .* is not inside the folder"):
            source[index]
    assert len(source[2].samples) == 1600


def test_a_parquet_file_without_audio_lists_what_it_has(root):
    root.mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(root / "x.parquet"))
    with pytest.raises(DataError, match="no audio column; it has: text"):
        open_speech(str(root))


def test_a_set_of_the_datasets_library_opens_by_name(root, write, tmp_path, monkeypatch):
    """A local folder of the form ORG/NAME stands in for a repository on the hub."""
    write("1.wav"), write("2.wav")
    words = tmp_path / "org" / "words"
    parquet(words / "train-0.parquet", ["1.wav", "2.wav"], root, sentence=["a", "b"])
    parquet(words / "test-0.parquet", ["2.wav"], root, sentence=["c"])
    monkeypatch.chdir(tmp_path)
    train, test = open_speech_with_held_out("hf:org/words")
    assert (texts(train), texts(test)) == (["a", "b"], ["c"])
    assert test[0].samples.shape == (1600,)
    assert len(open_speech("hf:org/words:test")) == 1
    with pytest.raises(DataError, match=r"no split 'tset'\. Did you mean test"):
        open_speech("hf:org/words:tset")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hibary", "Did you mean hibari"),
        ("spoken-digit", "Did you mean spoken-digits"),
        ("./nowhere", r"no folder of recordings, and no table of them, \./nowhere"),
        ("folder:nowhere", "no folder nowhere"),
        ("nowhere.csv", "no set of recordings"),
        ("embedded:shapes", "is a set of images, and recordings are wanted"),
        ("hf:a/b/c", "hf:ORG/NAME"),
        ("spoken-digits:nowhere", "spoken-digits: there is no folder nowhere"),
        ("digit-strings:nowhere", "there is no folder nowhere"),
        ("x" * 5000, "no set of recordings"),
        ("a\0b", "no set of recordings"),
    ],
)
def test_unknown_names_get_one_sentence(spec, message):
    with pytest.raises(DataError, match=message):
        open_speech(spec)


def test_unknown_split_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no split 'trian'.*train"):
        open_speech("hibari", "trian")
    with pytest.raises(DataError, match="holds no recordings"):
        open_speech(str(tmp_path))


def test_spoken_digits_lie_where_the_environment_says(shared_data, monkeypatch):
    monkeypatch.setenv("LATENTLM_SPOKEN_DIGITS", str(shared_data("spoken-digits")))
    train, test = open_speech_with_held_out("spoken-digits")
    assert (len(train), len(test)) == (2700, 300)
    assert train.classes == ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    assert (train[0].text, train.classes[train[0].speaker]) == ("one", "george")
    assert train[0].sample_rate == 8000


class Takes:
    """Three takes of every digit by two speakers; the amplitude tells digit and speaker."""

    name, classes = "takes", ("al", "bo")

    def __len__(self):
        return 60

    def __getitem__(self, index):
        speaker, digit = index % 2, index // 2 % 10
        silence = np.zeros(400, np.float32)
        samples = np.concatenate([silence, tone(5, 0.2 + 0.01 * digit + 0.2 * speaker), silence])
        return Clip(samples, RATE, DIGITS[digit], speaker, f"{index}.wav")


def test_digit_strings_are_composed_of_takes_of_one_speaker():
    source = DigitStringSource(Takes(), "train")
    assert (len(source), len(DigitStringSource(Takes(), "test"))) == (6000, 400)
    lengths = set()
    for index in range(60):
        clip = source[index]
        assert (clip.key, clip.speaker) == (f"digits-{index:06d}", (index + index // 2) % 2)
        digits = clip.text.split()
        lengths.add(len(digits))
        spoken = sum(0.2 + 0.01 * DIGITS.index(word) + 0.2 * clip.speaker for word in digits)
        pauses = len(clip.samples) / RATE - spoken - 2 * digit_strings.MARGIN_SECONDS
        least, most = (gap * (len(digits) - 1) for gap in digit_strings.GAP_SECONDS)
        assert least - 0.001 <= pauses <= most + 0.02 * len(digits) + 1e-6
    assert lengths == {1, 2, 3, 4, 5, 6, 7}
    test = DigitStringSource(Takes(), "test")
    assert {len(test[index].text.split()) for index in range(60)} == {3, 4, 5, 6, 7}


def test_digit_strings_are_the_same_each_time_and_differ_by_split():
    train, again, test = (DigitStringSource(Takes(), split) for split in ("train", "train", "test"))
    assert np.array_equal(train[17].samples, again[17].samples)
    assert [train[i].text for i in range(9)] != [test[i].text for i in range(9)]
    assert len({train[index].text for index in range(60)}) > 50


def test_takes_that_are_no_digits_or_too_few_are_refused():
    class Wrong(Takes):
        def __getitem__(self, index):
            clip = super().__getitem__(index)
            return Clip(clip.samples, RATE, "ten" if index == 4 else clip.text, 0, clip.key)

    with pytest.raises(DataError, match=r"takes: 4\.wav is no digit of a speaker, but 'ten'"):
        DigitStringSource(Wrong(), "train")

    class Few(Takes):
        def __len__(self):
            return 18

    with pytest.raises(DataError, match="every digit of every speaker: al says no nine"):
        DigitStringSource(Few(), "train")


def test_the_sentences_are_many_and_those_held_out_are_others():
    train, test = sentences()
    assert (len(train), len(test)) == (988, 100)
    assert len(set(train) | set(test)) == 1088
    assert not set(test) & set(train)
    assert max(len(phrase.split()) for phrase in train[800:]) <= 4
    words = {word for text in train for word in text.split()}
    assert len(words) <= 60
    assert {word for text in test for word in text.split()} <= words
    assert 150 < sum(text.split()[0] in DIGITS for text in train[:800]) < 250


def test_hibari_names_the_extra_when_its_package_is_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="hibari") as caught:
        open_speech("hibari")
    assert "latentlm[demo]" in caught.value.hint


def test_hibari_reads_its_sentences_aloud_the_same_each_time():
    pytest.importorskip("hibari", reason="the extra demo is not installed")
    train, test = open_speech_with_held_out("hibari")
    assert (len(train), len(test), train.classes) == (988, 100, ("hibari",))
    clip, again = test[3], open_speech("hibari", "test")[3]
    assert (clip.key, clip.sample_rate, clip.speaker) == ("test-003", 24_000, 0)
    assert clip.text == again.text == sentences()[1][3]
    assert np.array_equal(clip.samples, again.samples)
    assert np.array_equal(clip.samples, test[3].samples)
    assert 1.0 < len(clip.samples) / 24_000 < 4.0


def test_references_are_the_speakers_previous_recordings():
    assert pair_reference([0, 1, 0, 0, 1, 2]) == [3, 4, 0, 2, 1, 5]
    assert pair_reference([None, 0, None]) == [2, 1, 0]
    assert pair_reference([]) == []
