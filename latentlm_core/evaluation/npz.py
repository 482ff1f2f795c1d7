"""Reading arrays out of npz files that strangers wrote.

An npz is a zip of npy files. The header of each is read and judged first, then exactly the bytes
that it announces: no pickle is ever interpreted, and no array is made larger than was allowed.
Images are read one at a time, so a 10 GB file of samples needs the memory of one.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from latentlm_core.errors import CorruptFileError, DataError

_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One array of an npz file, opened at its first value.

    Attributes:
        shape: of the array.
        dtype: of its values; never an object type.
        fortran: whether the first axis runs fastest.
        stream: positioned at the first value.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool
    stream: IO[bytes]


def npz_keys(path: Path) -> frozenset[str]:
    """Names of the arrays in a file.

    Raises:
        DataError: the file is not there.
        CorruptFileError: it is no npz.
    """
    with _opened(path) as archive:
        names = archive.namelist()
    return frozenset(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


@contextmanager
def npz_member(path: Path, key: str) -> Iterator[Member]:
    """Open one array of a file for reading in order.

    Raises:
        DataError: the file or the array is not there, or holds Python objects.
        CorruptFileError: the file is damaged, or shorter than the array's header says.
    """
    with _opened(path) as archive:
        try:
            info = archive.getinfo(f"{key}.npy")
        except KeyError:
            raise DataError(f"{path} has no array {key!r}.") from None
        with archive.open(info) as stream:
            shape, fortran, dtype = _header(stream, f"{path}[{key}]")
            if info.file_size < math.prod(shape) * dtype.itemsize:
                raise CorruptFileError(f"{path}[{key}] is shorter than its header says.")
            yield Member(shape, dtype, fortran, stream)


def read_exactly(stream: IO[bytes], num_bytes: int, where: str) -> bytes:
    """Read ``num_bytes`` or fail.

    Raises:
        CorruptFileError: the stream ends before.
    """
    content = stream.read(num_bytes)
    if len(content) != num_bytes:
        raise CorruptFileError(f"{where} ends in the middle of its values.")
    return content


def read_floats(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read a float array of the given shape as float64.

    Raises:
        DataError: another shape or type, or values that are not finite.
        CorruptFileError: the file is damaged.
    """
    where = f"{path}[{key}]"
    with npz_member(path, key) as member:
        if member.shape != shape or member.dtype.kind != "f":
            raise DataError(
                f"{where} must be floats of shape {shape}, not {member.dtype} {member.shape}."
            )
        content = read_exactly(member.stream, math.prod(shape) * member.dtype.itemsize, where)
        flat = np.frombuffer(content, member.dtype).astype(np.float64)
        values = flat.reshape(shape, order="F" if member.fortran else "C")
    if not np.isfinite(values).all():
        raise DataError(f"{where} holds values that are not finite.")
    return values


def read_record(path: Path, key: str) -> dict[str, object]:
    """Read a JSON object that was stored as a string, {} if there is none.

    Raises:
        CorruptFileError: it is no JSON object.
    """
    if key not in npz_keys(path):
        return {}
    where = f"{path}[{key}]"
    with npz_member(path, key) as member:
        size = member.dtype.itemsize
        if member.shape or member.dtype.kind != "U" or not 0 < size <= _MAX_TEXT_BYTES:
            raise CorruptFileError(f"{where} must be one string.")
        content = read_exactly(member.stream, size, where)
        text = str(np.frombuffer(content, member.dtype)[0])
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{where} is not valid JSON.") from None
    if not isinstance(record, dict):
        raise CorruptFileError(f"{where} must be a JSON object.")
    return record


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed npz; call it through ``files.write_file``."""
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not an npz file.") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise CorruptFileError(f"{path} is damaged or no npz file ({error}).") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
    except Exception:  # numpy parses the header as Python, and lets everything through
        raise CorruptFileError(f"{where} has no readable npy header.") from None
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects (a pickle), which are never read.")
    return shape, fortran, dtype
