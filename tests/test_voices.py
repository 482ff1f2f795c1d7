"""Whose voice says it: recordings that a user gives, and the protocols on data sets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latentlm_core.data.audio import prepare, write_wav
from latentlm_core.data.base import Clip, Samples
from latentlm_core.errors import DataError
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.runtime import derive_seed
from latentlm_core.workflows.speaking import Line
from latentlm_core.workflows.watch import WATCH_EVERY, max_latents
from tests.tiny_speaking import (
    FRAME_RATE,
    HOP,
    LONGEST_SECONDS,
    RATE,
    SPEAKERS,
    STEP,
    audio_of,
    babble,
    make_home,
    rows_of,
    speak,
    speaking_of,
    stem,
)
from tests.tiny_training import Listener


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _workspace(home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(home))


# --- a recording -----------------------------------------------------------------------------


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
            assert np.abs(one - other).max() > 5 * STEP


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
    pace = speaking.bounds.pace
    assert pace > 1.0
    wanted = [
        0,
        2 + 0.5 * pace,
        2 + 1.5 * pace,
        *range(1, size + 3),
        size + 4 + 0.5 * pace,
        size + 3,
    ]
    assert asked.prompt.position.tolist() == pytest.approx(wanted)
    assert asked.unconditional.ids.tolist() == [marks.bos, marks.null, marks.bod]
    assert asked.unconditional.position.tolist() == [0, 1, 2]
    assert asked.num_latents == max_latents("c", speaking.bounds)


def test_a_beginning_stands_after_the_text_and_in_guidance_as_well(home):
    """What is dropped is the text: the branch without it has heard the same beginning."""
    speaking = speaking_of(home)
    words = "cd" * 10
    line = Line(words, Clip(babble(3, 0.5), RATE, None, None, "voice"), continues=True)
    marks = speaking.text.marks
    latents = speaking._encode(line, seed=1)
    asked = speaking._request(line, latents, seed=1)
    going = [marks.go_on] * len(latents)
    assert asked.prompt.ids.tolist() == [marks.bos, *words.encode(), marks.bod, *going]
    steady = [*asked.prompt.position[:1], *asked.prompt.position[1 + len(words) :]]
    assert steady == list(range(2 + len(latents)))
    assert asked.unconditional.ids.tolist() == [marks.bos, marks.null, marks.bod, *going]
    for prompt, start in ((asked.prompt, 22), (asked.unconditional, 3)):
        assert torch.equal(prompt.latents[start:], latents)
    whole = max_latents(words, speaking.bounds)
    assert asked.num_latents == whole - len(latents)
    short = speaking._request(replace(line, text="cd"), latents, seed=1)
    assert short.num_latents == 1


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
        assert row["latents"] <= max_latents(row["text"], bounds) - size


def test_a_continuation_begins_with_the_given_latents(home):
    speaking = speaking_of(home)
    line = Line("x" * 90, Clip(babble(3, 3.0), RATE, None, None, "v"), continues=True)
    engine, said = speaking.engine(speaking.loaded.config.sampler, 1), []
    speaking.say(engine, [line], [0], 0, lambda _, spoken: said.append(spoken))
    (spoken,) = said
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


def test_the_watches_hear_what_is_said_and_not_what_was_given(home, tmp_path, monkeypatch):
    heard = []

    def listen(audio, sample_rate):
        heard.append(len(audio) / HOP)
        return False

    monkeypatch.setattr("latentlm_core.workflows.speaking.is_silent", listen)
    asked = {"protocol": "3s-prefix", "data": str(home / "speech"), "num_samples": 1}
    speak(tmp_path, **asked)
    assert heard[0] <= WATCH_EVERY
