import sys

import numpy as np
import pytest

from latentlm_core.data.speech_sources import open_speech
from latentlm_core.errors import DataError, MissingExtraError
from latentlm_core.evaluation.speech_quality import (
    QUALITY_METRICS,
    AudioPair,
    installed_metrics,
    reconstruction_quality,
)

RATE = 16_000


@pytest.fixture
def packages() -> None:
    pytest.importorskip("pesq", reason="the extra speech is not installed")
    pytest.importorskip("pystoi", reason="the extra speech is not installed")


def noise(seconds: float, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (scale * random.standard_normal(round(seconds * RATE))).astype(np.float32)


def test_equal_audio_is_perfect(packages) -> None:
    audio = noise(1.0)
    report = reconstruction_quality([AudioPair("a", audio, audio)], 1, RATE)
    assert report.values == {
        "mel_distance": 0.0,
        "pesq_wb": pytest.approx(4.644, abs=1e-3),
        "pesq_nb": pytest.approx(4.549, abs=1e-3),
        "stoi": pytest.approx(1.0),
    }
    assert report.originals_sha256 == report.rebuilt_sha256
    assert report.warnings == ()


def test_more_noise_is_worse_by_every_measure(packages, shared_data) -> None:
    source = open_speech(f"digit-strings:{shared_data('spoken-digits')}", "test")
    clips = [source[index] for index in range(3)]

    def measure(scale: float) -> dict[str, float]:
        pairs = (
            AudioPair(
                clip.key, clip.samples, clip.samples + noise(8, 1, scale)[: len(clip.samples)]
            )
            for clip in clips
        )
        report = reconstruction_quality(pairs, len(clips), clips[0].sample_rate)
        assert [row.file for row in report.rows] == [clip.key for clip in clips]
        assert report.values["stoi"] == pytest.approx(
            np.mean([row.stoi for row in report.rows if row.stoi is not None])
        )
        assert "16 kHz" in report.warnings[-1]
        return report.values

    low, high = measure(0.002), measure(0.05)
    assert low["mel_distance"] < high["mel_distance"]
    for name in ("pesq_wb", "pesq_nb", "stoi"):
        assert low[name] > high[name] + 0.02


def test_the_short_and_the_silent_have_no_score_and_are_counted(packages) -> None:
    audio, still = noise(1.0), np.zeros(RATE, np.float32)
    sparse = still.copy()
    sparse[:4000] = audio[:4000]
    pairs = [
        AudioPair("good", audio, audio),
        AudioPair("short", audio[:3000], audio[:3000]),
        AudioPair("shortest", audio[:400], audio[:400]),
        AudioPair("silent", still, still),
        AudioPair("lost", audio, still),
        AudioPair("sparse", sparse, sparse),
    ]
    report = reconstruction_quality(pairs, len(pairs), RATE)
    found = {row.file: row.to_dict() for row in report.rows}
    scored = {
        file: {name for name in QUALITY_METRICS if row[name] is not None}
        for file, row in found.items()
    }
    assert scored["good"] == set(QUALITY_METRICS)
    assert scored["short"] == {"mel_distance"}
    assert scored["shortest"] == set()
    assert scored["silent"] == {"mel_distance"}
    assert "stoi" not in scored["sparse"]
    assert not scored["lost"] & {"pesq_wb", "pesq_nb"}
    assert report.num_unscored["mel_distance"] == 1
    assert report.num_unscored["pesq_wb"] >= 4
    assert any(warning.startswith("1 recordings have no mel") for warning in report.warnings)


def test_pesq_outlives_more_utterances_than_its_tables_hold(packages) -> None:
    burst = np.concatenate([noise(0.5), np.zeros(RATE // 2, np.float32)])
    audio = np.tile(burst, 70)
    rebuilt = audio + noise(70, 1, 0.001)
    report = reconstruction_quality([AudioPair("long", audio, rebuilt)], 1, RATE, ("pesq_wb",))
    assert 1.0 < report.values["pesq_wb"] < 4.6


def test_two_sides_of_different_length_are_refused() -> None:
    pair = AudioPair("a", noise(1.0), noise(0.5))
    with pytest.raises(DataError, match="a has 16000 samples, its reconstruction 8000"):
        reconstruction_quality([pair], 1, RATE, ("mel_distance",))
    with pytest.raises(DataError, match="no recordings"):
        reconstruction_quality([], 0, RATE, ("mel_distance",))


@pytest.mark.parametrize(("metric", "module"), [("pesq_wb", "pesq"), ("stoi", "pystoi")])
def test_an_absent_package_is_named(monkeypatch, metric, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        reconstruction_quality([], 0, RATE, (metric,))
    assert str(caught.value.hint).endswith('"latentlm[speech]"')


def test_installed_metrics_are_those_that_can_be_had(monkeypatch) -> None:
    assert "mel_distance" in installed_metrics()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_metrics() == ("mel_distance",)
