"""``latentlm eval recon`` of speech, and reports of speech that go elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentlm_core import workflows
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.result import Result
from latentlm_core.workflows import evaluate_speech
from tests.tiny_speaking import audio_of, make_home, speak


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _workspace(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTLM_HOME", str(home))


def rebuild(home: Path, data: Path, **settings: Any) -> Result:
    judges = {"recogniser": "none", "encoder": "none"}
    vae = str(home / "runs/vae")
    return workflows.evaluate_reconstruction(
        **{"data": str(data), "vae": vae, "device": "cpu", **judges, **settings}
    )


def test_both_sides_lie_beside_the_report(home, tmp_path):
    result = rebuild(home, home / "speech", num_samples=4, out=tmp_path / "recon.json")
    assert (result.figures["recordings"], result.figures["split"]) == (4, "test")
    rows = (tmp_path / "recon" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 4
    for row in map(json.loads, rows):
        sides = [audio_of(tmp_path / "recon" / row[name]) for name in ("file", "original")]
        assert len(sides[0]) == len(sides[1]) > 0
        assert row["text"].startswith("test")
    report = json.loads((tmp_path / "recon.json").read_text())
    assert report["values"]["mel_distance"] > 0


def test_recordings_of_the_training_part_are_warned_of(home, tmp_path):
    result = rebuild(
        home, home / "speech", split="train", num_samples=2, out=tmp_path / "recon.json"
    )
    assert result.figures["split"] == "train"
    assert "may have been trained on" in result.details["warnings"][-1]


def test_data_without_a_test_split_is_measured_on_what_training_holds_out(home, tmp_path):
    alone = home / "speech" / "test" / "anna"
    result = rebuild(home, alone, out=tmp_path / "recon.json")
    assert result.figures["recordings"] == 1
    assert "holds out of train" in result.details["split"]


def test_what_would_be_ignored_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match="--extractor and --weights are for images"):
        rebuild(home, home / "speech", extractor="none")
    with pytest.raises(ConfigError, match=r"must be a \.json file"):
        rebuild(home, home / "speech", out=tmp_path / "recon")


def test_a_voice_is_understood_by_its_own_text(home, tmp_path, monkeypatch):
    heard: dict[str, Any] = {}

    def note(items, *_: Any, **__: Any):
        heard.update({item.file.parent.name: item.text for item in items})
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_speech, "word_errors", note)
    monkeypatch.setattr(evaluate_speech, "load_recogniser", lambda *_: None)
    voice = home / "speech/test/anna/0.wav"
    speak(tmp_path / "said", texts=["seven"], voice=voice)
    for side in ("samples", "voices"):
        with pytest.raises(KeyboardInterrupt):
            workflows.evaluate_wer(samples=str(tmp_path / "said"), side=side, device="cpu")
    assert heard == {"said": "seven", "voices": voice.with_suffix(".txt").read_text()}
    with pytest.raises(DataError, match="no originals with texts beside"):
        workflows.evaluate_wer(samples=str(tmp_path / "said"), side="originals", device="cpu")


@pytest.mark.parametrize("name", ["wer", "wer.jsonl"])
def test_a_report_that_its_scores_would_overwrite_is_refused(home, tmp_path, name):
    speak(tmp_path / "said", texts=["seven"])
    with pytest.raises(ConfigError, match=r"must be a \.json file"):
        workflows.evaluate_wer(samples=str(tmp_path / "said"), out=tmp_path / name, device="cpu")
    assert not (tmp_path / name).exists()
