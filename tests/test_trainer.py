import ctypes
import math
import platform
import sys

import pytest
import torch

from latentlm_core.errors import (
    ConfigError,
    TrainingError,
)
from latentlm_core.files import read_safetensors
from latentlm_core.training.hardware import (
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    autocast_dtype,
    keep_freed_memory,
)
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.trainer import Trainer
from latentlm_core.training.trainer_config import TrainerConfig
from tests.tiny_training import (
    Listener,
    Regression,
    Stream,
    make,
)


@pytest.mark.parametrize("spoiled", [math.nan, 1e30])
def test_a_step_that_is_not_finite_stops_before_the_optimizer(tmp_path, spoiled):
    task = Regression()
    with pytest.raises(TrainingError) as caught:
        make(tmp_path, task, Stream(spoil={7: spoiled}), save_every=1, keep_checkpoints=9).run()
    message = str(caught.value)
    assert message.startswith("Step 8 is not finite and was not applied (squared = ")
    assert "b7-0, b7-1, b7-2" in message
    last = max((tmp_path / "checkpoints").iterdir())
    assert last.name == "step-00000007"
    saved = read_safetensors(last / "model.safetensors")
    assert torch.equal(task.net.weight, saved["net.weight"])
    assert torch.equal(task.net.bias, saved["net.bias"])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4]


def test_a_row_holds_the_means_of_its_interval(tmp_path):
    make(tmp_path / "each", total_steps=4, log_every=1).run()
    result = make(tmp_path / "four", total_steps=4).run()
    rows = read_metrics(tmp_path / "each" / "metrics.jsonl")
    (row,) = read_metrics(tmp_path / "four" / "metrics.jsonl")
    assert next(iter(row)) == "step"
    assert row["samples_seen"] == 32
    for name in ("squared", "largest", "loss/main", "grad_norm/main"):
        assert row[name] == pytest.approx(sum(each[name] for each in rows) / 4, rel=1e-6)
    assert row["lr/main"] == OptimizerConfig(lr=0.02, warmup_steps=2).learning_rate(3, 4)
    assert row["samples_per_second"] > 0
    assert 0 <= row["data_wait_share"] <= 1
    assert result.figures == {name: row[name] for name in row if name != "step"}


def test_validation_uses_the_average_and_fixed_draws(tmp_path):
    task, stream = Regression(), Stream()
    make(tmp_path, task, stream, total_steps=8, validate_every=4, save_every=4, log_every=8).run()
    assert stream.asked[:3] == [-1, -1, 0], "two held-out batches come before the first step"
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8]
    assert "squared" not in rows[0]
    assert rows[0]["validation/draw"] == rows[1]["validation/draw"]
    for row in rows:
        folder = tmp_path / "checkpoints" / f"step-{row['step']:08d}"
        average = read_safetensors(folder / "ema.safetensors")["weight"]
        own = read_safetensors(folder / "model.safetensors")["net.weight"]
        assert row["validation/weight"] == pytest.approx(average.sum().item(), rel=1e-6)
        assert not torch.equal(own, average)
    assert rows[1]["validation/squared"] < rows[0]["validation/squared"]


def test_no_held_out_batches_are_no_error(tmp_path):
    figures = make(tmp_path, stream=Stream(held_out_batches=0)).run().figures
    assert not any(name.startswith("validation/") for name in figures)


def test_a_warning_is_passed_on_once_though_its_number_changes(tmp_path):
    listener = Listener()
    make(tmp_path, progress=listener).run()
    assert len(listener.warnings) == 1
    assert listener.warnings[0].startswith("The loss is ")


def test_a_turn_without_an_optimizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="turn main of the task regression has no optimizer"):
        Trainer(
            TrainerConfig(total_steps=1),
            Regression(),
            Stream(),
            {"mian": OptimizerConfig()},
            tmp_path,
            torch.device("cpu"),
            {},
        )


def test_bfloat16_is_for_the_products_and_float32_for_the_weights(tmp_path):
    task = Regression()
    figures = make(tmp_path, task, precision="bfloat16").run().figures
    assert task.output_dtype == torch.bfloat16
    assert task.net.weight.dtype == torch.float32
    assert math.isfinite(figures["loss/main"])
    make(tmp_path / "auto", task, precision="auto").run()
    assert task.output_dtype == autocast_dtype("auto", torch.device("cpu"))


def test_the_trainer_fits_a_line(tmp_path):
    task = Regression()
    optimizer = OptimizerConfig(lr=0.1, warmup_steps=10, weight_decay=0.0)
    result = make(
        tmp_path, task, optimizer=optimizer, total_steps=300, log_every=300, save_every=300,
        ema_decay=0.9,
    ).run()  # fmt: skip
    assert task.net.weight.flatten().tolist() == pytest.approx([3.0, -2.0], abs=0.01)
    assert task.net.bias.item() == pytest.approx(0.5, abs=0.01)
    assert result.figures["validation/squared"] < 1e-3


def test_old_checkpoints_go(tmp_path):
    make(tmp_path, save_every=2, keep_checkpoints=3).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000012", "step-00000013"]


def test_only_a_processor_with_glibc_is_told_to_keep_memory(monkeypatch):
    told = {}

    class Library:
        @staticmethod
        def mallopt(name: int, value: int) -> int:
            told[name] = value
            return 1

    keep_freed_memory(torch.device("meta"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    keep_freed_memory(torch.device("cpu"))
    assert told == {}
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    keep_freed_memory(torch.device("cpu"))
    assert told == {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**30}


def test_compiling_without_a_compiler_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ConfigError, match="no-such-compiler -O3 is not on this machine") as caught:
        make(tmp_path, compile=True)
    assert "trainer.compile=false" in caught.value.hint
    monkeypatch.setenv("CXX", sys.executable)
    make(tmp_path, compile=True)
