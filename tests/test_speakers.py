import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from latentlm_core.data.speech_sources import open_speech
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, MissingExtraError
from latentlm_core.evaluation import speakers
from latentlm_core.evaluation.speakers import load_speaker_encoder


@pytest.fixture(scope="module")
def encoder():
    if importlib.util.find_spec("resemblyzer") is None:
        pytest.skip("the extra sim is not installed")
    return load_speaker_encoder()


def test_unknown_encoders_are_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"resemblizer'.*resemblyzer"):
        load_speaker_encoder("resemblizer")


@pytest.mark.parametrize(
    ("name", "module", "hint"),
    [
        ("resemblyzer", "resemblyzer", 'pip install "latentlm[sim]"'),
        ("hf:microsoft/wavlm-base-plus-sv", "transformers", "pip install transformers"),
    ],
)
def test_an_absent_package_is_named(monkeypatch, name: str, module: str, hint: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        load_speaker_encoder(name)
    assert hint in str(caught.value.hint)


def test_what_the_voice_detector_lacks_is_named(monkeypatch, tmp_path) -> None:
    (tmp_path / "resemblyzer.py").write_text("import pkg_resources")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "resemblyzer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    with pytest.raises(MissingExtraError, match="setuptools<82"):
        load_speaker_encoder()


def test_the_import_is_silent(encoder) -> None:
    code = "from latentlm_core.evaluation.speakers import load_speaker_encoder as f; f()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_weights_are_refused(encoder, monkeypatch) -> None:
    monkeypatch.setattr(speakers, "RESEMBLYZER_SHA256", "0" * 64)
    with pytest.raises(CorruptFileError, match=r"pretrained\.pt"):
        load_speaker_encoder()


def test_no_voice_has_no_embedding(encoder) -> None:
    for length in (0, 1, 2000, 16000):
        assert encoder.embed(np.zeros(length, np.float32), 8000) is None
    hiss = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 3e-4
    assert encoder.embed(hiss, 8000) is None


def test_real_speakers_are_told_apart(encoder, shared_data) -> None:
    source = open_speech(f"digit-strings:{shared_data('spoken-digits')}", "test")
    clips = [source[index] for index in range(18)]
    voices = np.stack([encoder.embed(clip.samples, clip.sample_rate) for clip in clips])
    assert np.allclose(np.linalg.norm(voices, axis=1), 1.0, atol=1e-5)
    speaker = np.array([clip.speaker for clip in clips])
    same = speaker[:, None] == speaker
    cosines, others = voices @ voices.T, ~np.eye(len(clips), dtype=bool)
    assert cosines[same & others].mean() > cosines[~same].mean() + 0.15
    nearest = np.where(others, cosines, -1.0).argmax(axis=1)
    assert (speaker[nearest] == speaker).mean() > 0.8
    for volume in (0.1, 1.5):
        again = encoder.embed(clips[0].samples * np.float32(volume), clips[0].sample_rate)
        assert again @ voices[0] > 0.999


def test_transformers_models_tell_voices_apart(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=(8,) * 5,
        xvector_output_dim=8,
    )
    for name, kind in (("sv", transformers.WavLMForXVector), ("base", transformers.WavLMModel)):
        kind(config).save_pretrained(tmp_path / name)
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / name)
    encoder = load_speaker_encoder(f"hf:{tmp_path / 'sv'}")
    noise = np.random.default_rng(0).standard_normal(3200).astype(np.float32) * 0.1
    assert np.linalg.norm(encoder.embed(noise, 8000)) == pytest.approx(1.0)
    assert encoder.embed(noise[:3000], 8000) is None
    with pytest.raises(ArtifactError, match="not trained to tell"):
        load_speaker_encoder(f"hf:{tmp_path / 'base'}")
