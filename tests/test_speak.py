"""Text to speech as ``latentlm sample`` does it, on a tiny real path."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.artifacts import GeneratorExport, build_generator, load_generator, save_generator
from latentlm_core.data.audio import prepare, read_audio, write_wav
from latentlm_core.data.base import Clip, Samples
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptFileError,
    DataError,
    LatentLMError,
)
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.files import read_safetensors, write_json, write_safetensors
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.progress import SILENT
from latentlm_core.recipes import lm_recipe
from latentlm_core.runtime import derive_seed
from latentlm_core.tokenizers.base import LatentStats, PosteriorKind
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from latentlm_core.workflows.speaking import Line, Speaking, _Utterance
from latentlm_core.workflows.watch import WATCH_EVERY, max_latents
from tests.tiny_latents import (
    SPEECH_NETWORK,
    Recordings,
    encode_below,
    encode_recordings,
    export_tokenizer,
)
from tests.tiny_speaking import (
    FRAME_RATE,
    HOP,
    LONGEST_SECONDS,
    RATE,
    SPEAKERS,
    babble,
    make_home,
)
from tests.tiny_training import Listener

STEP = 1.01 / 32768
"""One step of 16 bits: kernels for other sizes round differently."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLM_HOME", str(folder))
        make_home(folder)
    return folder


@pytest.fixture(autouse=True)
def _workspace(home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(home))


def speak(out: Path | None = None, **settings: Any):
    return workflows.speak(out=out, **{"device": "cpu", **settings})


def speaking_of(home: Path) -> Speaking:
    loaded = load_generator(home / "runs/lm/export", torch.device("cpu"))
    return Speaking.of(loaded, None, torch.device("cpu"), SILENT)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def audio_of(path: Path) -> Samples:
    samples, sample_rate = read_audio(path, str(path))
    assert sample_rate == RATE
    return samples


def same(first: Path, second: Path) -> None:
    a, b = audio_of(first), audio_of(second)
    assert len(a) == len(b)
    assert np.abs(a - b).max() <= STEP


def stem(index: int) -> str:
    return f"{index:06d}.wav"


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
        assert row["latents"] <= max_latents(row["text"], bounds, FRAME_RATE)
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
    content = {p.name: p.read_bytes() for p in tmp_path.glob("0*.wav")}
    rows = (tmp_path / "samples.jsonl").read_text()
    (tmp_path / stem(1)).unlink()
    (tmp_path / "voices" / stem(4)).unlink()
    kept = [line for line in rows.splitlines(True) if '"index": 2,' not in line]
    (tmp_path / "samples.jsonl").write_text("".join(kept))
    speak(tmp_path, **asked)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("0*.wav")} == content
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


# --- voices ----------------------------------------------------------------------------------


def test_a_voice_is_kept_beside_the_sample_and_its_transcript_is_found(home, tmp_path):
    path = home / "speech/test/anna/1.wav"
    speak(tmp_path / "beside", texts=["seven"], voice=path)
    (row,) = rows_of(tmp_path / "beside")
    assert (row["prompt"], row["prompt_text"]) == ("voices/000000.wav", "test anna 1")
    heard = prepare(Clip(audio_of(path), RATE, None, None, "voice"), RATE)
    np.testing.assert_allclose(audio_of(tmp_path / "beside" / row["prompt"]), heard, atol=STEP)
    speak(tmp_path / "given", texts=["seven"], voice=path, voice_text="something else")
    assert rows_of(tmp_path / "given")[0]["prompt_text"] == "something else"
    speak(tmp_path / "none", texts=["seven"], voice=path, voice_text="")
    assert rows_of(tmp_path / "none")[0]["prompt_text"] is None


def test_voice_and_transcript_decide_the_sample(home, tmp_path):
    asked = {"texts": ["three one four"]}
    anna, bert = (home / "speech/test" / name / "1.wav" for name in SPEAKERS)
    for name, voice in {
        "no": {},
        "anna": {"voice": anna},
        "bert": {"voice": bert},
        "silent": {"voice": anna, "voice_text": ""},
    }.items():
        speak(tmp_path / name, **asked, **voice)
    found = [audio_of(tmp_path / name / stem(0))[: 8 * HOP] for name in ("no", "anna", "bert")]
    found.append(audio_of(tmp_path / "silent" / stem(0))[: 8 * HOP])
    for place, one in enumerate(found):
        for other in found[:place]:
            assert np.abs(one - other).max() > 10 * STEP


