"""The script of the figures of speed: every part runs, in small, and none takes others with it."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from latentlm_core.artifacts import build_generator
from latentlm_core.errors import LatentLMError
from latentlm_core.recipes import lm_recipe, vae_recipe
from latentlm_core.result import Result
from latentlm_core.workflows.bench_models import sized_model

SCRIPT = Path(__file__).parents[1] / "examples" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", SCRIPT)
    module = sys.modules["speed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["speed"]


def found(value: object) -> Result:
    return Result("found", {}, details={"rows": [{"value": value}]})


def test_the_table_of_a_gpu_is_made_in_small_on_a_cpu(speed, tmp_path, capsys):
    sizes = speed.Sizes(
        model="tiny",
        rival="dit-tiny",
        num_latents=16,
        tokenizer=vae_recipe("tiny").tokenizer,
        batches={2: 5, 1: 15},
        rival_batches={2: 2.84},
        training_batch=4,
        training={"eager": (), "blocks computed twice": ("trainer.recompute=true",)},
        modes=("auto", "eager"),
        dtype="float32",
        device="cpu",
        rounds=1,
        image_recipe="tiny",
        num_pictures=4,
    )
    parts = speed.on_a_gpu(tmp_path, sizes)
    file = tmp_path / "speed.json"
    report = speed.measure(parts, file, 9)
    assert json.loads(file.read_text()) == report
    assert list(report) == [part.name for part in parts]
    assert len(report) == 10
    on_a_cpu = {"share_of_bound"}
    for part in parts:
        assert "error" not in report[part.name], report[part.name]
        (row,) = report[part.name]["details"]["rows"]
        assert set(part.aims) - on_a_cpu <= set(row)
    told = capsys.readouterr().out
    assert len([line for line in told.splitlines() if not line.startswith("  !")]) == len(parts)
    assert "(at least 2.84)" in told


def test_what_a_gpu_is_to_measure_fits_together(speed):
    sizes = speed.Sizes()
    assert math.prod(sizes.tokenizer.network.grid((3, 32, 32))) == sizes.num_latents
    counts = []
    for name in (sizes.model, sizes.rival):
        with torch.device("meta"):
            model = build_generator(sized_model(lm_recipe(name).model, sizes.num_latents))
        counts.append(sum(part.numel() for part in model.parameters()))
    assert counts == pytest.approx([479e6] * 2, rel=0.06)
    for overrides in sizes.training.values():
        lm_recipe(sizes.model, overrides)


def test_what_fails_is_told_and_the_rest_is_measured(speed, tmp_path, capsys):
    def fail(heard):
        heard.warn("this will not do")
        raise LatentLMError("it did not")

    parts = [
        speed.Part("one", fail),
        speed.Part("two", lambda heard: found(3), {"value": "4"}),
    ]
    report = speed.measure(parts, None, 9)
    assert (report["one"]["error"], report["one"]["warnings"]) == (
        "it did not",
        ["this will not do"],
    )
    assert report["two"]["details"]["rows"] == [{"value": 3}]
    told = capsys.readouterr().out
    assert "value 3 (4)" in told
    assert "failed: it did not" in told
    assert "! this will not do" in told


def test_what_there_is_no_time_for_is_named(speed, tmp_path, capsys):
    file = tmp_path / "speed.json"
    parts = [speed.Part(name, lambda heard: found(1)) for name in ("one", "two")]
    assert speed.measure(parts, file, -1) == {"skipped": ["one", "two"]}
    assert json.loads(file.read_text()) == {"skipped": ["one", "two"]}
    assert "No time for: one, two." in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_missed_before_anything_runs(speed, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(speed, "measure", None)
    with pytest.raises(SystemExit, match="2"):
        speed.main(["--gpu"])
    assert "is not on this machine" in capsys.readouterr().err
