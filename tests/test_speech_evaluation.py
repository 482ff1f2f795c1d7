import json
from pathlib import Path

import numpy as np
import pytest

from latentlm_core.data.audio import write_wav
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError
from latentlm_core.evaluation.recognition import normaliser
from latentlm_core.evaluation.speech import speaker_similarity, word_errors
from latentlm_core.evaluation.speech_drift import measure_drift, wer_by_part
from latentlm_core.evaluation.spoken_items import SpokenItem, read_spoken_items, write_scores
from latentlm_core.progress import SilentProgress

RATE = 8000


class Scribe:
    """Writes what it is told to, one line a recording."""

    name = "scribe"
    sample_rate = RATE

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)

    def transcribe(self, samples: np.ndarray, sample_rate: int) -> str:
        return self._lines.pop(0)


class Level:
    """Hears the mean of a recording as the angle of a voice, and none in silence."""

    name = "level"

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, samples: np.ndarray, sample_rate: int) -> np.ndarray | None:
        self.calls += 1
        angle = float(samples.mean())
        return np.array([np.cos(angle), np.sin(angle)], np.float32) if angle else None


class Ears(SilentProgress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def record(path: Path, *levels: float, seconds: float = 1.0) -> Path:
    """Write one constant after the other, ``seconds`` each."""
    size = round(seconds * RATE)
    write_wav(path, np.repeat(np.array(levels, np.float32), size), RATE)
    return path


def make_items(folder: Path, *texts: str, level: float = 0.25) -> list[SpokenItem]:
    return [
        SpokenItem(record(folder / f"{index}.wav", level), text, None, None, index)
        for index, text in enumerate(texts)
    ]


def test_both_word_error_rates(tmp_path: Path) -> None:
    items = make_items(tmp_path, "One two three four five six seven eight nine", "Hello!")
    scribe = Scribe("one two, three four five six seven eight nine", "yellow")
    report = word_errors(items, scribe, normaliser("basic"))
    assert report.values["wer"] == pytest.approx(0.1)
    assert report.values["wer_mean_utterance"] == pytest.approx(0.5)
    assert report.values["num_words"] == 10
    assert report.values["wer_low"] == 0.0
    assert report.values["wer_high"] == 1.0
    assert report.protocol.recogniser == "scribe"
    assert report.protocol.normaliser == "basic"
    assert report.protocol.versions["jiwer"]
    assert "rows" not in report.to_dict()


def test_errors_are_counted_by_kind_and_sample(tmp_path: Path) -> None:
    items = make_items(tmp_path, "a b c d", "e f", "g")
    report = word_errors(items, Scribe("a x d", "e and f", ""), normaliser("basic"))
    kinds = [(row.substitutions, row.deletions, row.insertions) for row in report.rows]
    assert kinds == [(1, 1, 0), (0, 0, 1), (0, 1, 0)]
    assert [row.wer for row in report.rows] == [0.5, 0.5, 1.0]
    totals = {name: report.values[name] for name in ("substitutions", "deletions", "insertions")}
    assert totals == {"substitutions": 1, "deletions": 2, "insertions": 1}
    assert report.values["wer"] == pytest.approx(4 / 7)


def test_the_interval_follows_from_the_seed(tmp_path: Path) -> None:
    items = make_items(tmp_path, *["a b c"] * 30)
    lines = ["a b c", "a x c", "x"] * 10

    def interval(seed: int) -> tuple[float, float]:
        values = word_errors(items, Scribe(*lines), normaliser("basic"), seed=seed).values
        assert values["wer_low"] < values["wer"] < values["wer_high"]
        return values["wer_low"], values["wer_high"]

    assert interval(0) == interval(0)
    low, high = interval(1)
    assert 0.2 < low < 0.4 < 0.5 < high < 0.65


def test_a_looping_recogniser_is_warned_of(tmp_path: Path) -> None:
    items, ears = make_items(tmp_path, "a b", "c"), Ears()
    report = word_errors(items, Scribe("a b b b b", "c"), normaliser("basic"), progress=ears)
    assert ears.warnings == list(report.warnings)
    assert report.warnings[0].startswith("1 of 2 transcripts")
    assert not word_errors(items, Scribe("a b b b", "c c"), normaliser("basic")).warnings


def test_a_text_without_words_is_refused(tmp_path: Path) -> None:
    items = make_items(tmp_path, "a", "...")
    with pytest.raises(DataError, match=r"1\.wav has no words"):
        word_errors(items, Scribe("a", ""), normaliser("basic"))
    with pytest.raises(DataError, match="no samples"):
        word_errors([], Scribe(), normaliser("basic"))


def test_similarity_with_prompt_and_original(tmp_path: Path) -> None:
    prompt, original = record(tmp_path / "p.wav", 0.5), record(tmp_path / "o.wav", 0.75)
    files = [record(tmp_path / f"{index}.wav", 0.25) for index in range(3)]
    items = [
        SpokenItem(files[0], "a", prompt, original, 0),
        SpokenItem(files[1], "b", prompt, None, 1),
        SpokenItem(files[2], "c", None, None, 2),
    ]
    encoder = Level()
    report = speaker_similarity(items, encoder)
    near, far = np.cos(0.25), np.cos(0.5)
    assert encoder.calls == 5, "a prompt is embedded once"
    assert [row.sim_original for row in report.rows] == [pytest.approx(far), None, None]
    assert report.values == {
        "sim_prompt": pytest.approx(near),
        "num_sim_prompt": 2,
        "sim_original": pytest.approx(far),
        "num_sim_original": 1,
        "sim_recording": pytest.approx(np.cos(0.25)),
        "num_sim_recording": 1,
    }
    assert report.protocol.encoder == "level"


def test_samples_without_a_voice_are_counted_apart(tmp_path: Path) -> None:
    prompt, ears = record(tmp_path / "p.wav", 0.5), Ears()
    files = [record(tmp_path / "0.wav", 0.5), record(tmp_path / "1.wav", 0.0)]
    items = [SpokenItem(file, "a", prompt, None, index) for index, file in enumerate(files)]
    report = speaker_similarity(items, Level(), progress=ears)
    assert report.values == {"sim_prompt": pytest.approx(1.0), "num_sim_prompt": 1}
    assert report.rows[1].sim_prompt is None
    assert len(ears.warnings) == 1
    assert "1 of 2 samples" in ears.warnings[0]


def test_similarity_with_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt or an original"):
        speaker_similarity(make_items(tmp_path, "a"), Level())


def test_word_errors_by_part_of_the_text(tmp_path: Path) -> None:
    items = make_items(tmp_path, "a b c d e f", "g h")
    heard = Scribe("a b x d e e", "g h i")
    parts = wer_by_part(word_errors(items, heard, normaliser("basic")).rows, num_parts=3)
    assert [part.num_words for part in parts] == [3, 3, 2]
    assert [part.errors for part in parts] == [0, 2, 1]
    assert [part.wer for part in parts] == [0.0, pytest.approx(2 / 3), 0.5]


def test_an_insertion_counts_at_the_word_that_it_stands_before(tmp_path: Path) -> None:
    items = make_items(tmp_path, "a b c d")
    rows = word_errors(items, Scribe("z a b c y d z z"), normaliser("basic")).rows
    parts = wer_by_part(rows, num_parts=5)
    assert [part.errors for part in parts] == [1, 0, 0, 3, 0]
    assert parts[4].wer is None
    assert sum(part.errors for part in parts) == rows[0].errors


def test_similarity_drifts_by_window(tmp_path: Path) -> None:
    prompt = record(tmp_path / "p.wav", 0.25)
    long = record(tmp_path / "0.wav", 0.25, 0.25, 0.75, 0.75, 0.5)
    short = record(tmp_path / "1.wav", 0.5, seconds=0.5)
    items = [SpokenItem(long, "a b", prompt, None, 0), SpokenItem(short, "c", prompt, None, 1)]
    understood = word_errors(items, Scribe("a x", "c"), normaliser("basic"))
    report = measure_drift(items, understood, Level(), num_parts=2, window_seconds=2.0)
    assert [row.start_seconds for row in report.rows] == [0.0, 2.0, 4.0, 0.0]
    means = [position.sim_prompt for position in report.sim_positions]
    assert means == [
        pytest.approx((1 + np.cos(0.25)) / 2, abs=1e-5),
        pytest.approx(np.cos(0.5), abs=1e-5),
        pytest.approx(np.cos(0.25), abs=1e-5),
    ]
    assert [position.num_files for position in report.sim_positions] == [2, 1, 1]
    assert [part.errors for part in report.wer_parts] == [0, 1]
    assert report.protocol.settings == {"num_parts": 2, "window_seconds": 2.0}
    assert (report.protocol.recogniser, report.protocol.encoder) == ("scribe", "level")
    windows = measure_drift(items, understood, Level(), window_seconds=3.0).rows
    assert [row.start_seconds for row in windows] == [0.0, 3.0, 0.0]
    windows = measure_drift(items, understood, Level(), window_seconds=4.0).rows
    assert [row.start_seconds for row in windows] == [0.0, 0.0], "a rest under half is left out"


def test_a_list_of_samples_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        record(folder / name, 0.5)
    prompt = record(tmp_path / "p.wav", 0.5)
    rows = [
        {"file": "a.wav", "text": "one\u2028two", "prompt": str(prompt), "seed": 3},
        {"file": "b.wav", "text": "three", "prompt": None, "original": "a.wav"},
    ]
    path = folder / "samples.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([lines[0], "", lines[1], ""]), "utf-8")
    first, second = read_spoken_items(folder)
    assert first == SpokenItem(folder / "a.wav", "one\u2028two", prompt, None, 0)
    assert second == SpokenItem(folder / "b.wav", "three", None, folder / "a.wav", 1)
    assert read_spoken_items(path) == [first, second]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, ArtifactError, "There is no list"),
        ("", DataError, "lists no samples"),
        ("{", CorruptFileError, "line 1 is not valid JSON"),
        ("[]", CorruptFileError, "line 1 must be an object"),
        ('{"file": "a.wav"}', DataError, "no text"),
        ('{"file": "a.wav", "text": " "}', DataError, "no text"),
        ('{"text": "a"}', DataError, "no audio"),
        ('{"file": 1, "text": "a"}', CorruptFileError, "`file` must be the path"),
        ('{"file": "b.wav", "text": "a"}', DataError, r"no file .*b\.wav for `file`"),
        ('{"file": "a.wav", "text": "a", "prompt": "c"}', DataError, "for `prompt`"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, content, error, says: str) -> None:
    record(tmp_path / "a.wav", 0.5)
    if content is not None:
        (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(error, match=says) as caught:
        read_spoken_items(tmp_path)
    assert str(caught.value).count("samples.jsonl") == 1


def test_audio_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    items = make_items(tmp_path, "a")
    items[0].file.write_bytes(b"RIFF")
    with pytest.raises(CorruptFileError, match=r"0\.wav"):
        word_errors(items, Scribe("a"), normaliser("basic"))


def test_scores_are_rows_with_their_file(tmp_path: Path) -> None:
    items = make_items(tmp_path, "déjà vu", "b")
    report = word_errors(items, Scribe("déjà", "b"), normaliser("basic"))
    write_scores(tmp_path / "wer.jsonl", report.rows)
    lines = (tmp_path / "wer.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["file"] for row in rows] == [str(item.file) for item in items]
    assert rows[0]["hypothesis"] == "déjà"
    assert rows[0]["deletions"] == 1
    assert rows[0]["wer"] == 0.5


def test_the_hash_is_of_the_audio(tmp_path: Path) -> None:
    def digest(level: float) -> str:
        items = make_items(tmp_path, "a", level=level)
        return word_errors(items, Scribe("a"), normaliser("basic")).protocol.samples_sha256

    assert digest(0.5) == digest(0.5) != digest(0.25)
