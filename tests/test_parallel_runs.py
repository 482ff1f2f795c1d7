"""Runs of several processes as users meet them: stopped, not finite, of a command."""

import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core import workflows
from latentlm_core.draws import WHOLE, Share
from latentlm_core.errors import TrainingError
from latentlm_core.files import locked, read_safetensors
from latentlm_core.processes import ALONE, current
from latentlm_core.training.interrupt import deferred_signals
from latentlm_core.training.runlog import read_metrics
from tests.crew import crew
from tests.test_parallel import assert_same
from tests.tiny_parallel import Sequences, make_trainer, train
from tests.tiny_processes import torchrun

SHAPES = "embedded:shapes"
VAE = "runs/vae-embedded-shapes"
SMALL = [
    "trainer.total_steps=4",
    "trainer.log_every=2",
    "trainer.accumulate=2",
    "trainer.precision=float32",
    "optimizer.eps=1e-4",
    "data.batch_size=4",
]
"""With an eps beside which gradients that are rounding alone do not move a weight."""


@dataclass
class Signalling(Sequences):
    """Batches that come with a signal to one of the processes."""

    rank: int = 1
    number: signal.Signals = signal.SIGTERM
    at: int = 0

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[Any]:
        for place, number in enumerate(numbers):
            if place == self.at and current().rank == self.rank:
                signal.raise_signal(self.number)
            yield self.batch(number).share(*share)


def stop_at(folder: Path, how: str, stream: Signalling) -> tuple[str, int]:
    """How a run ends whose processes do not all hear of a signal, and after which step."""
    trainer = make_trainer(folder, "lm", stream, parallel=how)
    try:
        trainer.run()
    except (SystemExit, KeyboardInterrupt) as stopped:
        return repr(stopped), trainer._state.step
    raise AssertionError("the run went on")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, how, number):
    stream = Signalling(rank=1, number=number, at=2)
    ended = "SystemExit(143)" if number == signal.SIGTERM else "KeyboardInterrupt()"
    assert crew().run(2, stop_at, tmp_path / "run", how, stream) == [(ended, 3)] * 2
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "step-00000003"
    one = train(tmp_path / "one", "lm")
    other = {"parallel": "ddp" if how == "fsdp" else "fsdp", "recompute": True}
    for many in crew().run(4, train, tmp_path / "run", "lm", other):
        assert_same(many, one)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [5]


def test_a_second_signal_is_urgent_to_one_process_alone():
    with deferred_signals(ALONE) as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        assert stop.urgent
    assert crew().run(2, _signalled_twice) == [False, False]


def _signalled_twice() -> bool:
    with deferred_signals(current()) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return stop.urgent


def fail_at(folder: Path, how: str) -> tuple[str, bool]:
    """The error of a run with a bad batch, and whether the weights are those before it."""
    config = {"parallel": how, "accumulate": 4, "save_every": 1}
    trainer = make_trainer(folder, "lm", Sequences(spoiled=4 * 2 + 1), **config)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    newest = trainer._store.latest()
    assert newest is not None
    saved = newest.read("model")
    weights = {
        f"model.{name}": tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in trainer.task.model.state_dict().items()
    }
    same = all(torch.equal(weights[name], saved[name]) for name in saved)
    return str(caught.value), same and newest.state.step == 2 and len(saved) == len(weights)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_bad_batch_of_one_process_stops_all_before_the_optimizer(tmp_path, how):
    errors = crew().run(2, fail_at, tmp_path, how)
    assert all(is_untouched for _, is_untouched in errors)
    assert len({message for message, _ in errors}) == 1
    assert errors[0][0].startswith("Step 3 is not finite")


def test_a_run_that_is_busy_says_so(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(AssertionError) as caught:
        crew().run(2, train, tmp_path / "run", "lm")
    assert "BusyError: Another process is writing" in str(caught.value)
    assert "LostProcessError: Another process has ended" in str(caught.value)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A workspace in which one process has trained a tokenizer and a LatentLM."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLM_HOME", str(folder))
        train_vae(VAE, SMALL)
        workflows.tokenize(data=SHAPES, device="cpu")
        workflows.train_lm(overrides=SMALL, device="cpu")
    return folder


def train_vae(out: str, overrides: list[str], home: str | None = None) -> dict[str, Any]:
    if home:
        os.environ["LATENTLM_HOME"] = home
    folder = Path(os.environ["LATENTLM_HOME"], out)
    return workflows.train_vae(data=SHAPES, overrides=overrides, device="cpu", out=folder).to_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders hold the same files, the same weights to rounding, the same rows."""
    folders = (one, other)
    files = [{p.relative_to(folder) for p in folder.rglob("*.*")} for folder in folders]
    exported = [name for name in files[0] if "checkpoints" not in name.parts]
    assert len(exported) > 5
    assert files[1].issuperset(exported)
    expected, found = (
        read_safetensors(folder / "export" / "model.safetensors") for folder in folders
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    steps = [[row["step"] for row in read_metrics(f / "metrics.jsonl")] for f in folders]
    assert steps == [[2, 4]] * 2


def test_two_processes_train_and_export_a_tokenizer(home):
    sharded = [*SMALL, "trainer.parallel=fsdp", "trainer.recompute=true"]
    results = crew().run(2, train_vae, "runs/two", sharded, str(home))
    assert results[0] == results[1]
    assert_same_run(home / VAE, home / "runs/two")


def test_torchrun_trains_and_speaks_once(home):
    changes = [word for change in SMALL for word in ("--set", change)]
    words = ["train-lm", "--device", "cpu", "--json", "--out", "runs/torchrun", *changes]
    done = torchrun(2, words, home)
    assert done.returncode == 0, done.stderr
    (result,) = map(json.loads, done.stdout.splitlines())
    assert result["figures"]["step"] == 4
    assert done.stderr.count("Using the recipe") == 1
    assert_same_run(home / "runs/lm-embedded-shapes", home / "runs/torchrun")
