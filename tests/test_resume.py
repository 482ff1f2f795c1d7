import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentlm_core.errors import ArtifactError, BusyError, CorruptFileError
from latentlm_core.files import locked, read_safetensors
from latentlm_core.training import hardware
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.tasks import Terms
from latentlm_core.training.trainer import TrainResult
from tests.tiny_training import (
    Adversarial,
    Listener,
    Points,
    Regression,
    Stream,
    make,
    noisy,
    traces,
)


def run_until_done(
    folder: Path, make_task: Callable[[], Any], faults: dict[int, BaseException], **config: Any
) -> list[TrainResult]:
    """Start the run again and again, until nothing stops it."""
    stream, results = Stream(faults=faults), []
    for _ in range(20):
        try:
            results.append(make(folder, make_task(), stream, **config).run())
            return results
        except (KeyboardInterrupt, RuntimeError) as stopped:
            results.append(stopped)
    raise AssertionError("the run never ended")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make_task", [noisy, Adversarial])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_again_and_again_equals_the_undisturbed_one(
    tmp_path, make_task, accumulate, fault
):
    config = {"accumulate": accumulate, "validate_every": 6}
    run_until_done(tmp_path / "whole", make_task, {}, **config)
    at = [batch * accumulate for batch in (0, 1, 3, 6, 8, 12)]
    stops = run_until_done(
        tmp_path / "stopped", make_task, {index: fault("stop") for index in at}, **config
    )
    assert len(stops) == len(at) + 1
    expected, rows = traces(tmp_path / "whole")
    hashes, stopped_rows = traces(tmp_path / "stopped")
    assert hashes == expected
    assert expected.keys() == {
        f"{part}.safetensors" for part in ("model", "ema", "optimizer", "figures")
    }
    assert stopped_rows == rows
    assert [row["step"] for row in rows] == [4, 6, 8, 12, 13]
    resumed = stops[-1].resumed_from
    assert resumed == (12 if fault is KeyboardInterrupt else 10)


def test_ctrl_c_in_the_middle_of_a_split_step_goes_back_to_its_beginning(tmp_path):
    run_until_done(tmp_path / "whole", noisy, {}, accumulate=2)
    run_until_done(tmp_path / "stopped", noisy, {9: KeyboardInterrupt()}, accumulate=2)
    assert traces(tmp_path / "stopped") == traces(tmp_path / "whole")


def test_an_interrupt_between_two_turns_saves_no_half_made_step(tmp_path):
    task = Adversarial()
    original, calls = task._judge, []

    def judge(batch: Points, rng: torch.Generator) -> Terms:
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(batch, rng)

    task._judge = judge
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "stopped", task).run()
    assert make(tmp_path / "stopped", Adversarial()).run().resumed_from == 5
    make(tmp_path / "whole", Adversarial()).run()
    assert traces(tmp_path / "stopped") == traces(tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 5, 8, 13])
