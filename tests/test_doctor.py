"""``latentlm doctor``: what is sound is called so, and every planted fault is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.data.manifest import LatentSums
from latentlm_core.errors import ArtifactError
from latentlm_core.files import locked, sha256_file
from latentlm_core.training.optim import ema_decay
from latentlm_core.workflows.doctor import doctor
from latentlm_core.workflows.doctor_run import average_age
from tests.tiny_doctor import faults, found, warnings
from tests.tiny_latents import content, flip_bit, rewrite

DATA = "embedded:shapes"
FEW = ["trainer.total_steps=12", "trainer.save_every=6", "trainer.log_every=2"]
VAE, LM, LATENTS = "vae-embedded-shapes", "lm-embedded-shapes", "embedded-shapes"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A workspace with a tokenizer, latents and a LatentLM that were just made."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLM_HOME", str(folder))
        workflows.train_vae(data=DATA, overrides=FEW, device="cpu")
        workflows.tokenize(data=DATA, device="cpu")
        workflows.train_lm(overrides=FEW, device="cpu")
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# --- what is sound ---------------------------------------------------------------------------


def test_what_was_just_made_is_sound_and_stays_as_it_is(home):
    before = content(home)
    for name in (VAE, LM, LATENTS, f"runs/{LM}/export", f"latents/{LATENTS}"):
        assert faults(name) == {}, name
    assert warnings(f"runs/{LM}/export") == {}
    assert warnings(LATENTS).keys() <= {"noise"}, "12 steps do not shape latents"
    assert {"staleness", "tokenizer", "shards"} <= found(LATENTS).keys()
    assert {"average", "loss by timestep", "export tokenizer fit"} <= found(LM).keys()
    assert {"noise", "std(mu)", "checkpoint"} <= found(VAE).keys()
    assert found(VAE)["progress"] == ("ok", "finished: step 12 of 12")
    assert content(home) == before


def test_a_mix_is_examined_part_by_part(home):
    mixed = found(f"text:pydoc=2,latents/{LATENTS}=1")
    assert mixed["text pydoc decode"][0] == "ok"
    assert mixed[f"pairs latents/{LATENTS} shards"][0] == "ok"


def test_what_is_not_there_is_refused_with_the_near_names(home):
    with pytest.raises(ArtifactError, match=f"Did you mean {LM}"):
        doctor(target="lm-embedded-shape")


# --- latents ---------------------------------------------------------------------------------


def test_a_flipped_byte_in_a_shard(home):
    shard = home / "latents" / LATENTS / "shard-00000.safetensors"
    flip_bit(shard, shard.stat().st_size - 5)
    spoilt = found(LATENTS)
    assert spoilt[shard.name][0] == "fault"
    assert "tokenize again" in spoilt[shard.name][1]
    assert spoilt["examples"] == ("warning", "Not examined, for shards are damaged.")
    shard.unlink()
    assert "is missing" in faults(LATENTS)[shard.name]


@pytest.mark.parametrize("field", ["sum", "sum_squares", "sum_variance"])
def test_forged_statistics_that_agree_with_themselves(home, field):
    path = home / "latents" / LATENTS / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = manifest["shards"]
    entry["sums"][field][0] += 1e-3
    merged = LatentSums.merge([LatentSums.model_validate_json(json.dumps(entry["sums"]))], 8)
    rewrite(path, shards=[entry], statistics=merged.to_dict())
    assert "other statistics" in faults(LATENTS)["shard-00000.safetensors"]


def test_a_manifest_that_contradicts_itself(home):
    path = home / "latents" / LATENTS / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"num_examples": 3}))
    assert "num_examples" in faults(LATENTS)["manifest"]


def test_a_set_of_another_tokenizer_than_it_says(home):
    copy = home / "latents" / LATENTS / "tokenizer"
    flip_bit(copy / "model.safetensors", -5)
    assert "not the tokenizer that made" in faults(LATENTS)["tokenizer"]
    shutil.rmtree(copy)
    assert "is missing" in faults(LATENTS)["tokenizer"]


def test_a_set_is_stale_once_its_tokenizer_was_trained_on(home):
    assert found(LATENTS)["staleness"][0] == "ok"
    flip_bit(home / "runs" / VAE / "export" / "model.safetensors", -5)
    state, message = found(LATENTS)["staleness"]
    assert state == "warning"
    assert f"{VAE}, of the same data and recipe, has other weights now" in message
    shutil.rmtree(home / "runs" / VAE)
    assert found(LATENTS)["staleness"][1].startswith("Not examined")


def test_a_set_that_is_not_finished(home):
    folder = home / "latents" / LATENTS
    plan = json.loads((folder / "manifest.json").read_text()) | {"shard_size": 100}
    (folder / "manifest.json").unlink()
    (folder / "progress").mkdir()
    (folder / "progress" / "plan.json").write_text(json.dumps(plan))
    (folder / "progress" / "shard-00000.json").write_text("{}")
    assert faults(LATENTS) == {}
    assert "1 of 3 shards" in warnings(LATENTS)["manifest"]
    with locked(folder):
        assert found(LATENTS)["lock"][1] == "another process is at work: tokenize"


# --- runs ------------------------------------------------------------------------------------


def newest(home: Path, run: str) -> Path:
    return max((home / "runs" / run / "checkpoints").iterdir())


def test_a_damaged_checkpoint(home):
    part = newest(home, VAE) / "ema.safetensors"
    flip_bit(part, -5)
    assert str(part) in faults(VAE)["checkpoint"]
    shutil.rmtree(home / "runs" / VAE / "checkpoints")
    assert "no sound checkpoint" in warnings(VAE)["progress"]


def test_a_checkpoint_whose_weights_are_not_finite(home):
    state = newest(home, LM) / "state.json"
    part = newest(home, LM) / "ema.safetensors"
    tensors = load_file(part)
    name = min(tensors)
    tensors[name].view(-1)[0] = torch.inf
    save_file(tensors, part)
    sealed = json.loads(state.read_text())
    sealed["state"]["files"][part.name] = {
        "num_bytes": part.stat().st_size,
        "sha256": sha256_file(part),
    }
    sealed["sha256"] = digest(sealed["state"])
    state.write_text(json.dumps(sealed))
    assert f"{name} of ema.safetensors" in faults(LM)["checkpoint"]


def digest(state: dict) -> str:
    from latentlm_core.training.checkpoint_state import CheckpointState

    return CheckpointState.model_validate_json(json.dumps(state)).digest()


def test_where_an_unfinished_run_stands(home):
    shutil.rmtree(newest(home, LM))
    assert "step 6 of 12. Run the same command" in warnings(LM)["progress"]
    with locked(home / "runs" / LM):
        assert found(LM)["progress"] == ("ok", "step 6 of 12, at work")
        assert "at work: training" in found(LM)["lock"][1]
    assert found(LM)["lock"][1] == "nobody writes here"


def test_a_run_without_its_export_and_one_with_an_old_one(home):
    path = home / "runs" / LM / "export" / "config.json"
    config = json.loads(path.read_text())
    rewrite(path, provenance=config["provenance"] | {"step": 6})
    assert "the export is of step 6" in warnings(LM)["progress"]
    shutil.rmtree(path.parent)
    assert "without an export" in warnings(LM)["progress"]


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("step", [1, 2, 10, 500])
def test_the_age_of_an_average_is_that_of_its_updates(step, limit):
    share, age = 1.0, 0.0
    for t in range(step):
        decay = ema_decay(t, limit)
        share, age = decay * share, decay * (age + 1)
    assert average_age(step, limit) == pytest.approx((share, age))


def test_a_young_average(home):
    assert found(LM)["average"][0] == "ok"
    shutil.rmtree(home / "runs" / LM / "checkpoints")
    assert "average" not in found(LM)
    workflows.train_lm(overrides=[*FEW, "trainer.total_steps=2"], out=home / "young", device="cpu")
    assert "1.8% of it the initial weights: too young" in warnings(str(home / "young"))["average"]


# --- the log ---------------------------------------------------------------------------------


def test_nan_in_the_metrics_of_a_run(home):
    path = home / "runs" / LM / "metrics.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])
    lines[2] = json.dumps(row | {"loss/model": float("nan")})
    path.write_text("\n".join(lines) + "\n")
    assert faults(LM).keys() == {"log values"}
    assert f"loss/model at step {row['step']}" in faults(LM)["log values"]


def test_a_step_that_is_there_twice(home):
    path = home / "runs" / LM / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[2:]]))
    assert faults(LM).keys() == {"log steps"}
    assert f"twice: {json.loads(lines[2])['step']}." in faults(LM)["log steps"]
    path.write_text("".join(lines[:2] + lines[3:]))
    assert f"after {json.loads(lines[1])['step']} " in warnings(LM)["log steps"]
    path.write_text("no object\n")
    assert "line 1 is no JSON object" in faults(LM)["log"]


# --- exports ---------------------------------------------------------------------------------


def test_truncated_weights(home):
    path = home / "runs" / LM / "export" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in faults(LM)["export weights"]
    path.unlink()
    assert "There is no file" in faults(f"runs/{LM}/export")["weights"]


def test_weights_that_are_not_finite_or_do_not_fit(home):
    path = home / "runs" / VAE / "export" / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path)
    assert f"not finite in {name}" in faults(VAE)["export weights"]
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert f"{name} differ" in faults(VAE)["export weights"]


def test_a_config_that_is_not_valid(home):
    path = home / "runs" / LM / "export" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"classes": ["a"]}))
    assert "vocabulary" in faults(f"runs/{LM}/export")["config"]
    path.write_text(json.dumps(config))
    rewrite(path, stats=config["stats"] | {"scale": [0.0]})
    assert "normalisation" in faults(f"runs/{LM}/export")["config"]
    path.write_text("{")
    assert "not valid JSON" in faults(f"runs/{LM}/export")["config"]


def test_an_export_with_the_tokenizer_of_another(home):
    inside = home / "runs" / LM / "export" / "tokenizer"
    flip_bit(inside / "model.safetensors", -5)
    assert faults(f"runs/{LM}/export").keys() == {"tokenizer fit"}
    shutil.rmtree(inside)
    assert faults(f"runs/{LM}/export").keys() == {"tokenizer config"}


def test_the_text_tokenizer_of_a_model_that_reads_text(multimodal_home, tmp_path):
    run = next(path for path in sorted((multimodal_home / "runs").iterdir()) if reads_text(path))
    export = tmp_path / "export"
    shutil.copytree(run / "export", export)
    assert faults(str(export)) == {}
    assert found(str(export))["text"][0] == "ok"
    document = json.loads((export / "text.json").read_text())
    (export / "text.json").write_text(json.dumps(document | {"version": 99}))
    assert "text.json" in faults(str(export))["text"]
    (export / "text.json").write_text(json.dumps(document))
    rewrite(export / "config.json", text_sha256="0" * 64)
    assert "not the text tokenizer of the model" in faults(str(export))["text"]
    assert "Copy the one of the run that made it." in faults(str(export))["text"]


def reads_text(run: Path) -> bool:
    return (run / "export" / "text.json").is_file()


# --- the command -----------------------------------------------------------------------------


def test_the_exit_code_tells_whether_there_is_a_fault(home):
    runner = CliRunner(env={"RANK": None})
    sound = runner.invoke(app, f"doctor runs/{LM} --json")
    assert sound.exit_code == 0
    assert json.loads(sound.stdout)["details"]["faults"] == 0
    (home / "runs" / LM / "export" / "model.safetensors").write_bytes(b"")
    done = runner.invoke(app, f"doctor runs/{LM}")
    assert done.exit_code == 1
    assert "1 fault," in done.stdout.splitlines()[0]
    assert len([line for line in done.stdout.splitlines() if " fault  " in line]) == 1
    assert done.stderr == ""
