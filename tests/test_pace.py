"""How fast a run trains: what is counted, over which time, against which ceiling."""

import time

import pytest
import torch

from latentlm_core.models.cost import training_flops
from latentlm_core.training import pace, peak
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.pace import Pace
from latentlm_core.training.peak import measured_flops, peak_flops
from latentlm_core.training.runlog import read_metrics, shown_figures
from latentlm_core.training.tasks import Work
from latentlm_core.training.trainer import Trainer
from latentlm_core.training.trainer_config import TrainerConfig
from tests.tiny_parallel import make_dit, make_lm
from tests.tiny_training import TIMING, Listener, Regression, make

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to it."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_figures_are_of_the_time_since_the_last_restart(clock):
    one = Pace(lambda: 1000.0)
    for samples in (1, 2):
        clock.now += 1
        one.count(samples, Work(10 * samples, 100 * samples))
    one.wait(0.5)
    row = {
        "samples_per_second": 1.5,
        "tokens_per_second": 15.0,
        "flops_utilisation": 0.15,
        "data_wait_share": 0.25,
    }
    assert one.figures() == row
    clock.now += 50  # a validation
    one.restart()
    clock.now += 2
    one.count(1, Work(10, 1500))
    assert one.figures()["flops_utilisation"] == 0.75
    assert one.overall() == {
        "samples_per_second": 1.0,
        "tokens_per_second": 10.0,
        "flops_utilisation": 0.45,
        "data_wait_share": 0.125,
    }


def test_a_task_that_tells_no_work_has_no_utilisation_and_asks_for_no_ceiling(clock):
    one = Pace(lambda: pytest.fail("nobody needs it"))
    assert one.overall() == {}
    clock.now += 2
    one.count(8, Work())
    assert one.figures() == {"samples_per_second": 4.0, "data_wait_share": 0.0}


@pytest.mark.parametrize("made", [make_lm, make_dit])
def test_a_run_logs_shows_and_returns_its_speed(tmp_path, monkeypatch, made):
    monkeypatch.setattr("latentlm_core.training.trainer.peak_flops", lambda device, dtype: 1e9)
    task, stream = made()
    heard: dict[str, float] = {}

    class Ear(Listener):
        def advance(self, amount: int = 1, **figures: float) -> None:
            heard.update(figures)

    config = TrainerConfig(total_steps=4, log_every=2, accumulate=2, precision="float32")
    trainer = Trainer(config, task, stream, {"model": OptimizerConfig()}, tmp_path, CPU, {}, Ear())
    began = time.perf_counter()
    result = trainer.run()
    took = time.perf_counter() - began
    layouts = [stream.batch(number).layout for number in range(8)]
    tokens = sum(layout.extent.positions for layout in layouts)
    flops = sum(training_flops(task.model.config, layout) for layout in layouts)
    speed = result.speed
    assert set(speed) == TIMING
    assert speed["tokens_per_second"] > tokens / took
    assert speed["flops_utilisation"] / speed["tokens_per_second"] == pytest.approx(
        flops / tokens / 1e9
    )
    for row in read_metrics(result.metrics_path):
        assert row.keys() >= TIMING
    assert set(heard) == {"loss", "tokens/s", "MFU", "waiting"}
    assert (
        Trainer(config, task, stream, {"model": OptimizerConfig()}, tmp_path, CPU, {}).run().speed
        == {}
    )


def test_a_bar_shows_what_there_is():
    turn = Regression().turns(0)[0]
    assert shown_figures(turn, {"loss/main": 2.0, "squared": 3.0}) == {"loss": 2.0}


def test_other_tasks_have_the_rest(tmp_path):
    result = make(tmp_path).run()
    assert set(result.speed) == {"samples_per_second", "data_wait_share"}


def test_a_ceiling_is_measured_once_or_known_by_name(monkeypatch):
    assert 1e8 < measured_flops(CPU, torch.float32) < 1e14
    monkeypatch.setattr(peak, "measured_flops", lambda device, dtype: 7.0)
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GeForce RTX 2080": 7.0,
    }
    for index, (name, flops) in enumerate(names.items()):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", index), torch.bfloat16) == flops
        assert peak_flops(torch.device("cuda", index), torch.float32) == 7.0
    peak_flops.cache_clear()
