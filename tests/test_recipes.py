"""Recipes: the published sizes, and how recipes, files and overrides combine."""

import json

import pytest
import torch

from latentlm_core.artifacts import build_generator
from latentlm_core.errors import ConfigError
from latentlm_core.recipes import (
    lm_recipe,
    lm_recipe_names,
    vae_recipe,
    vae_recipe_names,
)
from latentlm_core.recipes.sizes import PUBLISHED_SIZES

MILLIONS = {  # counted from the official code; latentlm-l is the paper's 479M
    "latentlm-base": 143.2,
    "latentlm-medium": 455.4,
    "latentlm-large": 1023.6,
    "latentlm-xl": 1818.8,
    "latentlm-3b": 3679.9,
    "latentlm-7b": 9417.4,
    "latentlm-13b": 18068.4,
    "latentlm-b": 212.2,
    "latentlm-l": 477.3,
    "latentlm-l-code": 495.2,
    "latentlm-h": 1006.7,
    "dit-medium": 454.3,
    "dit-large": 1028.3,
    "dit-xl": 1824.0,
    "dit-3b": 3787.4,
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_sizes_have_the_published_parameter_counts(name):
    with torch.device("meta"):
        model = build_generator(lm_recipe(name).model.complete((16, 16), 16, 1001))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == MILLIONS[name]


def test_every_recipe_survives_json():
    for name in vae_recipe_names():
        assert vae_recipe(name).to_dict() == json.loads(json.dumps(vae_recipe(name).to_dict()))
    for name in lm_recipe_names():
        recipe = lm_recipe(name)
        assert type(recipe).model_validate_json(json.dumps(recipe.to_dict())) == recipe


def test_overrides_change_what_they_name_and_nothing_else():
    plain = lm_recipe("mnist")
    changed = lm_recipe("mnist", ["optimizer.lr=3e-4", "model.head.noise_repeats=2"])
    assert changed.optimizer.lr == 3e-4
    assert changed.model.head.noise_repeats == 2
    restored = lm_recipe("mnist", ["optimizer.lr=3e-4", f"optimizer.lr={plain.optimizer.lr}"])
    assert restored == plain


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        lm_recipe("mnist", ["optimizer.lrr=1", "trainer.total_steps=many", "data.batch_size=0"])
    message = str(caught.value)
    assert "optimizer.lrr (Did you mean lr?)" in message
    with pytest.raises(
        ConfigError, match=r"model\.backbone\.hiden_size \(Did you mean hidden_size"
    ):
        lm_recipe("mnist", ["model.backbone.hiden_size=8"])
    assert "trainer.total_steps" in message
    assert "data.batch_size" in message


@pytest.mark.parametrize("change", ["model.hidden_size=10", "model.num_heads=5", "model.kind=gan"])
def test_an_impossible_network_is_refused_in_a_sentence(change):
    with pytest.raises(ConfigError, match="recipe dit-mnist: model"):
        lm_recipe("dit-mnist", [change])


def test_the_posterior_can_be_switched_off_by_name():
    """`none` once became null, so this kind could not be set from the command line."""
    recipe = vae_recipe("mnist", ["tokenizer.posterior.kind=none"])
    assert recipe.tokenizer.posterior.kind == "none"


def test_an_unknown_key_inside_a_union_gets_its_near_names():
    with pytest.raises(ConfigError, match=r"model\.backbone\.hiden_size .Did you mean hidden"):
        lm_recipe("mnist", ["model.backbone.hiden_size=8"])


def test_an_unknown_recipe_names_the_near_ones():
    with pytest.raises(ConfigError, match=r"Did you mean .*latentlm-l"):
        lm_recipe("latentlm_l")


def test_a_file_changes_the_recipe_that_it_names(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "mnist"\n[trainer]\ntotal_steps = 7\n')
    recipe = vae_recipe(str(path), ["trainer.seed=5"])
    assert (recipe.trainer.total_steps, recipe.trainer.seed) == (7, 5)
    assert recipe.tokenizer == vae_recipe("mnist").tokenizer


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[trainer", "cannot be read"), ('recipe = "nope"', "no recipe 'nope'"), ("a = 1", "unknown")],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, content, complaint):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        vae_recipe(str(path))
