"""What text to speech refuses, each in a sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from latentlm_core import workflows
from latentlm_core.artifacts import build_generator, save_generator
from latentlm_core.data.audio import write_wav
from latentlm_core.data.utterances import transcripts
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptFileError,
    DataError,
    LatentLMError,
)
from latentlm_core.export_config import GeneratorExport
from latentlm_core.files import read_safetensors, write_json, write_safetensors
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.recipes import LMRecipe, lm_recipe
from latentlm_core.tokenizers.base import LatentStats, PosteriorKind
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from latentlm_core.workflows.lm_jobs import SpeechJob
from latentlm_core.workflows.watch import max_latents
from tests.test_utterances import encode
from tests.tiny_latents import (
    SPEECH_NETWORK,
    Recordings,
    encode_below,
    encode_recordings,
    export_tokenizer,
    vouch,
)
from tests.tiny_speaking import (
    FRAME_RATE,
    HOP,
    LONGEST_SECONDS,
    RATE,
    RECIPE,
    SPEAKERS,
    audio_of,
    babble,
    make_home,
    speak,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _workspace(home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(home))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"texts": ["seven", " ... "]}, "nothing to say in ' ... '"),
        ({"texts": [""]}, "nothing to say in ''"),
        ({}, "name a --text, or a --protocol"),
        ({"texts": ["a"], "data": "hibari"}, "belong to a --protocol"),
        ({"texts": ["a"], "seconds": (4.0, 10.0)}, "belong to a --protocol"),
        ({"texts": ["a"], "voice_text": "b"}, "--voice-text is what the recording --voice says"),
        ({"texts": ["a"], "split": "train"}, "belong to a --protocol"),
        ({"protocol": "3s-prefix"}, "needs --data"),
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


def test_a_text_that_is_no_utf_8_is_said_and_drawn(tmp_path):
    speak(tmp_path, texts=["seven \udcff"])
    assert (tmp_path / "spectrograms.png").is_file()


def test_files_of_somebody_else_are_not_touched(tmp_path):
    write_wav(tmp_path / "song.wav", babble(0, 1.0), RATE)
    with pytest.raises(ArtifactError, match=r"\.wav files that are not ours"):
        speak(tmp_path, texts=["seven"])


def test_a_damaged_list_of_samples_is_named(tmp_path):
    speak(tmp_path, texts=["seven"])
    (tmp_path / "samples.jsonl").write_text('{"index": 0, "file": "a.wav", "text": ""}\nnonsense\n')
    with pytest.raises(CorruptFileError, match=r"samples\.jsonl, line 2, is no row"):
        speak(tmp_path, texts=["seven"])


def test_a_model_that_draws_no_numbers_is_named(home, tmp_path):
    broken = shutil.copytree(home / "runs/lm/export", tmp_path / "export")
    weights = read_safetensors(broken / "model.safetensors")
    weights["head.final.projection.weight"].fill_(float("nan"))
    write_safetensors(broken / "model.safetensors", weights, {"format": "pt"})
    vouch(broken)
    with pytest.raises(ArtifactError, match="drew latents that are not finite"):
        speak(tmp_path / "s", texts=["seven"], model=str(broken))


def test_another_tokenizer_is_refused(home, tmp_path):
    other = shutil.copytree(home / "runs/vae/export", tmp_path / "vae")
    weights = read_safetensors(other / "model.safetensors")
    weights["decoder.head.bias"] += 1
    write_safetensors(other / "model.safetensors", weights, {"format": "pt"})
    vouch(other)
    with pytest.raises(ArtifactError, match="is not the tokenizer"):
        speak(tmp_path / "s", texts=["seven"], vae=str(other))


def test_exports_whose_parts_disagree_are_refused(home, tmp_path):
    export = shutil.copytree(home / "runs/lm/export", tmp_path / "export")
    (export / "text.json").write_text(TextTokenizer(TextConfig(normalise="words")).to_json())
    with pytest.raises(ArtifactError, match="is not the text tokenizer of the model"):
        speak(tmp_path / "s", texts=["seven"], model=str(export))
    config = json.loads((export / "config.json").read_text())
    for change, sentence in (
        ({"speech": None}, "max_length is that of a model"),
        ({"text_sha256": None, "speech": None}, "needs a grid"),
        ({"model": config["model"] | {"predicts_text": False}}, "one that predicts text"),
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
    texts, lengths = [], []
    for path in (home / "speech/train").rglob("*.wav"):
        texts.append(path.with_suffix(".txt").read_text())
        lengths.append(-(-len(audio_of(path)) // HOP))
    average = sum(lengths) / sum(map(len, texts))
    beyond = [size - average * len(text) for text, size in zip(texts, lengths, strict=True)]
    assert config["speech"]["latents_per_character"] == pytest.approx(average)
    assert config["speech"]["slack"] == pytest.approx(max(beyond))
    assert config["speech"]["pace"] == pytest.approx(average)  # of bytes, and these are ASCII
    plan = workflows.train_lm(recipe=str(home / "recipe.json"), dry_run=True, device="cpu")
    figures = {name: plan.figures[name] for name in ("examples", "speakers", "text_ids")}
    assert figures == {"examples": 12, "speakers": 2, "text_ids": 256}


@pytest.mark.parametrize("paced", [False, True])
def test_the_bounds_cover_every_utterance_of_the_training(tmp_path, paced):
    """Here all have about one text, and some take more than three times as long as others."""
    latents = encode(tmp_path, PosteriorKind.GAUSSIAN)
    config = LMRecipe.model_validate(RECIPE)
    data = config.data.model_copy(update={"paced_text": paced})
    bounds = SpeechJob(latents, config, data).facts["speech"]
    lengths = latents.lengths.tolist()
    assert max(lengths) > 3 * min(lengths)
    slowest = []
    for text, length in zip(transcripts(latents), lengths, strict=True):
        assert max_latents(text, bounds) >= length
        slowest.append(bounds.latents_per_character * len(text) + bounds.slack - length)
    assert min(slowest) == pytest.approx(0.0, abs=1e-6)
    assert bounds.longest == max(lengths)
    assert (bounds.pace > 0) is paced


def test_every_recipe_of_speech_can_be_sampled_without_a_word():
    """None asks for a guidance ramp, which speech cannot have."""
    for name in ("tts-24l", "digit-strings", "hibari"):
        assert lm_recipe(name, []).sampler.guidance_schedule == "constant"
