"""How checkpoints are written: beside the training, whole or not at all, and which are kept."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core import files
from latentlm_core.config import build
from latentlm_core.errors import ArtifactError, ConfigError, LatentLMError
from latentlm_core.files import sha256_file
from latentlm_core.training import checkpoint
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.checkpoint_files import ShareFile
from latentlm_core.training.checkpoint_state import CheckpointState, read_state
from latentlm_core.training.trainer_config import TrainerConfig
from tests.tiny_training import Listener, make, noisy, traces


def save(store: CheckpointStore, step: int, score: float | None = None) -> Path:
    state = CheckpointState(step=step, samples_seen=0, seconds=0.1, config={}, score=score)
    return store.save(state, {"model": {"weight": torch.arange(4.0) + step}, "ema": {}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before the event."""
    event, write = threading.Event(), ShareFile.write

    def hold(self: ShareFile, folder: Path) -> None:
        assert event.wait(20)
        write(self, folder)

    monkeypatch.setattr(ShareFile, "write", hold)
    try:
        yield event
    finally:
        event.set()


def test_a_save_beside_the_training_holds_what_was_there_when_it_began(tmp_path, monkeypatch):
    save(CheckpointStore(tmp_path / "waiting", keep=1), 3)
    weight = torch.arange(4.0) + 3
    state = CheckpointState(step=3, samples_seen=0, seconds=0.1, config={})
    store = CheckpointStore(tmp_path / "beside", keep=1, is_async=True)
    with held_back(monkeypatch) as written:
        folder = store.save(state, {"model": {"weight": weight}, "ema": {}})
        weight.fill_(torch.nan)
        assert names(tmp_path / "beside") == [".step-00000003.part"]
        written.set()
        newest = store.latest()
    assert newest is not None
    assert newest.folder == folder
    assert names(tmp_path / "beside") == ["step-00000003"]
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "waiting" / folder.name / path.name).read_bytes()


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=5, is_async=True)
    with held_back(monkeypatch) as written:
        save(store, 1)
        threading.Timer(0.2, written.set).start()
        save(store, 2)
        assert "step-00000001" in names(tmp_path)
        with store:
            save(store, 3)
        assert names(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_leaving_with_an_error_waits_as_well_and_keeps_the_error(tmp_path, monkeypatch):
    def fail() -> None:
        with CheckpointStore(tmp_path, keep=5, is_async=True) as store:
            save(store, 1)
            threading.Timer(0.2, written.set).start()
            raise ZeroDivisionError

    with held_back(monkeypatch) as written, pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("call", [CheckpointStore.wait, lambda store: save(store, 3)])
def test_what_went_wrong_beside_the_training_is_told_at_the_next_call(tmp_path, monkeypatch, call):
    store = CheckpointStore(tmp_path, keep=5, is_async=True)
    save(store, 1)
    store.wait()

    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", refuse)
        save(store, 2)
        with pytest.raises(ArtifactError, match=r"cannot be written: No space left on device"):
            call(store)
    assert names(tmp_path) == ["step-00000001"]
    with store:
        save(store, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_run_that_saves_beside_itself_leaves_the_same_files(tmp_path):
    make(tmp_path / "waiting", noisy(), save_every=4).run()
    make(tmp_path / "beside", noisy(), save_every=4, async_save=True).run()
    assert traces(tmp_path / "beside") == traces(tmp_path / "waiting")


def test_ctrl_c_waits_until_the_checkpoint_is_published(tmp_path, monkeypatch):
    seen: list[str] = []

    def interrupt(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    listener = Listener(on_advance=interrupt)
    listener.note = lambda message: seen.extend(names(tmp_path / "checkpoints"))
    with held_back(monkeypatch) as written:
        threading.Timer(0.3, written.set).start()
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, noisy(), progress=listener, async_save=True).run()
    assert seen == ["step-00000004"]


class Killed(BaseException):
    """Nothing of the process goes on after this."""


def dying(monkeypatch: pytest.MonkeyPatch, last: int) -> Callable[[], int]:
    """From call ``last`` to the file system on, every call of it dies; counts the calls."""
    calls = 0

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > last:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "open"),
        (Path, "unlink"),
        (Path, "write_bytes"),
    ):
        monkeypatch.setattr(owner, name, count(getattr(owner, name)))
    return lambda: calls


