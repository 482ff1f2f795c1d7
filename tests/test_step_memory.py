"""Training that runs out of memory says what to change."""

import pytest
import torch

from latentlm_core.errors import LatentLMError, TrainingError
from latentlm_core.recipes import distill_recipe, lm_recipe, vae_recipe
from latentlm_core.training.step import Stepper
from latentlm_core.workflows import train_lm
from latentlm_core.workflows.step_memory import fitting_step
from tests.test_packing import make_latents

CPU = torch.device("cpu")


def told(recipe, error: BaseException) -> TrainingError:
    with pytest.raises(TrainingError) as caught, fitting_step(recipe, CPU):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(
    ("recipe", "size", "half"),
    [
        (lm_recipe("tiny", ["data.batch_size=64"]), "data.batch_size = 64", "data.batch_size=32"),
        (
            lm_recipe("multimodal-tiny", ["data.batch_elements=4096"]),
            "data.batch_elements = 4096",
            "data.batch_elements=2048",
        ),
        (vae_recipe("tiny", ["data.batch_size=64"]), "data.batch_size = 64", "data.batch_size=32"),
        (
            distill_recipe("few-step", lm_recipe("tiny", ["data.batch_size=64"]).data.to_dict()),
            "data.batch_size = 64",
            "data.batch_size=32",
        ),
    ],
)
def test_half_as_much_at_a_time_is_named_in_the_words_of_the_recipe(recipe, size, half):
    error = told(recipe, torch.OutOfMemoryError("CUDA out of memory."))
    assert f"A step with {size} does not fit into the memory of" in str(error)
    accumulate = 2 * recipe.trainer.accumulate
    assert f"--set {half} --set trainer.accumulate={accumulate}" in error.hint
    assert "trainer.recompute=true" in error.hint


def test_what_does_not_help_is_not_advised():
    smallest = ["data.batch_size=1", "trainer.recompute=true"]
    error = told(lm_recipe("tiny", smallest), MemoryError())
    assert error.hint == "Take a smaller model or another --device."
    computed_twice = told(lm_recipe("tiny", smallest[1:]), MemoryError())
    assert "recompute" not in computed_twice.hint


def test_other_faults_are_faults():
    with pytest.raises(RuntimeError, match="shapes"), fitting_step(lm_recipe("tiny"), CPU):
        raise RuntimeError("shapes differ")


def test_a_run_whose_step_does_not_fit_ends_with_a_sentence(tmp_path, monkeypatch):
    def step(self, turns, batches, step):
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Stepper, "step", step)
    make_latents(tmp_path)
    overrides = ["data.batch_size=6", "trainer.total_steps=2"]
    with pytest.raises(LatentLMError, match=r"A step with data\.batch_size = 6 does not fit"):
        train_lm(
            data=str(tmp_path / "latents"),
            recipe="tiny",
            overrides=overrides,
            out=tmp_path / "run",
            device="cpu",
        )
