"""The data of a run: one name for each latent set, and a recipe that fits."""

import json

import pytest

from latentlm_core import workflows
from latentlm_core.errors import ArtifactError
from latentlm_core.progress import SILENT
from latentlm_core.workflows.train_lm import _recipes
from latentlm_core.workflows.training_data import TrainingData
from tests.tiny_multimodal import RECIPE


@pytest.fixture(autouse=True)
def _workspace(multimodal_home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))


def test_a_latent_set_has_one_name_however_it_is_spelt(multimodal_home):
    place = multimodal_home / "latents/shapes"
    one, other = (
        TrainingData.open(mix, False, SILENT)
        for mix in (
            f"latents/shapes=2,interleaved:{place}/=2,text:texts",
            f"{place}=2,latents/shapes=3",
        )
    )
    assert list(one.sets) == list(other.sets) == [str(place.resolve())]
    assert [part.source for part in one.parts] == [str(place.resolve())] * 2 + ["texts"]


def test_a_run_goes_on_when_its_set_is_spelt_otherwise(multimodal_home, tmp_path):
    steps = {"total_steps": 2, "save_every": 2, "validate_every": 2, "precision": "float32"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE | {"trainer": steps}))
    how = {"recipe": str(recipe), "out": tmp_path / "run", "device": "cpu"}
    texts, place = f"text:{multimodal_home / 'texts'}", multimodal_home / "latents/shapes"
    first = workflows.train_lm(data=f"{texts}=1,latents/shapes=1", **how)
    again = workflows.train_lm(data=f"{texts}=2,{place}=2", **how)
    assert again.figures["step"] == first.figures["step"]
    with pytest.raises(ArtifactError, match=r"origin\.mix"):
        workflows.train_lm(data=f"{texts}=1,latents/shapes=2", **how)


def test_a_mix_takes_no_recipe_of_classes_by_itself(multimodal_home):
    """The set of ``mnist`` has a recipe of its name, which knows no mix."""
    single, mix = (
        TrainingData.open(f"latents/shapes{weight}", False, SILENT) for weight in ("", "=1")
    )
    assert {"mnist", "coloured-digits"} <= set(_recipes(single))
    assert "mnist" not in _recipes(mix)
    assert "coloured-digits" in _recipes(mix)