def test_a_run_that_is_killed_at_any_moment_of_a_save_has_whole_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the disk of the tests is slow
    hashes = {}
    for step in (1, 2, 3):
        folder = save(CheckpointStore(tmp_path / "whole", keep=9), step)
        hashes[folder.name] = [sha256_file(path) for path in sorted(folder.iterdir())]
    for moment in range(200):
        run = tmp_path / str(moment)
        for step in (1, 2):
            name = f"step-0000000{step}"
            shutil.copytree(tmp_path / "whole" / name, run / name)
        with monkeypatch.context() as patch:
            num_calls = dying(patch, moment)
            with suppress(Killed):
                save(CheckpointStore(run, keep=2), 3)
        published = [name for name in names(run) if not name.startswith(".")]
        assert "step-00000002" in published, "the newest one from before"
        for name in published:
            assert [sha256_file(path) for path in sorted((run / name).iterdir())] == hashes[name]
        newest = CheckpointStore(run, keep=2).latest()
        assert newest is not None
        assert newest.state.step == (3 if "step-00000003" in published else 2)
        save(CheckpointStore(run, keep=2), 3)
        assert names(run) == ["step-00000002", "step-00000003"], "nothing is left over"
        if num_calls() <= moment:
            break
    assert moment > 15
    assert num_calls() == moment, "the last round was not killed"


def test_the_multiples_and_the_best_are_kept_as_well(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, every=40, best=True)
    scores = {10: 3.0, 20: 1.0, 30: 1.0, 40: None, 50: 2.0, 60: None, 70: 4.0, 80: 5.0, 90: 6.0}
    for step, score in scores.items():
        save(store, step, score)
    assert names(tmp_path) == [f"step-000000{step}" for step in (20, 40, 80, 90)]
    best = read_state(tmp_path / "step-00000020")
    assert (best.step, best.score) == (20, 1.0)
    save(CheckpointStore(tmp_path, keep=1, best=True), 100, 0.5)
    assert names(tmp_path) == ["step-00000100"]


def test_a_damaged_old_checkpoint_is_no_reason_not_to_save(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, every=10, best=True)
    save(store, 10, 1.0)
    (tmp_path / "step-00000010" / "state.json").write_text("{")
    save(store, 11, 2.0)
    save(store, 12, 3.0)
    assert names(tmp_path) == ["step-00000010", "step-00000011", "step-00000012"]


@pytest.mark.parametrize("validate_every", [0, 3])
def test_the_best_is_not_to_be_had_without_validations_of_what_is_saved(validate_every):
    asked = {"total_steps": 9, "save_every": 4, "validate_every": validate_every}
    with pytest.raises(ConfigError, match="a save_every that is a multiple of validate_every"):
        build(TrainerConfig, asked | {"keep_best": True}, "the recipe")


def test_the_best_of_a_run_is_that_of_the_lowest_objective(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    make(tmp_path, noisy(), validate_every=1, save_every=1, keep_best=True).run()
    states = [read_state(folder) for folder in sorted((tmp_path / "checkpoints").iterdir())]
    _, rows = traces(tmp_path)
    objectives = {row["step"]: row["validation/squared"] for row in rows}
    best = min(objectives, key=objectives.__getitem__)
    assert [state.step for state in states] == sorted({best, 12, 13})
    assert all(state.score == objectives[state.step] for state in states)


@pytest.mark.parametrize(
    ("note", "told"),
    [
        (None, r"Process 1 has written nothing for 0 s"),
        ("{", r"\.process-00001\.json is not valid JSON"),
        ('{"files": {"model.safetensors": {}}}', r"\.process-00001\.json: files.*is missing"),
        ('{"error": "The disk is full."}', r"Process 1: The disk is full\."),
    ],
)
def test_a_process_that_leaves_no_sound_note_of_its_files_ends_the_save(
    tmp_path, monkeypatch, note, told
):
    monkeypatch.setattr(checkpoint, "FILES_PATIENCE", timedelta(seconds=0.02))
    if note is not None:
        (tmp_path / ".process-00001.json").write_text(note)
    with pytest.raises(LatentLMError, match=told):
        checkpoint._await_note(tmp_path, 1)


def test_the_folder_may_be_renamed_as_soon_as_a_note_is_there(tmp_path, monkeypatch):
    part = tmp_path / "part"
    part.mkdir()

    def replace(source: Path, target: Path) -> None:
        source.rename(target)
        part.rename(tmp_path / "published")

    monkeypatch.setattr(os, "replace", replace)
    checkpoint._leave_note(part / ".process-00001.json", checkpoint._Note())
    assert names(tmp_path) == ["published"]
    assert names(tmp_path / "published") == [".process-00001.json"]
