"""``state.json`` of a checkpoint: its plain values and what its files must be, under a seal."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from latentlm_core.config import Config, build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import read_json, sha256_file, write_json

FORMAT_VERSION = 1
STATE_FILE = "state.json"


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
    score: float | None = Field(default=None, allow_inf_nan=False)
    """Objective on the held-out data after this step, lower is better; none where there was no
    validation."""
    files: dict[Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")], FileEntry] = Field(
        default_factory=dict
    )
    """The files beside this one, filled in when they are written."""


def write_state(folder: Path, state: CheckpointState) -> None:
    """Write the state with a checksum of itself.

    Raises:
        ArtifactError: the file system refused.
    """
    plain = state.to_dict()
    write_json(folder / STATE_FILE, {"sha256": _digest(plain), "state": plain})


def read_state(folder: Path) -> CheckpointState:
    """Read the state of a checkpoint; its files are not looked at.

    Raises:
        CorruptFileError: it is damaged.
        ArtifactError: it was written in another format.
    """
    path = folder / STATE_FILE
    try:
        sealed = build(_Sealed, read_json(path), str(path))
        state = build(CheckpointState, sealed.state, str(path))
    except (ConfigError, ArtifactError, CorruptFileError) as error:
        raise damaged(path, str(error)) from None
    if _digest(sealed.state) != sealed.sha256:
        raise damaged(path, "its checksum differs")
    if state.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {state.format_version}; "
            f"this version of latentlm reads {FORMAT_VERSION}."
        )
    return state


def verify(path: Path, entry: FileEntry) -> None:
    """Compare a file with what it must be.

    Raises:
        CorruptFileError: it is another.
    """
    if not path.is_file():
        raise damaged(path, "it is missing")
    if path.stat().st_size != entry.num_bytes:
        raise damaged(path, f"it has {path.stat().st_size} bytes instead of {entry.num_bytes}")
    if sha256_file(path) != entry.sha256:
        raise damaged(path, "its checksum differs")


def describe(path: Path) -> FileEntry:
    """What a file is."""
    return FileEntry(num_bytes=path.stat().st_size, sha256=sha256_file(path))


def damaged(path: Path, reason: str) -> CorruptFileError:
    """The error about a file of a checkpoint."""
    return CorruptFileError(
        f"{path} is damaged: {reason.rstrip('.')}.",
        hint=f"Remove {path.parent} to go on from the checkpoint before it.",
    )


class _Sealed(Config):
    sha256: str
    state: dict[str, Any]


def _digest(state: dict[str, Any]) -> str:
    """As ``Config.digest``, of the values that are in the file: fields may have come since."""
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