def test_a_voice_longer_than_the_model_knows_is_cut_without_its_transcript(tmp_path):
    write_wav(tmp_path / "long.wav", babble(5, LONGEST_SECONDS + 0.5), RATE)
    listener = Listener()
    asked = {"texts": ["seven"], "voice": tmp_path / "long.wav", "voice_text": "a long story"}
    speak(tmp_path / "s", num_samples=2, progress=listener, **asked)
    told = [note for note in listener.notes if "is cut to 3.6 s" in note]
    assert len(told) == 1
    assert "transcript is left out" in told[0]
    (row, _) = rows_of(tmp_path / "s")
    assert row["prompt_text"] is None
    assert len(audio_of(tmp_path / "s" / row["prompt"])) == LONGEST_SECONDS * RATE


def test_a_voice_at_another_rate_is_resampled(tmp_path, home):
    write_wav(tmp_path / "fast.wav", babble(5, 1.0), 2 * RATE)
    speak(tmp_path / "s", texts=["seven"], voice=tmp_path / "fast.wav")
    assert len(audio_of(tmp_path / "s/voices" / stem(0))) == RATE // 2


def test_a_voice_stands_before_the_text_and_guidance_has_neither(home):
    """The sequences are those of training, and the model reads the voice's own latents."""
    speaking = speaking_of(home)
    clip = Clip(babble(3, 0.5), RATE, "ab", None, "voice")
    marks = speaking.text.marks
    latents = speaking._encode(Line("c", clip), seed=1)
    asked = speaking._request(Line("c", clip), latents, seed=1)
    size = int(0.5 * FRAME_RATE)
    assert latents.shape == (size, 4)
    assert asked.prompt.ids.tolist() == [
        *(marks.bos, ord("a"), ord("b"), marks.bod, *[marks.go_on] * size, marks.eod),
        *(ord("c"), marks.bod),
    ]
    assert torch.equal(asked.prompt.latents[4 : 4 + size], latents)
    assert asked.unconditional.ids.tolist() == [marks.bos, marks.null, marks.bod]
    assert asked.num_latents == max_latents("c", speaking.bounds, FRAME_RATE)


def test_a_beginning_stands_after_the_text_and_in_guidance_as_well(home):
    """What is dropped is the text: the branch without it has heard the same beginning."""
    speaking = speaking_of(home)
    line = Line("cd", Clip(babble(3, 0.5), RATE, None, None, "voice"), continues=True)
    marks = speaking.text.marks
    latents = speaking._encode(line, seed=1)
    asked = speaking._request(line, latents, seed=1)
    going = [marks.go_on] * len(latents)
    assert asked.prompt.ids.tolist() == [marks.bos, ord("c"), ord("d"), marks.bod, *going]
    assert asked.unconditional.ids.tolist() == [marks.bos, marks.null, marks.bod, *going]
    for prompt, start in ((asked.prompt, 4), (asked.unconditional, 3)):
        assert torch.equal(prompt.latents[start:], latents)
    whole = max_latents("cd", speaking.bounds, FRAME_RATE)
    assert asked.num_latents == whole - len(latents)


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


def test_the_watches_hear_what_is_said_and_not_what_was_given(home, tmp_path, monkeypatch):
    heard = []

    def listen(audio, sample_rate):
        heard.append(len(audio) / HOP)
        return False

    monkeypatch.setattr("latentlm_core.workflows.speaking.is_silent", listen)
    asked = {"protocol": "3s-prefix", "data": str(home / "speech"), "num_samples": 1}
    speak(tmp_path, **asked)
    assert heard[0] <= WATCH_EVERY


# --- protocols -------------------------------------------------------------------------------


def recordings_of(home: Path, speaker: str) -> list[Samples]:
    folder = home / "speech/test" / speaker
    clips = [Clip(audio_of(folder / f"{n}.wav"), RATE, None, None, "") for n in range(3)]
    return [prepare(clip, RATE) for clip in clips]


