"""Distilling models that read text: of speech, and of text and images."""

from pathlib import Path

import pytest
import torch

from latentlm_core import workflows
from latentlm_core.artifacts import load_generator
from latentlm_core.errors import ArtifactError, ConfigError
from latentlm_core.export_config import GeneratorExport, read_config
from tests import tiny_multimodal, tiny_speaking

FEW = [
    *("trainer.total_steps=3", "trainer.save_every=3", "trainer.log_every=1"),
    *("trainer.precision=float32", "distill.teacher_steps=4", "distill.trajectories=1"),
]


@pytest.fixture(scope="module")
def speech_home(tmp_path_factory) -> Path:
    return tiny_speaking.make_home(tmp_path_factory.mktemp("spoken"))


def distill(home: Path, name: str, data: str, out: Path, *overrides: str):
    return workflows.distill(
        teacher=str(home / "runs" / name),
        data=data,
        recipe="tiny",
        overrides=[*FEW, *overrides],
        out=out,
        device="cpu",
    )


def assert_only_the_head_differs(teacher: Path, student: Path) -> None:
    theirs, ours = (
        load_generator(folder / "export", torch.device("cpu")).model.state_dict()
        for folder in (teacher, student)
    )
    changed = {name for name, weight in theirs.items() if not torch.equal(weight, ours[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_a_distilled_model_speaks(speech_home, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path))
    made = distill(speech_home, "lm", str(speech_home / "latents/speech"), tmp_path / "run")
    assert made.figures["distance/1 steps"] > 0
    assert_only_the_head_differs(speech_home / "runs/lm", tmp_path / "run")
    config = read_config(tmp_path / "run/export", GeneratorExport)
    assert config.model.few_step.guidance_scale == 20.0
    assert config.speech == read_config(speech_home / "runs/lm/export", GeneratorExport).speech
    settings = {"model": str(tmp_path / "run"), "texts": ["test anna"], "device": "cpu"}
    spoken = workflows.speak(out=tmp_path / "said", num_inference_steps=1, **settings)
    assert spoken.figures["steps"] == 1
    assert (tmp_path / "said/000000.wav").is_file()
    with pytest.raises(ConfigError, match="no changing its guidance_scale"):
        workflows.speak(out=tmp_path / "other", guidance_scale=1.0, **settings)


def test_speech_knows_no_rising_guidance(speech_home, tmp_path):
    with pytest.raises(ConfigError, match="Only images of classes can have a guidance schedule"):
        distill(
            speech_home,
            "lm",
            str(speech_home / "latents/speech"),
            tmp_path / "run",
            "distill.guidance_schedule=linear",
        )


def test_a_distilled_model_writes_and_draws(multimodal_home, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path))
    data = tiny_multimodal.mix_of(multimodal_home)
    distill(multimodal_home, "pages", data, tmp_path / "run")
    assert_only_the_head_differs(multimodal_home / "runs/pages", tmp_path / "run")
    drawn = workflows.write(
        model=str(tmp_path / "run"),
        prompts=["a red circle"],
        num_samples=2,
        out=tmp_path / "drawn",
        device="cpu",
    )
    assert drawn.figures["steps"] == 4
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("words", "learned no latents"), ("transfusion", "is a transfusion, and --distill is for")],
)
def test_models_without_such_a_head_are_refused(multimodal_home, tmp_path, name, sentence):
    data = tiny_multimodal.mix_of(multimodal_home)
    with pytest.raises(ArtifactError, match=sentence):
        distill(multimodal_home, name, data, tmp_path / "run")
