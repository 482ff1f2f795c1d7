"""Checkpoints: folders of safetensors that are whole or not there, and never hold a pickle.

    checkpoints/step-00001000/
    ├── model.safetensors      one file for each part of the state that the trainer hands over
    ├── ema.safetensors
    ├── optimizer.safetensors
    ├── ...
    └── state.json             step, samples, configuration; size and SHA-256 of each file

A checkpoint is written into a temporary folder, synced and published by one rename. Reading
compares every byte with its checksum: a damaged checkpoint is refused by the name of its file and
never replaced by an older one in silence. ``state.json`` carries a checksum of itself.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config, build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import (
    read_json,
    read_safetensors,
    sha256_file,
    write_folder,
    write_json,
    write_safetensors,
)

FORMAT_VERSION = 1


class FileEntry(Config):
    """What a file of a checkpoint must be."""

    num_bytes: int
    """Its size."""
    sha256: str
    """Hex SHA-256 of its content."""


class CheckpointState(Config):
    """The plain values of a checkpoint."""

    format: Literal["latentlm-checkpoint"] = "latentlm-checkpoint"
    """What the folder is."""
    format_version: int = FORMAT_VERSION
    """Version of the layout."""
    step: int
    """Optimizer updates done."""
    samples_seen: int
    """Examples trained on."""
    seconds: float
    """Time spent training, over all sessions of the run."""
    config: dict[str, Any]
    """The run's configuration as plain JSON values."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """The files beside this one, filled in when they are written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        folder: where it is.
        state: its plain values.
    """

    folder: Path
    state: CheckpointState

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part, on the CPU."""
        return read_safetensors(self.path(part))

    def path(self, part: str) -> Path:
        """The file of one part."""
        return self.folder / f"{part}.safetensors"


class CheckpointStore:
    """The checkpoints of one run; whoever uses it holds the run's lock.

    Args:
        folder: the ``checkpoints`` folder of the run; made when it is needed.
        keep: how many of the newest checkpoints are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: CheckpointState, parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write a checkpoint for ``state.step``, then drop the ones that are too old.

        Args:
            state: its plain values, without ``files``.
            parts: file stem => tensors by name.

        Returns:
            The published folder.

        Raises:
            ArtifactError: it cannot be written; the earlier ones are as before.
        """
        folder = self.folder / f"step-{state.step:08d}"
        with write_folder(folder) as part:
            for stem, tensors in parts.items():
                write_safetensors(part / f"{stem}.safetensors", tensors)
            files = {path.name: _describe(path) for path in sorted(part.iterdir())}
            sealed = state.model_copy(update={"files": files})
            write_json(part / "state.json", {"sha256": sealed.digest(), "state": sealed.to_dict()})
        self._prune()
        return folder

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, each of its files verified; None where there is none.

        Raises:
            CorruptFileError: the newest is damaged, naming the file.
            ArtifactError: it was written in another format.
        """
        folders = self._folders()
        if not folders:
            return None
        folder = folders[-1]
        state = _read_state(folder)
        for name, entry in state.files.items():
            _verify(folder / name, entry)
        return Checkpoint(folder, state)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda folder: (len(folder.name), folder))

    def _prune(self) -> None:
        """Drop old checkpoints, under a hidden name first, and what a killed process left."""
        for folder in self._folders()[: -self.keep]:
            os.replace(folder, folder.with_name(f".{folder.name}.old"))
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)


def copy_strictly(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copy ``source`` into the tensors of ``target``.

    Args:
        target: tensors by name, of a module's ``state_dict`` for instance; overwritten.
        source: as many tensors of the same names and shapes.
        where: what the source is, for the message.

    Raises:
        ArtifactError: names or shapes differ, naming every difference; nothing is copied.
    """
    problems = [
        *(f"{name} is missing" for name in sorted(target.keys() - source.keys())),
        *(f"{name} is unknown" for name in sorted(source.keys() - target.keys())),
        *(
            f"{name} is {tuple(source[name].shape)} and should be {tuple(tensor.shape)}"
            for name, tensor in target.items()
            if name in source and source[name].shape != tensor.shape
        ),
    ]
    if problems:
        raise ArtifactError(f"{where} does not fit: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: frozenset[str] = frozenset()
) -> list[str]:
    """How two nested configurations differ, ``a.b is 1 there and 2 here``.

    Args:
        saved: the configuration of the checkpoint.
        current: the one asked for, of plain JSON values too.
        free: dotted keys that may differ.
    """
    there, here = dict(_flat(saved)), dict(_flat(current))
    return [
        f"{key} is {there.get(key, 'absent')!r} there and {here.get(key, 'absent')!r} here"
        for key in sorted(there.keys() | here.keys())
        if key not in free and there.get(key, _ABSENT) != here.get(key, _ABSENT)
    ]


_ABSENT = object()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _describe(path: Path) -> FileEntry:
    return FileEntry(num_bytes=path.stat().st_size, sha256=sha256_file(path))


class _Sealed(Config):
    sha256: str
    state: CheckpointState


def _read_state(folder: Path) -> CheckpointState:
    path = folder / "state.json"
    try:
        sealed = build(_Sealed, read_json(path), str(path))
    except (ConfigError, ArtifactError, CorruptFileError) as error:
        raise _damaged(path, str(error)) from None
    if sealed.state.digest() != sealed.sha256:
        raise _damaged(path, "its checksum differs")
    if sealed.state.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {sealed.state.format_version}; "
            f"this version of latentlm reads {FORMAT_VERSION}."
        )
    return sealed.state


def _verify(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if path.stat().st_size != entry.num_bytes:
        raise _damaged(path, f"it has {path.stat().st_size} bytes instead of {entry.num_bytes}")
    if sha256_file(path) != entry.sha256:
        raise _damaged(path, "its checksum differs")


def _damaged(path: Path, reason: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path} is damaged: {reason.rstrip('.')}.",
        hint=f"Remove {path.parent} to go on from the checkpoint before it.",
    )
