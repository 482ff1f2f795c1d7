"""Files that are whole or not there.

Everything is written under a temporary name in the same folder, synced and renamed; safetensors
are read with their header checked against the file's size; a folder that a process writes is
locked for as long as that process lives.

The names of the files in an export stand here too, because every floor knows them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from latentlm_core.errors import ArtifactError, BusyError, CorruptFileError

CONFIG_FILE = "config.json"
"""What an export is: kind, format version, configuration."""
WEIGHTS_FILE = "model.safetensors"
"""Its weights."""
TEXT_FILE = "text.json"
"""The text tokenizer of a model that reads text."""
TOKENIZER_FOLDER = "tokenizer"
"""The export of the tokenizer, inside that of a generator and inside a latent set."""


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then sync and rename into place.

    Raises:
        ArtifactError: the file system refused (no space, no permission); ``path`` is as before.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # what the user's umask says; safetensors writes 0600
        write(part)
        part.chmod(mode)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtifactError(f"{path} cannot be written: {reason}.") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; lone surrogates, which it cannot hold, become "?"."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    write_file(path, lambda part: _write_bytes(part, content))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; numbers that are not finite are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically; the bytes depend on names, values and metadata alone."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_file(path, lambda part: _save_tensors(part, plain, dict(metadata or {})))


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path``, synced as a whole, when the block ends well.

    A folder that is there is moved aside first, for two renames are what a file system offers: a
    process that is killed between them leaves it beside ``path``, as ``.NAME.PID.old``.

    Raises:
        ArtifactError: the file system refused; ``path`` is as before.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for entry in part.rglob("*"):
            _sync(entry)
        _sync(part)
        if path.exists():
            _swap(part, path)
        else:
            os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"There is no file {path}.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{path} is not valid JSON.") from None


def read_text(path: Path) -> str:
    """Read UTF-8 text.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is no UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"There is no file {path}.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise CorruptFileError(f"{path} is not UTF-8 text.") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a file.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path} is damaged or no safetensors file ({error}).") from None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes; the lock ends with the process, however it ends.

    Raises:
        BusyError: another process holds it.
        ArtifactError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"Another process is writing {folder}.", hint="Wait for it, or use another --out."
        ) from None
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save, then sort the header's metadata: the library writes them in a random order."""
    safetensors.torch.save_file(tensors, path, metadata or None)
    if len(metadata) < 2:
        return
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(length))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _swap(part: Path, path: Path) -> None:
    """Put ``part`` in the place of the folder ``path``, or leave that where it is."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle on a folder to sync
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