def test_ctrl_c_from_the_progress_bar_saves_that_step(tmp_path, step):
    def interrupt(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    make(tmp_path / "whole", noisy()).run()
    listener = Listener(on_advance=interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "stopped", noisy(), progress=listener).run()
    assert listener.notes[-1].startswith(f"Stopped after step {step};")
    assert make(tmp_path / "stopped", noisy()).run().resumed_from == step
    assert traces(tmp_path / "stopped") == traces(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_in_the_middle_of_a_step_is_obeyed_after_it(tmp_path, number, error):
    task, before = noisy(), signal.getsignal(number)
    original = task._loss

    def loss(batch: Points, rng: torch.Generator) -> Terms:
        if len(task.events) == 6:
            signal.raise_signal(number)
        return original(batch, rng)

    task._loss = loss
    with pytest.raises(error) as caught:
        make(tmp_path / "stopped", task).run()
    assert signal.getsignal(number) is before
    if error is SystemExit:
        assert caught.value.code == 143
    assert make(tmp_path / "stopped", noisy()).run().resumed_from == 4
    make(tmp_path / "whole", noisy()).run()
    assert traces(tmp_path / "stopped") == traces(tmp_path / "whole")


def test_a_second_ctrl_c_leaves_at_once_and_saves_nothing(tmp_path):
    def hammer(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second one must not come back")

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=Listener(on_advance=hammer)).run()
    assert not (tmp_path / "checkpoints").exists()


def test_a_trainer_runs_once(tmp_path):
    trainer = make(tmp_path, total_steps=1)
    trainer.run()
    with pytest.raises(RuntimeError, match="runs once"):
        trainer.run()


def test_a_finished_run_returns_at_once(tmp_path):
    first = make(tmp_path).run()
    task, stream = Regression(), Stream()
    again = make(tmp_path, task, stream).run()
    assert stream.asked == []
    assert again.resumed_from == again.step == first.step == 13
    assert (again.figures, again.seconds) == (first.figures, first.seconds)
    assert again.samples_seen == 13 * 8
    assert again.metrics_path == tmp_path / "metrics.jsonl"
    average = read_safetensors(tmp_path / "checkpoints" / "step-00000013" / "ema.safetensors")
    assert torch.equal(task.net.weight, average["weight"]), "the export is the average"


def test_another_configuration_is_refused_and_named(tmp_path):
    make(tmp_path).run()
    with pytest.raises(ArtifactError) as caught:
        make(tmp_path, seed=7, log_every=1, run_config={"data": "lines", "sizes": [2, 1]}).run()
    assert str(caught.value) == (
        f"{tmp_path} was started with another configuration: "
        "data is 'points' there and 'lines' here; trainer.seed is 0 there and 7 here."
    )
    with pytest.raises(ArtifactError, match=r"trainer.total_steps is 13 there and 20 here"):
        make(tmp_path, total_steps=20).run()


def test_auto_precision_is_what_it_came_to_where_the_run_began(tmp_path, monkeypatch):
    def run(folder: Path, built_in: bool, **config: Any) -> TrainResult:
        monkeypatch.setattr(hardware, "has_bfloat16", lambda device: built_in)
        return make(folder, noisy(), **config).run()

    run(tmp_path / "whole", built_in=True, precision="bfloat16")
    run(tmp_path / "moved", built_in=True, precision="auto")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-00000013")
    with pytest.raises(ArtifactError) as caught:
        run(tmp_path / "moved", built_in=False, precision="auto")
    named = "trainer.precision is 'bfloat16' there and 'float32' here."
    assert str(caught.value).endswith(named)
    assert "(--set trainer.precision=bfloat16)" in caught.value.hint
    result = run(tmp_path / "moved", built_in=False, precision="bfloat16")
    assert result.resumed_from == 10
    assert traces(tmp_path / "moved") == traces(tmp_path / "whole")
    run(tmp_path / "whole", built_in=True, precision="auto")


def test_a_run_with_a_constant_rate_may_be_prolonged(tmp_path):
    constant = OptimizerConfig(lr=0.02, warmup_steps=2, schedule="constant")
    settings = {"optimizer": constant, "log_every": 1}
    make(tmp_path / "long", noisy(), total_steps=9, **settings).run()
    make(tmp_path / "short", noisy(), total_steps=6, **settings).run()
    result = make(tmp_path / "short", noisy(), total_steps=9, save_every=2, **settings).run()
    assert result.resumed_from == 6
    assert traces(tmp_path / "short")[0] == traces(tmp_path / "long")[0]


def test_a_damaged_checkpoint_stops_the_run_and_harms_nothing(tmp_path):
    make(tmp_path).run()
    path = tmp_path / "checkpoints" / "step-00000013" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CorruptFileError, match=r"step-00000013.ema\.safetensors"):
        make(tmp_path).run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


def test_the_networks_of_another_size_are_refused(tmp_path):
    make(tmp_path).run()
    task = Regression()
    task.net = nn.Linear(2, 3)
    with pytest.raises(ArtifactError, match=r"net\.weight is \(1, 2\) and should be \(3, 2\)"):
        make(tmp_path, task).run()


def test_a_run_that_another_is_writing_is_left_alone(tmp_path):
    stream = Stream()
    with locked(tmp_path), pytest.raises(BusyError):
        make(tmp_path, stream=stream).run()
    assert stream.asked == []
