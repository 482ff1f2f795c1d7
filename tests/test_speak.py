"""Text to speech on a tiny real path: files, resuming, streaming, watches, the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
)
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.workflows.speaking import _Utterance
from latentlm_core.workflows.watch import WATCH_EVERY, max_latents
from tests.tiny_speaking import (
    HOP,
    RATE,
    SPEAKERS,
    STEP,
    audio_of,
    make_home,
    rows_of,
    speak,
    speaking_of,
    stem,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _workspace(home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(home))


def same(first: Path, second: Path) -> None:
    a, b = audio_of(first), audio_of(second)
    assert len(a) == len(b)
    assert np.abs(a - b).max() <= STEP


# --- texts -----------------------------------------------------------------------------------


def test_texts_are_said_in_turn_and_their_rows_tell_how(home, tmp_path):
    texts = ["three one four", "nine"]
    made = speak(tmp_path / "s", texts=texts, num_samples=2)
    rows = rows_of(tmp_path / "s")
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["text"] for row in rows] == texts * 2
    bounds = speaking_of(home).bounds
    for row in rows:
        audio = audio_of(tmp_path / "s" / row["file"])
        assert row["file"] == stem(row["index"])
        assert len(audio) == row["latents"] * HOP
        assert row["seconds"] == round(len(audio) / RATE, 3)
        assert row["latents"] <= max_latents(row["text"], bounds)
        assert (row["prompt"], row["prompt_text"], row["original"]) == (None, None, None)
    ends = [row["ended_by"] for row in rows]
    told = {k: v for k, v in made.figures.items() if k.startswith("ended_by")}
    assert told == {f"ended_by_{end}": ends.count(end) for end in ends}
    assert made.figures["samples"] == 4
    assert Path(made.files["spectrograms"]).is_file()
    assert [item.text for item in read_spoken_items(tmp_path / "s")] == texts * 2


def test_a_sample_does_not_depend_on_the_batch(home, tmp_path):
    asked = {"texts": ["three one four", "seven", "a"], "num_samples": 2, "seed": 3}
    asked["voice"] = home / "speech/test/bert/1.wav"
    speak(tmp_path / "one", batch_size=1, **asked)
    speak(tmp_path / "many", batch_size=64, **asked)
    for index in range(6):
        same(tmp_path / "one" / stem(index), tmp_path / "many" / stem(index))
    first, again = (audio_of(tmp_path / "one" / stem(index)) for index in (0, 3))
    assert np.abs(first[: 8 * HOP] - again[: 8 * HOP]).max() > 0.01  # another seed each


def test_more_samples_of_the_same_texts_only_add_files(tmp_path):
    speak(tmp_path, texts=["seven"])
    before = (tmp_path / stem(0)).stat().st_mtime_ns
    speak(tmp_path, texts=["seven"], num_samples=3)
    assert (tmp_path / stem(0)).stat().st_mtime_ns == before
    assert [row["index"] for row in rows_of(tmp_path)] == [0, 1, 2]
    fewer = speak(tmp_path, texts=["seven"], num_samples=2)
    assert fewer.figures["samples"] == 2
    assert len(rows_of(tmp_path)) == 3


def test_what_was_deleted_is_said_again_and_nothing_else(home, tmp_path):
    asked = {"texts": ["seven", "nine"], "num_samples": 3, "batch_size": 1}
    asked["voice"] = home / "speech/test/anna/0.wav"
    speak(tmp_path, **asked)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("0*.wav")}
    shutil.copytree(tmp_path, tmp_path / "before")
    rows = (tmp_path / "samples.jsonl").read_text()
    (tmp_path / stem(1)).unlink()
    (tmp_path / "voices" / stem(4)).unlink()
    kept = [line for line in rows.splitlines(True) if '"index": 2,' not in line]
    (tmp_path / "samples.jsonl").write_text("".join(kept))
    speak(tmp_path, **asked)
    for name in times:
        same(tmp_path / "before" / name, tmp_path / name)
    assert (tmp_path / "samples.jsonl").read_text() == rows
    changed = [n for n in times if (tmp_path / n).stat().st_mtime_ns != times[n]]
    assert sorted(changed) == [stem(1), stem(2), stem(4)]
    assert (tmp_path / "voices" / stem(4)).is_file()


def test_a_row_comes_after_its_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("latentlm_core.workflows.spoken_folder.SpokenFolder._write", refuse)
        with pytest.raises(KeyboardInterrupt):
            speak(tmp_path, texts=["seven"])
    assert (tmp_path / stem(0)).is_file()
    assert not (tmp_path / "samples.jsonl").exists()
    speak(tmp_path, texts=["seven"])
    assert len(rows_of(tmp_path)) == 1


def test_a_folder_of_other_settings_is_refused(tmp_path):
    speak(tmp_path, texts=["seven"])
    with pytest.raises(ArtifactError, match=r"other settings \(texts differ"):
        speak(tmp_path, texts=["eight"])
    with pytest.raises(ArtifactError, match=r"other settings \(seed differ"):
        speak(tmp_path, texts=["seven"], seed=1)
    with pytest.raises(ArtifactError, match=r"other settings \(sampler differ"):
        speak(tmp_path, texts=["seven"], guidance_scale=3.0)


def test_settings_give_folders_of_their_own_and_a_dry_run_makes_none(home):
    voices = [home / "speech/test" / name / "0.wav" for name in SPEAKERS]
    data = str(home / "speech")
    folders = {
        speak(dry_run=True, **{"texts": ["seven"], **settings}).files["samples"]
        for settings in (
            {},
            {"texts": ["seven", "eight"]},
            {"texts": ["and/or"]},
            {"texts": ["word " * 30]},
            {"texts": ["word " * 30 + "more"]},
            {"voice": voices[0]},
            {"seed": 1},
            {"guidance_scale": 1.0},
            {"num_inference_steps": 3},
            {"solver": "ddpm"},
            {"texts": [], "protocol": "reference-utterance", "data": data},
            {"texts": [], "protocol": "3s-prefix", "data": data},
        )
    }
    assert len(folders) == 12
    assert not any(Path(folder).exists() for folder in folders)


# --- streaming -------------------------------------------------------------------------------


@pytest.mark.parametrize("voiced", [False, True])
def test_a_stream_is_the_sample_that_is_not_streamed(home, tmp_path, voiced):
    asked: dict[str, Any] = {"texts": ["three one four"], "seed": 5}
    if voiced:
        asked["voice"] = home / "speech/test/bert/0.wav"
    speak(tmp_path / "whole", **asked)
    streamed = speak(tmp_path / "stream", stream=True, **asked)
    same(tmp_path / "whole" / stem(0), tmp_path / "stream" / stem(0))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "stream")
    assert streamed.figures["seconds"] == rows_of(tmp_path / "stream")[0]["seconds"]
    first, factor = (streamed.figures[n] for n in ("first_audio_seconds", "real_time_factor"))
    assert 0 < first < factor * streamed.figures["seconds"]


def interrupted_stream(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int = 12) -> None:
    """Say "three one four" until the ``after``-th latent has been heard."""
    hear = _Utterance.hear
    left = [after]

    def hear_some(self, latent):
        reason = hear(self, latent)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return reason

    with monkeypatch.context() as patch:
        patch.setattr(_Utterance, "hear", hear_some)
        with pytest.raises(KeyboardInterrupt):
            speak(folder, texts=["three one four"], stream=True)


def test_an_interrupted_stream_leaves_a_file_that_plays(tmp_path, monkeypatch):
    speak(tmp_path / "whole", texts=["three one four"])
    interrupted_stream(tmp_path / "part", monkeypatch)
    part, whole = (audio_of(tmp_path / name / stem(0)) for name in ("part", "whole"))
    assert 11 * HOP <= len(part) <= 12 * HOP
    assert np.abs(part - whole[: len(part)]).max() <= STEP
    assert not (tmp_path / "part/samples.jsonl").exists()
    speak(tmp_path / "part", texts=["three one four"])
    same(tmp_path / "part" / stem(0), tmp_path / "whole" / stem(0))


def test_a_stream_that_is_begun_anew_is_not_taken_for_whole(tmp_path, monkeypatch):
    speak(tmp_path, texts=["three one four"])
    before = (tmp_path / stem(0)).read_bytes()
    interrupted_stream(tmp_path, monkeypatch)
    assert rows_of(tmp_path) == []
    assert len((tmp_path / stem(0)).read_bytes()) < len(before)
    speak(tmp_path, texts=["three one four"])
    assert (tmp_path / stem(0)).read_bytes() == before


@pytest.mark.parametrize("asked", [{"texts": ["a", "b"]}, {"texts": ["a"], "num_samples": 2}])
def test_one_sample_alone_can_be_streamed(tmp_path, asked):
    with pytest.raises(ConfigError, match="--stream writes one sample, and these settings ask"):
        speak(tmp_path, stream=True, **asked)


# --- the watches -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("watch", ["silence", "repetition"])
def test_a_watch_ends_an_utterance_at_its_first_look(tmp_path, monkeypatch, watch, stream):
    name = {"silence": "is_silent", "repetition": "is_repeating"}[watch]
    monkeypatch.setattr(f"latentlm_core.workflows.speaking.{name}", lambda *_: True)
    made = speak(tmp_path, texts=["three one four"], stream=stream)
    (row,) = rows_of(tmp_path)
    assert (row["ended_by"], row["latents"]) == (watch, WATCH_EVERY)
    assert len(audio_of(tmp_path / stem(0))) == WATCH_EVERY * HOP
    assert made.figures[f"ended_by_{watch}"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_longest_silence_is_told_of_each_sample_and_of_all(tmp_path, monkeypatch, stream):
    """Of the audio as it is written; here a third of it is silent."""
    name = "latentlm_core.workflows.spoken_folder.longest_silence"
    monkeypatch.setattr(name, lambda audio, sample_rate: len(audio) / sample_rate / 3)
    texts = ["three one four"] if stream else ["nine", "three one four", "six"]
    made = speak(tmp_path, texts=texts, stream=stream)
    rows = rows_of(tmp_path)
    told = [row["longest_silence"] for row in rows]
    assert told == [round(len(audio_of(tmp_path / row["file"])) / RATE / 3, 2) for row in rows]
    assert made.figures["longest_silence"] == max(told) > 0.0


# --- the command -----------------------------------------------------------------------------


def test_the_command_speaks_streams_and_refuses(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    voice = home / "speech/test/anna/0.wav"
    line = ["sample", "--text", "three one", "--device", "cpu"]
    done = runner.invoke(
        app, [*line, "--voice", str(voice), "--stream", "--out", "s", "--json"], "", None, False
    )
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert {"first_audio_seconds", "real_time_factor", "seconds"} <= figures.keys()
    assert rows_of(tmp_path / "s")[0]["text"] == "three one"
    refused = runner.invoke(app, [*line, "--stream", "-n", "2"])
    assert refused.exit_code == 1
    assert "--stream writes one sample" in refused.stderr
    protocol = ["--protocol", "3s-prefix", "--data", str(home / "speech"), "--seconds", "3:4"]
    done = runner.invoke(app, ["sample", *protocol, "-n", "1", "--out", "p", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    assert len(rows_of(tmp_path / "p")) == 1
