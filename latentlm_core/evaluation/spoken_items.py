"""Samples of speech with what they are judged against, and the rows that their scores become.

A list of samples is a JSONL file: one object a line with ``file`` and ``text``, and where they are
known ``prompt`` (whose voice it should have), ``prompt_text`` (what is said there) and ``original``
(the same text as it was recorded).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from latentlm_core.config import Config
from latentlm_core.data.audio import USUAL_LIMITS, read_audio, root_mean_square
from latentlm_core.data.base import Samples
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError
from latentlm_core.files import write_text
from latentlm_core.processes import current
from latentlm_core.progress import Progress

Made = TypeVar("Made")
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class SpokenItem:
    """A sample of speech.

    Attributes:
        file: the audio.
        text: what it should say.
        prompt: recording of the voice that it should have.
        original: recording of the same text by the same speaker.
        index: its place among the samples.
        prompt_text: what the prompt says, where that is known.
    """

    file: Path
    text: str
    prompt: Path | None
    original: Path | None
    index: int
    prompt_text: str | None = None


def read_spoken_items(samples: Path) -> list[SpokenItem]:
    """Read a list of samples.

    Args:
        samples: a folder with ``samples.jsonl``, or such a file. Paths in it are relative to its
            folder, or absolute; keys that mean nothing here are passed over.

    Raises:
        ArtifactError: there is no list.
        CorruptFileError: it cannot be read, or a line is no such object.
        DataError: it is empty, a text is, or a file is not there.
    """
    path = samples / SAMPLES_FILE if samples.is_dir() else samples
    try:
        lines = path.read_text("utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"There is no list of samples {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.") from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path} lists no samples.")
    return [
        _read_item(line, index, path.parent, f"{path}, line {number}")
        for index, (number, line) in enumerate(rows)
    ]


def listen(
    items: Sequence[SpokenItem],
    judge: Callable[[SpokenItem, Samples, int], Made],
    label: str,
    progress: Progress,
) -> tuple[list[Made], str]:
    """What a judge says of each sample; processes (``processes.current``) take them in turn.

    Args:
        items: samples.
        judge: from a sample, its audio (S,) and its rate in Hz to something that pickles.
        label: of the bar.
        progress: hears of the pass.

    Returns:
        what was said, in the order of the items, and the ``AudioHash`` of their audio.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    if not items:
        raise DataError("There are no samples to listen to.")

    def hear(item: SpokenItem) -> tuple[bytes, Made]:
        samples, sample_rate = read_audio(item.file, str(item.file))
        return audio_digest(samples, sample_rate), judge(item, samples, sample_rate)

    said, heard = [], AudioHash()
    with progress.bar(label, len(items), "files") as bar:
        for digest, one in current().shared(hear, items):
            heard.add(digest)
            said.append(one)
            bar.advance()
    return said, heard.hexdigest()


def is_silent(samples: Samples) -> bool:
    """Whether a recording (S,) lies below -60 dBFS as a whole, as sources of data have it."""
    return root_mean_square(samples) < 10 ** (USUAL_LIMITS.silence_dbfs / 20)


class AudioHash:
    """SHA-256 over decoded audio: the ``audio_digest`` of each recording in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, digest: bytes) -> None:
        """Take in one recording by its digest."""
        self._hash.update(digest)

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def audio_digest(samples: Samples, sample_rate: int) -> bytes:
    """SHA-256 of a recording (S,): rate, length and float32 values."""
    found = hashlib.sha256(f"float32 {sample_rate} {len(samples)};".encode())
    found.update(np.ascontiguousarray(samples, np.float32).data)
    return found.digest()


def write_scores(path: Path, rows: Iterable[Config]) -> None:
    """Write scores atomically, one JSON object a line.

    Raises:
        ArtifactError: the file system refused.
    """
    lines = (json.dumps(row.to_dict(), allow_nan=False, ensure_ascii=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


def _read_item(line: str, index: int, folder: Path, where: str) -> SpokenItem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{where} is not valid JSON.") from None
    if not isinstance(row, dict):
        raise CorruptFileError(f"{where} must be an object with `file` and `text`.")
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where} has no text in `text`.",
            hint="Samples of images are measured by: latentlm eval fid, is, kid, precision-recall",
        )
    file = _find(row, "file", folder, where)
    if file is None:
        raise DataError(f"{where} names no audio in `file`.")
    return SpokenItem(
        file=file,
        text=text,
        prompt=_find(row, "prompt", folder, where),
        original=_find(row, "original", folder, where),
        index=index,
        prompt_text=_prompt_text(row, where),
    )


def _prompt_text(row: dict[str, Any], where: str) -> str | None:
    text = row.get("prompt_text")
    if text is not None and not isinstance(text, str):
        raise CorruptFileError(f"{where}: `prompt_text` must be a text, not {text!r:.40}.")
    return text


def _find(row: dict[str, Any], key: str, folder: Path, where: str) -> Path | None:
    """The file that a row names under ``key``; None where it names none."""
    name = row.get(key)
    if name is None:
        return None
    if not isinstance(name, str):
        raise CorruptFileError(f"{where}: `{key}` must be the path of a file, not {name!r:.40}.")
    path = folder / name
    if not os.path.isfile(path):
        raise DataError(f"{where}: there is no file {path} for `{key}`.")
    return path
