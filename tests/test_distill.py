"""``train-lm --distill`` as a user meets it: a run, its export, samples of it, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.artifacts import load_generator
from latentlm_core.errors import ArtifactError, ConfigError
from latentlm_core.export_config import GeneratorExport, read_config
from latentlm_core.files import sha256_file
from latentlm_core.models.few_step import FewStepHead
from tests.test_cli import runner
from tests.tiny_latents import rewrite
from tests.tiny_training import Listener, traces

DATA = "embedded:shapes"
FEW = ["trainer.total_steps=6", "trainer.save_every=3", "trainer.log_every=2"]
SOME = [*FEW, "distill.teacher_steps=4", "data.batch_size=8", "data.held_out=0.005"]
TEACHER = "lm-embedded-shapes"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A workspace with a teacher, a student and what they come from."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLM_HOME", str(folder))
        workflows.train_vae(data=DATA, overrides=FEW, device="cpu")
        workflows.tokenize(data=DATA, device="cpu")
        workflows.train_lm(overrides=FEW, device="cpu")
        distill()
    return folder


@pytest.fixture(autouse=True)
def _workspace(request, monkeypatch):
    if "home" in request.fixturenames:
        monkeypatch.setenv("LATENTLM_HOME", str(request.getfixturevalue("home")))


def distill(out: Path | None = None, overrides=(), teacher: str = TEACHER, **settings):
    return workflows.distill(
        teacher=teacher, overrides=[*SOME, *overrides], out=out, device="cpu", **settings
    )


def sample(out: Path, model: str = f"{TEACHER}-few-step", **settings):
    return workflows.sample(model=model, num_samples=3, out=out, device="cpu", **settings)


def test_the_export_is_the_teachers_but_for_the_head(home):
    taught, made = (
        load_generator(home / "runs" / name / "export", CPU)
        for name in (TEACHER, f"{TEACHER}-few-step")
    )
    theirs, ours = taught.model.state_dict(), made.model.state_dict()
    changed = {name for name, weight in theirs.items() if not torch.equal(weight, ours[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)
    assert isinstance(made.model.head, FewStepHead)
    few_step = made.config.model.few_step
    assert (few_step.steps, few_step.guidance_scale) == ((1, 2, 4), 1.5)
    assert made.config.sampler.solver == "few-step"
    assert made.config.provenance["teacher"]["sha256"] == taught.sha256
    same = {"stats", "grid", "classes", "tokenizer_sha256"}
    assert made.config.model_dump(include=same) == taught.config.model_dump(include=same)
    assert made.config.provenance["figures"]["validation/distance/4 steps"] > 0


def test_a_distillation_that_is_stopped_ends_as_an_undisturbed_one(home, tmp_path):
    def press(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path / "run", progress=Listener(press))
    distill(tmp_path / "run")
    undisturbed = home / "runs" / f"{TEACHER}-few-step"
    assert traces(tmp_path / "run") == traces(undisturbed)
    ours, theirs = (
        load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", undisturbed)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_start_reuses_what_is_done(home):
    export = home / "runs" / f"{TEACHER}-few-step/export/model.safetensors"
    before = sha256_file(export)
    assert distill().figures["step"] == 6
    assert sha256_file(export) == before


def test_it_draws_in_1_2_or_4_steps(home, tmp_path):
    for steps in (1, 2, 4):
        drawn = sample(tmp_path / f"{steps}", num_inference_steps=steps)
        assert drawn.figures["steps"] == steps
        assert drawn.figures["guidance_scale"] == 1.5
    whole = {sha256_file(tmp_path / name / "000000.png") for name in "124"}
    assert len(whole) == 3
    assert sample(tmp_path / "4").figures["steps"] == 4


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"num_inference_steps": 3}, "distilled for 1, 2, 4 steps, not 3"),
        ({"guidance_scale": 2.0}, "no changing its guidance_scale 1.5 to 2.0"),
        ({"guidance_schedule": "linear"}, "no changing its guidance_schedule constant to linear"),
        ({"solver": "dpmsolver++"}, "its solver is few-step, not dpmsolver"),
    ],
)
def test_other_settings_than_its_own_are_refused(home, tmp_path, asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sample(tmp_path / "other", **asked)
    assert not (tmp_path / "other").exists()


def test_an_ordinary_head_does_not_take_its_solver(home, tmp_path):
    with pytest.raises(ConfigError, match="needs a model whose head was distilled"):
        sample(tmp_path / "other", model=TEACHER, solver="few-step")


def test_who_cannot_be_a_teacher_is_told_why(home, tmp_path):
    with pytest.raises(ArtifactError, match="has a few-step head already"):
        distill(teacher=f"{TEACHER}-few-step")
    workflows.train_lm(recipe="dit-tiny", overrides=FEW, out=tmp_path / "dit", device="cpu")
    with pytest.raises(
        ArtifactError, match="is a dit, and --distill is for the heads of LatentLMs"
    ):
        distill(teacher=str(tmp_path / "dit"))


def test_other_latents_than_the_teachers_are_refused(home, tmp_path):
    other = tmp_path / "run/export"
    export = home / "runs" / TEACHER / "export"
    other.mkdir(parents=True)
    for path in export.iterdir():
        (other / path.name).symlink_to(path)
    (other / "config.json").unlink()
    config = json.loads((export / "config.json").read_text())
    config["stats"]["scale"] = [2.0]
    (other / "config.json").write_text(json.dumps(config))
    rewrite(other / "config.json")
    with pytest.raises(ArtifactError, match=r"is not what .* learned from: another normalisation"):
        distill(tmp_path / "out", teacher=str(tmp_path / "run"))


def test_a_dry_run_touches_nothing(home, tmp_path):
    plan = distill(tmp_path / "out", dry_run=True)
    assert plan.figures["steps"] == "1, 2, 4"
    assert not (tmp_path / "out").exists()


def test_the_guidance_can_be_chosen_and_may_rise(home, tmp_path):
    chosen = ["distill.guidance_scale=3", "distill.guidance_schedule=linear", "distill.steps=[2]"]
    distill(tmp_path / "run", chosen)
    config = read_config(tmp_path / "run/export", GeneratorExport)
    few_step = config.model.few_step
    assert (few_step.steps, few_step.guidance_scale) == ((2,), 3.0)
    drawn = sample(tmp_path / "drawn", model=str(tmp_path / "run"), guidance_schedule="linear")
    assert (drawn.figures["steps"], drawn.figures["guidance_scale"]) == (2, 3.0)


def test_the_command_line_distils(home, tmp_path):
    settings = [f"--set={each}" for each in SOME]
    command = ["train-lm", "--distill", TEACHER, *settings, "--out", str(tmp_path / "run")]
    done = runner.invoke(app, [*command, "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["step"] == 6
    assert sha256_file(tmp_path / "run/export/model.safetensors") == sha256_file(
        home / "runs" / f"{TEACHER}-few-step/export/model.safetensors"
    )
    refused = runner.invoke(app, [*command, "--init", "hf:ORG/NAME"])
    assert refused.exit_code == 2
    assert "--distill begins with a LatentLM, so --init cannot" in " ".join(refused.stderr.split())
