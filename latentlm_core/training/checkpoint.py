"""Checkpoints: folders of safetensors that are whole or not there, and never hold a pickle.

    checkpoints/step-00001000/
    ├── model.safetensors      one file for each part of the state that the trainer hands over, and
    ├── ema.safetensors        one for each process where they share it out (``checkpoint_files``)
    ├── optimizer.safetensors
    ├── ...
    └── state.json             step, samples, configuration; size and SHA-256 of each file

A checkpoint is written into a hidden folder, synced and published by one rename. Reading compares
every byte with its checksum: a damaged checkpoint is refused by the name of its file and never
replaced by an older one in silence. ``state.json`` carries a checksum of itself.

Notable choices:
- a thread writes, hashes and syncs. Training waits for it, or goes on where ``is_async`` had the
  tensors copied first; one checkpoint is under way at a time;
- threads know no collectives: each process leaves sizes and checksums of its files beside them,
  the main one waits for all of these, seals state.json and publishes. How it went is agreed on
  between steps (``wait``), so that an error of one process is the error of all;
- what is kept: the newest K, the multiples of M steps, the one of the lowest score, and the newest
  one that a run may go back to (``go_back``).
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config, build
from latentlm_core.errors import ArtifactError, CorruptFileError, LatentLMError
from latentlm_core.files import publish, read_json
from latentlm_core.processes import TRAINING_PATIENCE, current
from latentlm_core.training.checkpoint_files import ShareFile, StoredTensor, open_part, own_share
from latentlm_core.training.checkpoint_state import (
    STATE_FILE,
    CheckpointState,
    FileEntry,
    damaged,
    describe,
    read_state,
    verify,
    write_state,
)

FILES_PATIENCE = TRAINING_PATIENCE / 4
"""How long the main process waits for the files of the others, which in turn wait for it."""

_FOLDER = re.compile(r"step-\d{8,}")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        folder: where it is.
        state: its plain values.
    """

    folder: Path
    state: CheckpointState

    @contextmanager
    def open(self, part: str) -> Iterator[dict[str, StoredTensor]]:
        """The tensors of one part, to be read inside the block.

        Raises:
            CorruptFileError: the files of the part are not what they must be.
        """
        with open_part(self.folder, part, self.state.files) as tensors:
            yield tensors

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part, whole and on the CPU."""
        with self.open(part) as tensors:
            return {name: tensor.whole() for name, tensor in tensors.items()}

    def path(self, part: str) -> Path:
        """What to call one part in a message: its file, where the part is not shared out."""
        return self.folder / f"{part}.safetensors"


class CheckpointStore:
    """The checkpoints of one run; whoever uses it holds the run's lock.

    Every process has one and calls each method together with the others. As a context manager it
    waits, at the end, for what is under way.

    Args:
        folder: the ``checkpoints`` folder of the run, which all processes see; made when needed.
        keep: how many of the newest checkpoints are kept.
        every: those of a multiple of so many steps are kept as well; 0 for none.
        best: whether the one of the lowest score is kept as well.
        go_back: the newest of a multiple of so many steps is kept as well; 0 for none.
        is_async: copy the tensors and come back from ``save`` while they are written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        every: int = 0,
        best: bool = False,
        go_back: int = 0,
        is_async: bool = False,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.every = every
        self.best = best
        self.go_back = go_back
        self.is_async = is_async
        self._processes = current()
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._under_way: futures.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait; after an error for this process alone, for the others may not come here."""
        if kind is None:
            self.wait()
        elif self._under_way is not None:
            futures.wait([self._under_way])

    def save(self, state: CheckpointState, parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write a checkpoint for ``state.step``, then drop the ones that need not be kept.

        Args:
            state: its plain values, without ``files``.
            parts: file stem => tensors by name.

        Returns:
            The folder; it is there when ``save`` returns, or, with ``is_async``, after ``wait``.

        Raises:
            ArtifactError: it, or the one before, cannot be written; the earlier ones are as before.
        """
        self.wait()
        folder = self.folder / f"step-{state.step:08d}"
        part = folder.with_name(f".{folder.name}.part")
        self._once(lambda: _make_empty(part))
        self._agree(lambda: _require(part))
        share = own_share(parts, self._processes, copy=self.is_async)
        self._under_way = self._thread.submit(self._write, share, part, folder, state)
        if not self.is_async:
            self.wait()
        return folder

    def wait(self) -> None:
        """Come back when the checkpoint that is under way is published.

        Raises:
            ArtifactError: it could not be written; the earlier ones are as before.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            self._agree(under_way.result)
        except LatentLMError:
            if self._processes.is_main:
                self._clean()
            raise

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, each of its files verified; None where there is none.

        Raises:
            CorruptFileError: the newest is damaged, naming the file.
            ArtifactError: it was written in another format, or what was under way failed.
        """
        self.wait()
        folder = self._processes.agree(max(self._folders(), key=_step, default=None))
        if folder is None:
            return None
        state = self._agree(lambda: read_state(folder))
        self._agree(lambda: self._verify(folder, state))
        return Checkpoint(folder, state)

    def way_back(self) -> int:
        """The step of the checkpoint that a run goes back to.

        The newest of a multiple of ``go_back``, which does not depend on interruptions; where there
        is none, the newest.
        """
        self.wait()
        steps = [_step(folder) for folder in self._folders()]
        regular = [step for step in steps if step % self.go_back == 0]
        return self._processes.agree(max(regular or steps, default=0))

    def tidy(self) -> None:
        """Drop what a killed run left: pieces, and checkpoints that it did not come to drop.

        Raises:
            ArtifactError: the file system refused.
        """
        self._once(self._prune)

    def drop_after(self, step: int) -> None:
        """Drop the checkpoints of later steps.

        Raises:
            ArtifactError: the file system refused.
        """
        later = [folder for folder in self._folders() if _step(folder) > step]
        self._once(lambda: self._drop(later))

    def _once(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the main process alone; an error of it is raised in all."""
        self._agree(work if self._processes.is_main else lambda: None)

    def _agree(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns here; an error of any process is raised in all."""
        result, error = None, None
        try:
            result = work()
        except LatentLMError as caught:
            error = caught
        for each in self._processes.gather(error):
            if each is not None:
                raise each
        return result  # type: ignore[return-value]

    def _verify(self, folder: Path, state: CheckpointState) -> None:
        """Compare the files with what they must be, each in one of the processes."""
        there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
        for name in sorted(there - state.files.keys() - {STATE_FILE}):
            raise damaged(
                folder / name, "it is none of the files that the checkpoint was saved with"
            )
        for name in self._processes.own(state.files):
            verify(folder / name, state.files[name])

    def _write(
        self, share: list[ShareFile], part: Path, folder: Path, state: CheckpointState
    ) -> None:
        """Write what this process has; the main one publishes it all (in the thread)."""
        if self._processes.is_main:
            self._publish(share, part, folder, state)
            return
        note = _note_path(part, self._processes.rank)
        try:
            _leave_note(note, _Note(files=_write_files(share, part)))
        except ArtifactError as error:
            with suppress(ArtifactError):
                _leave_note(note, _Note(error=str(error)))
            raise

    def _publish(
        self, share: list[ShareFile], part: Path, folder: Path, state: CheckpointState
    ) -> None:
        try:
            files = _write_files(share, part)
            for rank in range(1, self._processes.size):
                files |= _await_note(part, rank)
            write_state(part, state.model_copy(update={"files": files}))
            publish(part, folder)
            self._prune()
        except OSError as error:
            raise ArtifactError(
                f"{folder} cannot be written: {error.strerror or error}."
            ) from error

    def _folders(self) -> list[Path]:
        """All checkpoints, the oldest first."""
        return sorted(filter(_is_checkpoint, self.folder.glob("step-*")), key=_step)

    def _prune(self) -> None:
        """Drop old checkpoints, and what a killed run left."""
        folders = self._folders()
        kept = set(folders[-self.keep :])
        if self.every:
            kept |= {folder for folder in folders if _step(folder) % self.every == 0}
        if self.best:
            kept |= _best(folders)
        if self.go_back:
            kept |= set([folder for folder in folders if _step(folder) % self.go_back == 0][-1:])
        self._drop([folder for folder in folders if folder not in kept])
        self._clean()

    def _drop(self, folders: list[Path]) -> None:
        """Remove checkpoints, under a hidden name first."""
        for folder in folders:
            old = folder.with_name(f".{folder.name}.old")
            try:
                os.replace(folder, old)
            except OSError as error:
                reason = error.strerror or error
                raise ArtifactError(f"{folder} cannot be removed: {reason}.") from error
            shutil.rmtree(old, ignore_errors=True)

    def _clean(self) -> None:
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)


