"""``latentlm doctor`` of what needs no run: logs, data sets, machines."""

import json
import shutil
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.workflows import doctor_machine
from latentlm_core.workflows.doctor_log import check_log
from latentlm_core.workflows.doctor_noise import check_noise
from tests.tiny_doctor import faults, found, warnings

DATA = "embedded:shapes"

# --- logs ------------------------------------------------------------------------------------


def log(folder: Path, rows: list[dict], **options) -> dict[str, tuple[str, str]]:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"step": rows[-1]["step"], "log_every": 10, "posterior": "gaussian"} | options
    return {f.what: (f.state, f.message) for f in check_log(path, **given)}


def rows(*steps: int, **figures) -> list[dict]:
    return [{"step": step, "loss/model": 1.0, **figures} for step in steps]


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ((10, 20, 30), "ok"),
        ((10, 15, 20, 30), "ok"),
        ((20, 40, 50, 60), "ok"),  # log_every was 20 before
        ((20, 30, 40), "warning"),
        ((10, 30, 40), "warning"),
        ((10, 20, 20, 30), "fault"),
        ((10, 30, 20), "fault"),
    ],
)
def test_steps_of_a_log(tmp_path, steps, state):
    assert log(tmp_path, rows(*steps))["log steps"][0] == state


def test_a_log_that_ends_before_its_checkpoint(tmp_path):
    assert "after 30 " in log(tmp_path, rows(10, 20, 30), step=47)["log steps"][1]
    assert log(tmp_path, rows(10, 20, 30), step=39)["log steps"][0] == "ok"


def test_null_is_a_warning_where_other_rows_have_a_number(tmp_path):
    never = log(tmp_path, rows(10, 20, latent=None))
    assert never["log values"][0] == "ok"
    once = log(tmp_path, [*rows(10, latent=None), *rows(20, latent=0.5)])
    assert once["log values"][0] == "warning"
    assert "latent at step 10" in once["log values"][1]


@pytest.mark.parametrize(
    ("ratio", "state"), [(0.05, "warning"), (0.1, "ok"), (0.6, "ok"), (0.97, "warning")]
)
def test_the_noise_of_a_sigma_vae(tmp_path, ratio, state):
    found = log(tmp_path, rows(10, 20, 30, noise_to_signal=ratio, std_mean=2.0))
    assert (found["noise"][0], found["std(mu)"][0]) == (state, "ok")
    learned = log(tmp_path, rows(10, 20, noise_to_signal=ratio), posterior="learned")
    assert "noise" not in learned
    assert check_noise(PosteriorKind.NONE, ratio) == []


def test_std_mu_that_still_grows(tmp_path):
    spread = [
        {"step": step, "noise_to_signal": 0.3, "std_mean": step / 10} for step in (10, 20, 40)
    ]
    assert "std(mu) 2 => 4" in log(tmp_path, spread, log_every=20)["std(mu)"][1]
    assert log(tmp_path, spread, log_every=20)["std(mu)"][0] == "warning"


def test_the_loss_by_timestep_is_the_last_one(tmp_path):
    band = "validation/latent/t0-249"
    learned = log(tmp_path, [*rows(10, **{band: 1.2}), *rows(20, **{band: 0.7}), *rows(30)])
    assert learned["loss by timestep"] == ("ok", "t0-249 0.700")
    idle = log(tmp_path, rows(10, **{band: 1.0}))
    assert "no better than predicting zero" in idle["loss by timestep"][1]


# --- data ------------------------------------------------------------------------------------


def images(folder: Path, count: int) -> list[Path]:
    paths = [folder / "train" / "cats" / f"{index:02d}.png" for index in range(count)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 10, 3), 90, np.uint8)).save(path)
    return paths


def test_a_data_set_says_what_it_has(tmp_path):
    images(tmp_path, 3)
    seen = found(str(tmp_path))
    assert seen["open"] == ("ok", "3 images")
    assert seen["images"] == ("ok", "sides of 8 to 10 pixels")
    assert seen["labels"] == ("ok", "all 3 have one, of 1")
    assert seen["test split"][0] == "warning"
    assert "has no split 'test'" in seen["test split"][1]
    assert "holds out every twentieth of train" in seen["test split"][1]
    shapes = found(DATA)
    assert (shapes["captions"][0], shapes["test split"][0]) == ("ok", "ok")


def test_broken_images_are_a_warning_while_they_are_few(tmp_path):
    paths = images(tmp_path, 16)
    paths[0].write_bytes(b"no image")
    assert "cats/00.png" in warnings(str(tmp_path))["decode"]
    for path in paths[:11]:
        path.write_bytes(b"no image")
    assert "11 of 16 are broken" in faults(str(tmp_path))["decode"]


def test_a_folder_of_texts_and_a_folder_of_nothing(tmp_path):
    (tmp_path / "code.py").write_text("x")
    assert "As recordings: " in faults(str(tmp_path))["open"]
    (tmp_path / "a.txt").write_text("one\ntwo\n" * 50)
    assert found(str(tmp_path))["texts"][0] == "ok"


def test_recordings_without_transcripts(tmp_path):
    from latentlm_core.data.audio import write_wav

    for number, level in enumerate((0.1, 0.0)):
        write_wav(tmp_path / f"{number}.wav", np.full(4000, level, np.float32), 8000)
    (tmp_path / "0.txt").write_text("one")
    seen = found(str(tmp_path))
    assert "silent: " in seen["audio"][1]
    assert seen["transcripts"][1].startswith("1 of 2 have one")
    assert {seen["audio"][0], seen["transcripts"][0]} == {"warning"}


# --- the machine -----------------------------------------------------------------------------


def test_an_absent_extra_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path / "not" / "yet"))
    versions = {"pesq": "0.0.4", "pystoi": "0.4.1", "setuptools": "84.0", "resemblyzer": "0.1.4"}

    def version(name: str) -> str:
        if name in {"lpips", "whisper-normalizer"}:
            raise PackageNotFoundError(name)
        return versions.get(name, "99.0")

    monkeypatch.setattr(doctor_machine, "version", version)
    seen = found(None)
    assert seen["extra lpips"][0] == "warning"
    assert 'pip install "latentlm[lpips]"' in seen["extra lpips"][1]
    assert seen["extra speech"][1].startswith("whisper-normalizer is absent.")
    assert "setuptools is 84.0, not <82" in seen["extra sim"][1]
    assert seen["extra clip"][0] == "ok"
    assert seen["packages"][0] == "ok"
    monkeypatch.setattr(doctor_machine, "version", lambda name: "0.0.1")
    assert 'pip install "torch>=2.11"' in faults_of_machine()["packages"]


def faults_of_machine() -> dict[str, str]:
    return {what: text for what, (state, text) in found(None).items() if state == "fault"}


def test_little_space_and_none(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path))
    for free, state in ((2**40, "ok"), (2**31, "warning"), (2**20, "fault")):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert found(None)["disk"][0] == state


def test_no_compiler_is_a_warning(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert found(None)["compiler"][0] == "warning"


def test_the_packages_are_those_of_the_project():
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]
    assert tuple(project["dependencies"]) == doctor_machine.DEPENDENCIES
    extras = {name: tuple(wanted) for name, wanted in project["optional-dependencies"].items()}
    extras.pop("test")
    assert extras == doctor_machine.EXTRAS
    assert doctor_machine.PURPOSES.keys() == doctor_machine.EXTRAS.keys()