def test_an_utterance_has_the_voice_of_the_one_before_it(home, tmp_path):
    speak(tmp_path, protocol="reference-utterance", data=str(home / "speech"))
    rows = rows_of(tmp_path)
    assert len(rows) == 6
    for row in rows:
        speaker, number = SPEAKERS[row["index"] // 3], row["index"] % 3
        texts = [(home / f"speech/test/{speaker}/{n}.txt").read_text() for n in range(3)]
        recordings = recordings_of(home, speaker)
        before = (number - 1) % 3
        assert (row["text"], row["prompt_text"]) == (texts[number], texts[before])
        kept = [audio_of(tmp_path / row[kind]) for kind in ("prompt", "original")]
        np.testing.assert_allclose(kept[0], recordings[before], atol=STEP)
        np.testing.assert_allclose(kept[1], recordings[number], atol=STEP)
    items = read_spoken_items(tmp_path)
    assert all(item.prompt and item.original for item in items)


def test_three_seconds_are_gone_on_with(home, tmp_path):
    speak(tmp_path, protocol="3s-prefix", data=str(home / "speech"))
    bounds, size = speaking_of(home).bounds, int(3 * FRAME_RATE)
    rows = rows_of(tmp_path)
    assert len(rows) == 2  # of each speaker the one that is long enough
    for row, speaker in zip(rows, SPEAKERS, strict=True):
        whole = audio_of(home / f"speech/test/{speaker}/2.wav")
        beginning = prepare(Clip(whole[: 3 * RATE], RATE, None, None, ""), RATE)
        np.testing.assert_allclose(audio_of(tmp_path / row["prompt"]), beginning, atol=STEP)
        assert row["text"] == (home / f"speech/test/{speaker}/2.txt").read_text()
        assert row["prompt_text"] is None
        assert len(audio_of(tmp_path / row["original"])) == len(whole)
        assert len(audio_of(tmp_path / row["file"])) == (size + row["latents"]) * HOP
        assert row["latents"] <= max_latents(row["text"], bounds, FRAME_RATE) - size


def test_a_continuation_begins_with_the_given_latents(home):
    speaking = speaking_of(home)
    line = Line("x" * 90, Clip(babble(3, 3.0), RATE, None, None, "v"), continues=True)
    engine = speaking.engine(speaking.loaded.config.sampler)
    (spoken,) = speaking.say(engine, [line], [0], seed=0)
    latents = speaking._encode(line, derive_seed(0, "sample", 0))
    raw = speaking.loaded.config.stats.denormalise(latents)
    with torch.inference_mode():
        given = speaking.tokenizer.decode(raw[None], (len(latents),))[0, 0].clamp(-1, 1)
    kept = len(given) - HOP  # the last samples are mixed with those that follow
    torch.testing.assert_close(spoken.audio[:kept], given[:kept], rtol=1e-4, atol=1e-5)


def test_lengths_and_numbers_choose_from_all_over_the_set(home, tmp_path):
    asked = {"protocol": "reference-utterance", "data": str(home / "speech")}
    speak(tmp_path / "short", seconds=(0.45, 0.62), **asked)
    texts = [row["text"] for row in rows_of(tmp_path / "short")]
    assert texts == ["test anna", "test anna 1"]  # bert has one only, without another voice
    speak(tmp_path / "few", num_samples=2, **asked)
    found = [row["text"].split()[1:3] for row in rows_of(tmp_path / "few")]
    assert found == [["anna"], ["bert", "0"]]
    with pytest.raises(DataError, match="no utterance with a transcript of 8 to 9 seconds"):
        speak(tmp_path / "none", seconds=(8.0, 9.0), **asked)


def test_what_cannot_give_a_voice_is_left_out_with_a_word(home, tmp_path):
    folder = tmp_path / "data/test"
    for name, audio, text in (
        ("anna/0", babble(0, 0.5), "one"),
        ("anna/1", babble(1, 0.5), "two"),
        ("anna/2", np.zeros(4000, np.float32), "silent"),
        ("anna/3", babble(3, 0.5), "..."),
        ("carl/0", babble(4, 0.5), "alone"),
    ):
        write_wav(folder / f"{name}.wav", audio, RATE)
        (folder / f"{name}.txt").write_text(text)
    (folder / "anna/4.wav").write_bytes(b"no audio")
    (tmp_path / "data/train").mkdir()
    listener = Listener()
    asked = {"protocol": "reference-utterance", "data": str(tmp_path / "data")}
    speak(tmp_path / "s", progress=listener, **asked)
    assert [row["text"] for row in rows_of(tmp_path / "s")] == ["one", "two"]
    told = "\n".join(listener.warnings)
    assert "Skipped: anna/2.wav is silent" in told
    assert "Skipped: anna/4.wav is no audio" in told
    assert "Left out 1 utterances whose speakers have no other" in told
    assert len(listener.warnings) == 3


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"texts": ["seven", " ... "]}, "nothing to say in ' ... '"),
        ({"texts": [""]}, "nothing to say in ''"),
        ({}, "name a --text, or a --protocol"),
        ({"texts": ["a"], "data": "hibari"}, "belong to a --protocol"),
        ({"texts": ["a"], "seconds": (4.0, 10.0)}, "belong to a --protocol"),
        ({"texts": ["a"], "voice_text": "b"}, "--voice-text is what the recording --voice says"),
        ({"protocol": "3s-prefix"}, "from --data alone"),
        ({"protocol": "3s-prefix", "data": "x", "texts": ["a"]}, "from --data alone"),
        ({"protocol": "3s-prefix", "data": "x", "voice": Path("v.wav")}, "from --data alone"),
        ({"protocol": "3s-prefix", "data": "nothing"}, "There is no set of recordings 'nothing'"),
        ({"texts": ["a"], "voice": Path("none.wav")}, "none.wav is not there"),
        ({"texts": ["a"], "guidance_scale": -1.0}, "guidance_scale = -1"),
    ],
)
def test_wrong_settings_get_a_sentence(tmp_path, settings, sentence):
    with pytest.raises(LatentLMError, match=sentence):
        speak(tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (babble(0, 0.03), r"too short: 0\.03 s of at least 0\.04 s"),
        (np.zeros(RATE, np.float32), "is silent"),
        (np.sign(babble(0, 1.0)), "is clipped"),
    ],
)
def test_a_voice_that_tells_nothing_is_refused(tmp_path, samples, sentence):
    write_wav(tmp_path / "voice.wav", samples, RATE)
    with pytest.raises(DataError, match=sentence):
        speak(tmp_path / "s", texts=["a"], voice=tmp_path / "voice.wav")
    (tmp_path / "voice.wav").write_bytes(b"RIFF and nothing")
    with pytest.raises(CorruptFileError, match="is no audio, or broken"):
        speak(tmp_path / "s", texts=["a"], voice=tmp_path / "voice.wav")


