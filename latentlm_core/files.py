"""Files that are whole or not there.

Everything is written under a temporary name in the same folder, synced and renamed; safetensors
are read with their header checked against the file's size; a folder that a process writes is
locked for as long as that process lives, and who locks it removes what a killed one left behind.

Safetensors are written here and not by the library, whose bytes they have: one tensor after the
other, so that no second copy of a model lies in memory, and a model that is shared out over
processes is gathered a tensor at a time.

The names of the files in an export stand here too, because every floor knows them.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from latentlm_core.config import digest_of
from latentlm_core.errors import ArtifactError, BusyError, CorruptFileError

CONFIG_FILE = "config.json"
"""What an export is: kind, format version, configuration."""
WEIGHTS_FILE = "model.safetensors"
"""Its weights."""
TEXT_FILE = "text.json"
"""The text tokenizer of a model that reads text."""
SEAL = "checksum"
"""Key of an object in a JSON file that holds the SHA-256 of all else in it."""
TOKENIZER_FOLDER = "tokenizer"
"""The export of the tokenizer, inside that of a generator and inside a latent set."""


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then sync and rename into place.

    Raises:
        ArtifactError: the file system refused (no space, no permission); ``path`` is as before.
    """
    part = _part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}.") from error
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


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with the SHA-256 of all else in it under ``SEAL``."""
    write_json(path, {**value, SEAL: digest_of(value)})


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically; the bytes depend on names, values and metadata alone.

    Args:
        path: the file.
        tensors: by name; on any device, and shared out as DTensors too, where the other processes
            must go through ``whole_tensors`` meanwhile.
        metadata: text for the header.

    Raises:
        ArtifactError: the file system refused; ``path`` is as before.
    """
    write_file(path, lambda part: _write_tensors(part, tensors, dict(metadata or {})))


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Each tensor in the order of the file, gathered when its turn comes where it is a DTensor.

    Gathering takes part in every process of the tensor: all of them must go through this.
    """
    for name in _file_order(tensors):
        tensor = tensors[name].detach()
        yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path``, synced as a whole, when the block ends well.

    A folder that is there is moved aside first, for two renames are what a file system offers: a
    process that is killed between them leaves it beside ``path``, as ``.NAME.PID.old``.

    Raises:
        ArtifactError: the file system refused; ``path`` is as before.
    """
    part = _part_of(path)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        publish(part, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def publish(part: Path, path: Path) -> None:
    """Sync a finished folder and give it its name, in the place of one that is there.

    Raises:
        OSError: the file system refused; ``path`` is as before.
    """
    for entry in part.rglob("*"):
        _sync(entry)
    _sync(part)
    if path.is_dir():
        _swap(part, path)
    else:
        os.replace(part, path)
    _sync(path.parent)


def read_bytes(path: Path) -> bytes:
    """Read a file, and no pipe or device, which might never end.

    Raises:
        ArtifactError: it is not there, or cannot be read.
    """
    try:
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None
    raise ArtifactError(f"There is no file {path}.")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is no JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{path} is not valid JSON.") from None


def read_sealed_json(path: Path) -> Any:
    """Read JSON, of an object without its seal, which is compared; errors as ``read_json``."""
    value = read_json(path)
    if isinstance(value, dict):
        check_seal(path, value, value.pop(SEAL, None))
    return value


def check_seal(path: Path, value: dict[str, Any], seal: Any) -> None:
    """Compare a JSON object with the seal that was taken out of it.

    None is none: earlier versions wrote none, and who edits a file takes it out.

    Raises:
        CorruptFileError: something in the file has changed since it was written.
    """
    if seal is not None and seal != digest_of(value):
        raise CorruptFileError(
            f"{path} is damaged: it is not what its {SEAL} says.",
            hint=f"If it was edited on purpose, take its {SEAL} out.",
        )


def read_text(path: Path) -> str:
    """Read UTF-8 text.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is no UTF-8.
    """
    try:
        return read_bytes(path).decode()
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

    What a process that was killed left there is mended first: pieces of files are removed, and what
    was moved aside for something that never came is put back.

    Raises:
        BusyError: another process holds it.
        ArtifactError: the folder cannot be made or written.
    """
    _check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
        _mend(folder)
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


_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format, in the order in which the library lays the tensors of a file."""


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """By dtype, widest first, then by name."""
    order = {dtype: index for index, dtype in enumerate(_DTYPES)}
    return sorted(tensors, key=lambda name: (order[tensors[name].dtype], name.encode()))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Header length (8 bytes), header (JSON, padded to a multiple of 8), then the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        begin, place = place, place + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, place],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in whole_tensors(tensors):
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _part_of(path: Path) -> Path:
    """The temporary name beside ``path``."""
    _check_name(path)
    if path.name in ("", ".."):
        raise ArtifactError(f"{path} is no name of a new file or folder.")
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _check_name(path: Path) -> None:
    """Refuse what no file system takes for a name: NUL, and surrogates that stand for no byte."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise ArtifactError(f"{path} is no name of a file or folder.")


_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>part|old)", re.DOTALL)


def _mend(folder: Path) -> None:
    for path in list(folder.iterdir()):
        left = _LEFT_BEHIND.fullmatch(path.name)
        if left is None:
            continue
        if left["kind"] == "old" and not (folder / left["name"]).exists():
            os.replace(path, folder / left["name"])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
