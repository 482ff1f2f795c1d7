"""What the demos share: where results go, what each stage is asked, and what the time counts."""

from pathlib import Path
from typing import Any

import pytest

from latentlm_core import workflows
from latentlm_core.demo.stages import Stages, Timer
from latentlm_core.files import read_json
from latentlm_core.progress import SILENT
from latentlm_core.report import ReportPage
from latentlm_core.result import Result


def stages_at(folder: Path, seed: int) -> Stages:
    return Stages("demo-x", "mnist", out=folder, seed=seed, device="cpu", progress=SILENT)


@pytest.mark.parametrize(("seed", "suffix"), [(0, ""), (3, "-seed3")])
def test_stages_follow_one_another(tmp_path, monkeypatch, seed, suffix):
    """Names are those that finished demos have, or a second start would not find them."""
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path))
    asked: list[dict[str, Any]] = []
    for name in ("train_vae", "tokenize", "train_lm"):
        monkeypatch.setattr(workflows, name, lambda **asking: asked.append(asking))
    stages = stages_at(tmp_path / "out", seed)
    stages.train_vae("trainer.total_steps=4")
    stages.tokenize()
    stages.train_lm("latents/y")
    same = {"data": "mnist", "device": "cpu", "progress": SILENT}
    vae = tmp_path / f"runs/demo-x-vae{suffix}"
    overrides = [f"trainer.seed={seed}", "trainer.total_steps=4"]
    assert asked == [
        same | {"recipe": "mnist", "overrides": overrides, "out": vae},
        same | {"vae": str(vae), "out": tmp_path / f"latents/demo-x{suffix}"},
        same
        | {"data": "latents/y", "recipe": "mnist", "overrides": overrides[:1]}
        | {"out": tmp_path / f"runs/demo-x-lm{suffix}"},
    ]
    names = ["train the sigma-VAE", "tokenize", "train the LatentLM"]
    assert list(read_json(tmp_path / "out/seconds.json")) == names


def test_the_report_says_what_the_result_says(tmp_path):
    stages = stages_at(tmp_path, 0)
    details = stages.details(vae=Result("a", {}, details={"of": "vae"}))
    assert list(details) == ["machine", "versions", "seconds", "vae"]
    result = stages.report("Demo", ReportPage("t", "l", {"wer": 0.5}, [], details), "s", "next")
    assert (result.figures, result.files["samples"]) == ({"wer": 0.5}, "s")
    assert read_json(Path(result.files["json"]))["details"] == result.details == details


def test_time_adds_up_until_a_stage_is_complete(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("latentlm_core.demo.stages.time.perf_counter", lambda: float(next(clock)))

    def interrupted() -> None:
        raise KeyboardInterrupt

    path = tmp_path / "seconds.json"
    with pytest.raises(KeyboardInterrupt):
        Timer(path).run("a", interrupted)
    assert Timer(path).seconds == {"a": 10.0}
    assert Timer(path).run("a", lambda: "done") == "done"
    timer = Timer(path)
    timer.run("a", lambda: None)
    timer.run("b", lambda: None)
    assert timer.table().rows == [("a", 20.0), ("b", 10.0)]
    assert timer.total == 30.0