class _Note(Config):
    """What a process leaves for the main one when its files are written."""

    files: dict[str, FileEntry] = Field(default_factory=dict)
    error: str | None = None


def _note_path(part: Path, rank: int) -> Path:
    return part / f".process-{rank:05d}.json"


def _leave_note(path: Path, note: _Note) -> None:
    """Let the main process see a note, whole; from then on it may rename the folder."""
    coming = path.with_suffix(".part")
    try:
        coming.write_text(json.dumps(note.to_dict()), "utf-8")
        os.replace(coming, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}.") from error


def _await_note(part: Path, rank: int) -> dict[str, FileEntry]:
    """Wait for the files of another process; what they must be."""
    patience = FILES_PATIENCE.total_seconds()
    path, deadline = _note_path(part, rank), time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise ArtifactError(f"Process {rank} has written nothing for {patience:.0f} s: {part}.")
        time.sleep(0.01)
    note = build(_Note, read_json(path), str(path))
    path.unlink()
    if note.error is not None:
        raise ArtifactError(f"Process {rank}: {note.error}")
    return note.files


def _make_empty(part: Path) -> None:
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(f"{part} cannot be written: {error.strerror or error}.") from error


def _require(part: Path) -> None:
    if not part.is_dir():
        raise ArtifactError(
            f"{part.parent} is not the same folder for all processes.",
            hint="Put the run on a file system that all machines share.",
        )


def _write_files(share: list[ShareFile], part: Path) -> dict[str, FileEntry]:
    for file in share:
        file.write(part)
    return {file.name: describe(part / file.name) for file in share}


def _is_checkpoint(folder: Path) -> bool:
    return _FOLDER.fullmatch(folder.name) is not None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _best(folders: list[Path]) -> set[Path]:
    """The checkpoint of the lowest score, of equal ones the oldest; none where none has one."""
    scores: dict[Path, float] = {}
    for folder in folders:
        with suppress(ArtifactError, CorruptFileError):
            score = read_state(folder).score
            if score is not None:
                scores[folder] = score
    return {min(scores, key=scores.__getitem__)} if scores else set()