def test_files_of_somebody_else_are_not_touched(tmp_path):
    write_wav(tmp_path / "song.wav", babble(0, 1.0), RATE)
    with pytest.raises(ArtifactError, match=r"\.wav files that are not ours"):
        speak(tmp_path, texts=["seven"])


def test_a_damaged_list_of_samples_is_named(tmp_path):
    speak(tmp_path, texts=["seven"])
    (tmp_path / "samples.jsonl").write_text('{"index": 0}\nnonsense\n')
    with pytest.raises(CorruptFileError, match=r"samples\.jsonl, line 2, is no row"):
        speak(tmp_path, texts=["seven"])


def test_a_model_that_draws_no_numbers_is_named(home, tmp_path):
    broken = shutil.copytree(home / "runs/lm/export", tmp_path / "export")
    weights = read_safetensors(broken / "model.safetensors")
    weights["head.final.projection.weight"].fill_(float("nan"))
    write_safetensors(broken / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(ArtifactError, match="drew latents that are not finite"):
        speak(tmp_path / "s", texts=["seven"], model=str(broken))


def test_another_tokenizer_is_refused(home, tmp_path):
    other = shutil.copytree(home / "runs/vae/export", tmp_path / "vae")
    weights = read_safetensors(other / "model.safetensors")
    weights["decoder.head.bias"] += 1
    write_safetensors(other / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(ArtifactError, match="is not the tokenizer"):
        speak(tmp_path / "s", texts=["seven"], vae=str(other))


def test_exports_whose_parts_disagree_are_refused(home, tmp_path):
    export = shutil.copytree(home / "runs/lm/export", tmp_path / "export")
    (export / "text.json").write_text(TextTokenizer(TextConfig(normalise="words")).to_json())
    with pytest.raises(ArtifactError, match="is not the text tokenizer of the model"):
        speak(tmp_path / "s", texts=["seven"], model=str(export))
    config = json.loads((export / "config.json").read_text())
    for change, sentence in (
        ({"speech": None}, "text_sha256 and speech go together"),
        ({"text_sha256": None, "speech": None}, "needs a grid"),
        ({"model": config["model"] | {"predicts_text": False}}, "a latent-lm that predicts text"),
    ):
        write_json(export / "config.json", config | change)
        with pytest.raises(CorruptFileError, match=sentence):
            speak(tmp_path / "s", texts=["seven"], model=str(export))


# --- speech and images -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(home, tmp_path_factory, tokenizers) -> Path:
    """A class-conditional model that nobody trained, and latents of images."""
    folder: Path = tmp_path_factory.mktemp("pictures")
    encode_below(folder, tokenizers)
    config = LatentLMConfig(
        backbone=TransformerConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32),
        head=DiffusionHeadConfig(num_layers=1, intermediate_size=32),
        latent_channels=3,
        vocab_size=5,
    )
    export = GeneratorExport(
        model=config,
        stats=LatentStats(shift=(0.0,), scale=(1.0,)),
        grid=(4, 4),
        classes=tuple("abcd"),
        tokenizer_sha256="0" * 64,
    )
    vae = tokenizers[PosteriorKind.GAUSSIAN][1]
    save_generator(folder / "lm", build_generator(config), export, vae)
    return folder


def test_a_text_for_a_model_of_classes_tells_what_it_takes(pictures, tmp_path):
    with pytest.raises(ArtifactError, match="is class-conditional, so it cannot read") as caught:
        speak(tmp_path, texts=["seven"], model=str(pictures / "lm"))
    assert "--class" in (caught.value.hint or "")


def test_a_class_for_a_model_of_speech_tells_what_it_wants(tmp_path):
    with pytest.raises(ArtifactError, match="text-to-speech model, which has no classes") as caught:
        workflows.sample(classes=["3"], out=tmp_path, device="cpu")
    assert "--text" in (caught.value.hint or "")


def test_recipes_and_latents_must_be_of_one_kind(home, pictures, tmp_path):
    recipe, out = str(home / "recipe.json"), tmp_path / "run"
    with pytest.raises(ConfigError, match="holds images, and this recipe is for speech"):
        workflows.train_lm(data=str(pictures / "a/set"), recipe=recipe, out=out, device="cpu")
    data = str(home / "latents/speech")
    with pytest.raises(ConfigError, match="holds speech, and this recipe is for images"):
        workflows.train_lm(data=data, recipe="tiny", out=out, device="cpu")
    dit = {"recipe": "dit-tiny", "overrides": ['data={kind="speech"}']}
    with pytest.raises(ConfigError, match=r"needs model\.kind = latent-lm"):
        workflows.train_lm(data=data, out=out, device="cpu", **dit)
    for change, sentence in (
        ("sampler.guidance_schedule=linear", "guidance_schedule = constant"),
        ("data.row_length=60", r"\.wav has \d+ elements, and a row \(data\.row_length\) 60"),
    ):
        with pytest.raises(LatentLMError, match=sentence):
            workflows.train_lm(data=data, recipe=recipe, overrides=[change], out=out, device="cpu")
    assert not out.exists()


def test_a_set_without_texts_is_refused(home, tmp_path):
    tokenizer, export = export_tokenizer(PosteriorKind.GAUSSIAN, tmp_path / "vae", SPEECH_NETWORK)
    encode_recordings(tmp_path / "set", tokenizer, export, Recordings(count=8))
    with pytest.raises(DataError, match=r"no text for 4\.wav, and text-to-speech needs"):
        workflows.train_lm(
            data=str(tmp_path / "set"), recipe=str(home / "recipe.json"), device="cpu"
        )


def test_a_trained_run_tells_what_it_is_of(home):
    config = json.loads((home / "runs/lm/export/config.json").read_text())
    assert config["classes"] == list(SPEAKERS)
    assert config["grid"] is None
    assert config["speech"]["longest"] == LONGEST_SECONDS * FRAME_RATE
    ratios = []
    for path in (home / "speech/train").rglob("*.wav"):
        text = path.with_suffix(".txt").read_text()
        ratios.append(-(-len(audio_of(path)) // HOP) / len(text))
    assert config["speech"]["latents_per_character"] == pytest.approx(max(ratios))
    plan = workflows.train_lm(recipe=str(home / "recipe.json"), dry_run=True, device="cpu")
    figures = {name: plan.figures[name] for name in ("examples", "speakers", "text_ids")}
    assert figures == {"examples": 12, "speakers": 2, "text_ids": 256}


def test_every_recipe_of_speech_can_be_sampled_without_a_word():
    """None asks for a guidance ramp, which speech cannot have."""
    for name in ("tts-24l", "digit-strings", "hibari"):
        assert lm_recipe(name, []).sampler.guidance_schedule == "constant"


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
