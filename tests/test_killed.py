"""What is left when a command is killed, or started twice: the harness of the examples in small,
and each of the faults that it found."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from latentlm_cli import app
from latentlm_core import workflows
from latentlm_core.errors import CorruptFileError
from latentlm_core.export_config import TokenizerExport, read_config
from latentlm_core.files import locked, read_json
from latentlm_core.runtime import CACHED_KERNELS, KERNEL_CACHES
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.runlog import Means
from tests.tiny_training import Listener, make, noisy, traces

ROOT = Path(__file__).parents[1]
STAGES = ("train-vae", "tokenize", "train-lm", "sample")
SMALL = [
    "tokenizer.network.image_size=16",
    "tokenizer.network.channels=[8,16]",
    "data.batch_size=8",
    "optimizer.schedule=constant",
    "critic_optimizer.schedule=constant",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness finds in a few kills and double starts."""
    folder = tmp_path_factory.mktemp("killed")
    counts = "--kills 8 --signals 0 --races 1 --pairs 0 --images 4200 --fresh 0 --json found.json"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "kill_harness.py", *counts.split(), folder / "runs"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_commands_that_are_killed_leave_what_undisturbed_ones_leave(found):
    assert found["faults"] == []
    for stage in STAGES:
        assert found["hits"][f"{stage} SIGKILL"]["total"] >= 2
        assert found["identical"][stage] >= 3


@pytest.mark.slow
def test_of_two_that_start_together_one_works(found):
    assert all(found["hits"][f"{stage} race"] == {"total": 1, "one works": 1} for stage in STAGES)


def test_who_locks_a_folder_mends_what_a_killed_process_left(tmp_path):
    for name in (".a.json.17.part", ".b.17.part/weights", "c", ".c.17.old/x", ".d.9.old/y", ".e"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    with locked(tmp_path):
        pass
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"c", "d/y", ".e", ".lock"}
    assert (tmp_path / "c").read_text() == "c"


def test_a_run_that_was_killed_before_it_dropped_checkpoints_drops_them(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_prune", lambda self: None)
        make(tmp_path).run()
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000013.part").mkdir()
    assert len(list(folder.iterdir())) == 4
    assert make(tmp_path).run().resumed_from == 13
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000013"]


@pytest.mark.parametrize("lost", ["curves.png", "config.json", "export", "reconstructions.png"])
def test_what_a_finished_run_did_not_come_to_write_is_written(tmp_path, lost):
    def train() -> set[str]:
        workflows.train_vae(
            data="embedded:shapes",
            overrides=[*SMALL, "trainer.total_steps=1"],
            out=tmp_path,
            device="cpu",
        )
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}

    whole = train()
    for name in {lost, "config.json"}:  # which is written last
        path = tmp_path / name
        path.rename(tmp_path.with_name(f"lost-{name}"))
    assert train() == whole


def test_the_export_of_a_run_that_was_prolonged_is_not_the_old_one(tmp_path, monkeypatch):
    def train(steps: int) -> int:
        workflows.train_vae(
            data="embedded:shapes",
            overrides=[*SMALL, f"trainer.total_steps={steps}"],
            out=tmp_path,
            device="cpu",
        )
        return read_config(tmp_path / "export", TokenizerExport).provenance["step"]

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    assert train(1) == 1
    with monkeypatch.context() as patch:
        module = import_module("latentlm_core.workflows.train_vae")
        patch.setattr(module, "save_tokenizer", die)
        with pytest.raises(KeyboardInterrupt):
            train(2)
    assert train(2) == read_json(tmp_path / "config.json")["step"] == 2


def test_a_run_is_held_until_all_is_written(tmp_path):
    held = []

    def finish(result: Any) -> None:
        command = f"import fcntl; fcntl.flock(open({str(tmp_path / '.lock')!r}), 6)"  # EX | NB
        done = subprocess.run([sys.executable, "-c", command], stderr=subprocess.PIPE, check=False)
        held.append(b"BlockingIOError" in done.stderr)

    make(tmp_path).run(finish)
    assert held == [True]


def test_a_signal_after_the_last_step_is_not_forgotten(tmp_path):
    class Late(Listener):
        @contextmanager
        def bar(self, *args: Any) -> Iterator[Listener]:
            with super().bar(*args) as inner:
                yield inner
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        make(tmp_path / "stopped", noisy(), progress=Late()).run()
    assert caught.value.code == 143
    make(tmp_path / "whole", noisy()).run()
    assert traces(tmp_path / "stopped") == traces(tmp_path / "whole")


def test_terms_have_the_same_order_after_a_checkpoint():
    def means() -> Means:
        found = Means()
        found.count({"loss": (1.0, 1), "early": (2.0, 1)})
        return found

    going_on, resumed = means(), Means()
    resumed.load(dict(sorted(going_on.tensors().items())))
    for each in (going_on, resumed):
        each.count({"loss": (3.0, 1), "gan": (4.0, 2)})
    expected = [("loss", 2.0), ("gan", 2.0), ("early", 2.0)]
    assert list(going_on.take().items()) == list(resumed.take().items()) == expected


@pytest.fixture
def _own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(app, "_asked", [])
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_signals")
def test_ctrl_c_before_a_command_begins_is_no_traceback(monkeypatch):
    monkeypatch.setattr(app, "app", lambda prog_name: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 130


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_takes_for_damage_is_a_signal(monkeypatch, capsys, number):
    def read(**_: Any) -> None:  # as safetensors does when a handler raises inside it
        try:
            signal.raise_signal(number)
        except (KeyboardInterrupt, SystemExit):
            raise CorruptFileError("model.safetensors is damaged.") from None

    monkeypatch.setattr(workflows, "sample", read)
    monkeypatch.setattr(sys, "argv", ["latentlm", "sample"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 128 + number
    said = capsys.readouterr().err
    assert "The same command resumes." in said
    assert "damaged" not in said


SHAPES = """
import torch
from latentlm_core.runtime import resolve_device
resolve_device("cpu")
layer = torch.nn.Linear(64, 256)
for rows in range(1000, 1500):
    if rows == 1150:
        before = resident()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(rows, 64, requires_grad=True)).sum().backward()
print((resident() - before) / 2**20)
"""


def test_memory_does_not_grow_with_the_number_of_shapes():
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    page = os.sysconf("SC_PAGE_SIZE")
    reading = f"resident = lambda: int(open('/proc/self/statm').read().split()[1]) * {page}"
    plain = {k: v for k, v in os.environ.items() if k not in KERNEL_CACHES}
    done = subprocess.run(
        [sys.executable, "-c", reading + SHAPES],
        env=plain,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert CACHED_KERNELS < 150
    assert float(done.stdout) < 100, "without a bound it is hundreds of MiB"
