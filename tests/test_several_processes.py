"""Commands that several processes run together: the same files and figures for any number."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.demo import demo
from latentlm_core.errors import ConfigError
from tests import tiny_evaluation, tiny_multimodal, tiny_speaking
from tests.tiny_latents import content
from tests.tiny_processes import Command, launch, results, torchrun

CPU = "--device cpu --json"
SPEECH_JUDGES = "--recogniser none --encoder none"
MAKING: list[Command] = [
    ("pictures", f"tokenize --data embedded:shapes --vae runs/vae --flip --batch-size 8 {CPU}"),
    ("pictures", f"sample --class 3 --class 1 -n 5 --batch-size 2 --npz --out samples/s {CPU}"),
    ("speech", f"tokenize --data speech --vae runs/vae --out latents/again {CPU}"),
    (
        "speech",
        "sample --text seven --text nine -n 3 --batch-size 2 --voice speech/test/bert/1.wav "
        f"--out samples/said {CPU}",
    ),
    ("pages", f"sample --prompt 'a red' -n 5 --batch-size 2 --model pages --out samples/d {CPU}"),
    ("pages", f"sample --text-only 'text 3' --max-tokens 9 --model words --out samples/t {CPU}"),
]
MEASURING: list[Command] = [
    ("pictures", f"eval fid --samples samples/s --extractor judge --batch-size 3 {CPU}"),
    ("pictures", f"eval recon --data embedded:shapes --extractor judge -n 20 --batch-size 6 {CPU}"),
    ("pictures", f"eval sweep --cfg 1,2 --steps 2 -n 6 --extractor judge --batch-size 4 {CPU}"),
    (
        "pictures",
        f"eval stats --data embedded:shapes --image-size 32 --extractor judge --out r.npz {CPU}",
    ),
    ("speech", f"eval recon --data speech {SPEECH_JUDGES} {CPU}"),
    ("pages", f"eval caption --data shapes --model pages --batch-size 2 {CPU}"),
    ("pages", f"eval vqa --data shapes --model pages --batch-size 3 {CPU}"),
    ("pages", f"eval ppl --data texts --model words --batch-size 4 {CPU}"),
]
TIMES = (
    *("real_time_factor", "images_per_second", "clips_per_second"),
    *("data_wait_share", "write_wait_share"),
)
"""Figures that differ from run to run."""
STOPPED = "Stopped, because another process of this command has ended."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspaces of untrained and hardly trained models: pictures, speech, pages."""
    folder = tmp_path_factory.mktemp("root")
    tiny_evaluation.make_home(folder / "pictures")
    tiny_speaking.make_home(folder / "speech")
    tiny_multimodal.make_home(folder / "pages")
    return folder


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """What one process makes and measures: the folder, and the results."""
    return together(root, 1, tmp_path_factory.mktemp("alone"))


def together(root: Path, size: int, folder: Path) -> tuple[Path, list[Any]]:
    copy = shutil.copytree(root, folder / "root")
    found = results(launch(size, MAKING + MEASURING, copy))
    for result in found:
        for name in TIMES:
            result["figures"].pop(name, None)
    return copy, found


@pytest.mark.parametrize("size", [2, 3])
def test_files_and_figures_do_not_depend_on_the_number_of_processes(root, alone, tmp_path, size):
    folder, found = together(root, size, tmp_path)
    assert found == alone[1]
    made, expected = content(folder), content(alone[0])
    assert made.keys() == expected.keys()
    assert [name for name in made if made[name] != expected[name]] == []
    assert len(list(folder.glob("pictures/latents/*/shard-*"))) == 7
    assert len(list(folder.glob("speech/latents/again/shard-*"))) == 3
    assert len(list(folder.glob("pictures/samples/s/0*.png"))) == 10


@pytest.mark.parametrize(
    ("command", "place", "death", "size"),
    [(MAKING[0], "pictures/latents", (1, 3), 3), (MAKING[1], "pictures/samples", (0, 5), 1)],
)
def test_what_a_killed_process_leaves_is_gone_on_with_by_another_number(
    root, alone, tmp_path, command, place, death, size
):
    folder = shutil.copytree(root, tmp_path / "root")
    done = launch(2, [command], folder, death)
    killed, other = done[death[0]], done[1 - death[0]]
    assert killed.returncode == -9
    assert other.returncode == 1
    assert "Traceback (most recent" not in other.stderr
    assert (STOPPED in other.stderr.splitlines()) == (killed is not done[0])  # rank 0 speaks
    begun = {path.name for path in (folder / place).rglob("*")}
    assert any(name.endswith(".part") for name in begun)
    assert not {"manifest.json", "grid.png"} & begun
    results(launch(size, [command], folder))
    made, expected = content(folder / place), content(alone[0] / place)
    expected = {name: one for name, one in expected.items() if "/evaluation/" not in name}
    assert {name for name in made if ".part" not in name} == expected.keys()
    assert [name for name in expected if made[name] != expected[name]] == []


def test_a_wrong_option_is_told_by_rank_0():
    words = ["sample", "--steps", "some"]
    told, untold = (CliRunner().invoke(app, words, env={"RANK": rank}) for rank in "01")
    assert (told.exit_code, untold.exit_code) == (2, 2)
    assert "Invalid value for '--steps'" in told.stderr
    assert untold.output == ""


def test_an_error_of_one_process_names_its_rank(root, tmp_path):
    folder = shutil.copytree(root / "pictures", tmp_path / "pictures")
    workflows.sample(model=str(folder / "runs/lm"), num_samples=4, out=folder / "s", device="cpu")
    (folder / "s/000003.png").write_bytes(b"no picture")
    command = f"eval fid --samples s --extractor judge --batch-size 2 {CPU}"
    first, second = launch(2, [("pictures", command)], tmp_path)
    assert (first.returncode, second.returncode) == (1, 1)
    assert re.search(r"^Error \(rank 1\): .*000003.png", second.stderr, re.MULTILINE)
    assert first.stderr.splitlines()[-1] == STOPPED
    assert "Error" not in first.stderr


def test_torchrun_tells_an_error_once(root):
    done = torchrun(2, ["sample", "--model", "nowhere", "--device", "cpu"], root / "pictures")
    sentence = "nowhere is neither a run, an export nor a hub id."
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count(f"Error: {sentence}") == 1
    assert "(rank 1)" not in done.stderr
    assert f"traceback : {sentence}" in done.stderr  # torchrun's own report ends with it


def test_a_demo_is_one_process(root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process: start it without torchrun"):
        demo(out=root / "demo")
