"""Files of other places: URLs as fsspec reads them, and the folder on this disk for their copies.

    latents/NAME-DIGEST/    latent sets (``remote_latents``)
    blocks/                 row groups of parquet files (``parquet_files``)
    streams/                how many items the files of a stream have (``forward_files``)

The folder is ``$LATENTLM_CACHE``, else ``~/.cache/latentlm``. What can be fetched again takes at
most ``$LATENTLM_CACHE_GB`` there (50 if it is not set): what was used longest ago goes first.

Notable choices:
    a copy is written beside its place and renamed, under a lock (256 for a folder): processes share
    the copies, and each is fetched once;
    a copy that goes while another process reads it stays readable there (not on Windows, where it
    does not go).
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from latentlm_core import files
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptFileError,
    DataError,
    LatentLMError,
    MissingExtraError,
)

KEPT = ("latents/*/shard-*.safetensors", "blocks/*.arrow")
"""Copies that go when room is wanted."""
DEFAULT_GB = 50.0
AGAIN = "Run the same command again: it goes on where it stopped."
_CHUNK = 4 * 2**20


def is_url(spec: str) -> bool:
    """Whether a spec is a URL, such as s3://BUCKET/FOLDER."""
    return "://" in spec


def cache_folder() -> Path:
    """Where copies are kept."""
    return Path(os.environ.get("LATENTLM_CACHE") or Path.home() / ".cache" / "latentlm")


def cache_bytes() -> int:
    """What the copies may take.

    Raises:
        ConfigError: the environment's LATENTLM_CACHE_GB is no number above 0.
    """
    given = os.environ.get("LATENTLM_CACHE_GB")
    try:
        gigabytes = float(given) if given else DEFAULT_GB
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(f"LATENTLM_CACHE_GB is {given!r}; it must be a number above 0.")
    return int(gigabytes * 1e9)


def digest(*parts: object) -> str:
    """16 hex digits that stand for some values."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or a path, and the path in it.

    Raises:
        MissingExtraError: the package for that kind of URL is not installed.
        DataError: there is no such kind.
        ArtifactError: it cannot be reached.
    """
    import fsspec

    try:
        with reaching(url, passing=(ImportError, ValueError)):
            return fsspec.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or url.partition("://")[0]
        raise MissingExtraError(package, f"Reading {url}") from None
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {_reason(error)}.") from None


@contextmanager
def reaching(what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Network, permission, a server's answer: file systems let everything through.

    Not a ``DataError``, of which a source may have some: nothing is left out for a bad connection.

    Args:
        what: is read.
        passing: kinds of errors that are let through.

    Raises:
        ArtifactError: it cannot be read, with the reason.
    """
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{what} is not there.") from None
    except Exception as error:
        if isinstance(error, (LatentLMError, *passing)):
            raise
        raise ArtifactError(f"{what} cannot be read: {_reason(error)}.", hint=AGAIN) from None


def read_bytes(url: str) -> bytes:
    """The content of a small file.

    Raises:
        ArtifactError: it is not there, or cannot be reached.
    """
    file_system, path = open_filesystem(url)
    with reaching(url):
        content: bytes = file_system.cat_file(path)
    return content


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copy a file here, whole or not at all.

    Raises:
        ArtifactError: it is not there, cannot be reached, or the disk refused.
        CorruptFileError: what came is not what was hashed.
    """
    files.write_file(path, lambda part: _download(url, part, sha256))


def kept(path: Path, make: Callable[[Path], None], is_sound: Callable[[Path], bool]) -> Path:
    """A copy that is there, or is made now, by one process at a time.

    Args:
        path: of the copy, in the cache.
        make: writes it, atomically.
        is_sound: whether what is there is what it should be; it is made anew otherwise.

    Raises:
        ArtifactError: the file system refused, or as ``make``.
    """
    with held(path.with_name(f".{digest(path.name)[:2]}.lock")):
        if not (path.is_file() and is_sound(path)):
            make(path)
            make_room(path)
        with suppress(OSError):
            os.utime(path)  # when it was used
    return path


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Inside the block a lock in the cache is this thread's alone; its folder is made when needed.

    Raises:
        ArtifactError: the file system refused.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        taken = FileLock(lock)
        taken.acquire()
    except OSError as error:
        raise ArtifactError(f"{lock} cannot be written: {error.strerror or error}.") from None
    try:
        yield
    finally:
        taken.release()


def make_room(newest: Path) -> None:
    """Remove the copies that were used longest ago, until the others take what they may."""
    found = []
    for path in (path for pattern in KEPT for path in cache_folder().glob(pattern)):
        with suppress(OSError):  # another process was faster
            state = path.stat()
            found.append((state.st_mtime, state.st_size, path))
    excess = sum(size for _, size, _ in found) - cache_bytes()
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        if path != newest:
            with suppress(OSError):
                path.unlink()
                excess -= size


def _download(url: str, part: Path, sha256: str) -> None:
    file_system, source = open_filesystem(url)
    hashed, size = hashlib.sha256(), 0
    with reaching(url):
        opened = file_system.open(source, "rb")
    with opened, part.open("wb") as target:
        while True:
            with reaching(url):
                content = opened.read(_CHUNK)
            if not content:
                break
            hashed.update(content)
            size += len(content)
            target.write(content)
    if hashed.hexdigest() != sha256:
        raise CorruptFileError(
            f"{url} is damaged, or came in part: the SHA-256 of the {size:,} bytes that came is "
            "not the one in its manifest.",
            hint="Try again; if it stays so, copy the file there anew.",
        )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
