"""Folders of recordings, with their transcripts beside them or in a table.

    SPEAKER/CHAPTER/*.flac with *.trans.txt                 LibriSpeech
    SPEAKER/CHAPTER/*.wav with *.normalized.txt             LibriTTS
    metadata.csv of ID|TEXT|NORMALISED TEXT, wavs/ID.wav    LJSpeech
    metadata.csv, .tsv or .jsonl with a header              a column of paths, of texts, of speakers
    one folder a speaker, or flat                           NAME.txt beside NAME.wav

Notable choices:
    speakers are the first parts of the paths where every file lies in a sub-folder, so the layouts
    of LibriSpeech, of LibriTTS and of one folder a speaker are read by one rule;
    what a table names must lie inside its folder;
    a file that is missing is found out when it is read: it is skipped as a broken one is.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentlm_core.data.audio import SUFFIXES, read_audio
from latentlm_core.data.base import Clip
from latentlm_core.data.folders import find_files, find_split, read_beside, readable
from latentlm_core.errors import CorruptFileError, DataError

TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
PATH_COLUMNS = ("path", "file_name", "file", "audio", "audio_path", "filename")
TEXT_COLUMNS = (
    *("text", "transcription", "transcript", "sentence"),
    *("normalized_text", "text_normalized"),
)
SPEAKER_COLUMNS = ("speaker", "speaker_id", "speaker_name", "client_id")
LIBRI_TESTS = ("test-clean", "dev-clean", "test-other", "dev-other")
"""Parts of LibriSpeech and LibriTTS that are taken for `test`, the first that is there."""
LJ_SPEAKER = "lj"
"""What the speaker of a set in the layout of LJSpeech, which has one, is called."""

_LIBRI_PART = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?")


@dataclass(frozen=True, slots=True)
class Recording:
    """A file of a folder.

    Attributes:
        path: where it is.
        key: its path inside the folder.
        text: its transcript; None where that lies beside the file, if anywhere.
        speaker: None where it is not known.
    """

    path: Path
    key: str
    text: str | None
    speaker: str | None


class SpeechFolderSource:
    """Recordings of a folder.

    Args:
        recordings: in order.
        name: what it is called in messages.

    Raises:
        DataError: there are none.
    """

    def __init__(self, recordings: Sequence[Recording], name: str) -> None:
        if not recordings:
            raise DataError(f"{name} holds no recordings ({', '.join(SUFFIXES)}).")
        self.name = name
        self.classes = tuple(sorted({item.speaker for item in recordings if item.speaker}))
        self._labels = {speaker: label for label, speaker in enumerate(self.classes)}
        self._recordings = recordings

    def __len__(self) -> int:
        return len(self._recordings)

    def __getitem__(self, index: int) -> Clip:
        item = self._recordings[index]
        samples, sample_rate = read_audio(item.path, item.key)
        text = item.text if item.text is not None else _text_beside(item)
        speaker = None if item.speaker is None else self._labels[item.speaker]
        return Clip(samples, sample_rate, text, speaker, item.key)


def open_speech_folder(root: Path, name: str, split: str) -> SpeechFolderSource | None:
    """Read a folder of audio files, whose layout is recognised by what it holds.

    Returns:
        None where it has no part for ``split``; a folder with a table of its own has no parts.

    Raises:
        DataError: it cannot be read, holds no recordings, or a table is not of its form.
    """
    parts = _find_parts(root, split)
    if not parts:
        return None
    return SpeechFolderSource([item for part in parts for item in _read_part(part)], name)


def open_speech_table(path: Path, name: str) -> SpeechFolderSource:
    """Read the recordings that a .csv, .tsv or .jsonl file lists.

    Raises:
        DataError: the file cannot be read, is not of its form, or names files elsewhere.
    """
    return SpeechFolderSource(list(_read_table(path)), name)


def inside(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` of ``folder``; links inside of it may lead anywhere.

    Raises:
        DataError: the name leads out of the folder; the message begins with ``where``.
    """
    path = Path(os.path.abspath(folder / name))
    if not path.is_relative_to(os.path.abspath(folder)):
        raise DataError(f"{where} names {name!r}, which is not inside the folder {folder}.")
    return path


def _find_table(root: Path) -> Path | None:
    return next((root / name for name in TABLES if (root / name).is_file()), None)


def _find_parts(root: Path, split: str) -> list[Path]:
    if _find_table(root):
        return [root] if split == "train" else []
    names = sorted(child.name for child in root.glob("*") if child.is_dir())
    libri = [name for name in names if _LIBRI_PART.fullmatch(name)]
    if libri and split == "train":
        return [root / name for name in libri if name.startswith("train")]
    if libri:
        return [root / name for name in LIBRI_TESTS if name in libri][:1]
    part = find_split(root, split)
    return [] if part is None else [part]


def _read_part(root: Path) -> Iterator[Recording]:
    table = _find_table(root)
    return _read_table(table) if table else _read_tree(root)


def _read_tree(root: Path) -> Iterator[Recording]:
    """Every audio file, with the line of a LibriSpeech transcript in its folder if there is one."""
    relative = find_files(root, SUFFIXES)
    has_speakers = all(os.sep in name for name in relative)
    folders = {os.path.dirname(name) for name in relative}
    texts = {folder: _chapter_texts(root / folder) for folder in folders}
    for name in relative:
        path = root / name
        speaker = readable(name.split(os.sep)[0]) if has_speakers else None
        text = texts[os.path.dirname(name)].get(path.stem)
        yield Recording(path, _key(path, root), text, speaker)


def _chapter_texts(folder: Path) -> dict[str, str]:
    """Texts by the stems of files, from lines of the form ``STEM TEXT``."""
    lines = (line for path in folder.glob("*.trans.txt") for line in _lines(path))
    pairs = (line.strip().partition(" ") for line in lines)
    return {stem: text for stem, _, text in pairs}


def _read_table(path: Path) -> Iterator[Recording]:
    lines = _lines(path)
    if path.suffix == ".csv" and "|" in lines[0] and (path.parent / "wavs").is_dir():
        return _read_lj_rows(path, lines)
    return _read_rows(path, lines)


def _read_lj_rows(table: Path, lines: Iterable[str]) -> Iterator[Recording]:
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"Row {row} of {table}"
        stem, *texts = line.strip().split("|")
        if not stem or not texts:
            raise DataError(f"{where} is not ID|TEXT|NORMALISED TEXT.")
        path = inside(table.parent, f"wavs/{stem}.wav", where)
        text = next((text for text in reversed(texts) if text), "")
        yield Recording(path, _key(path, table.parent), text, LJ_SPEAKER)


def _read_rows(table: Path, lines: Iterable[str]) -> Iterator[Recording]:
    rows = _json_rows(table, lines) if table.suffix == ".jsonl" else _csv_rows(table, lines)
    for row, cells in rows:
        where = f"Row {row} of {table}"
        name = _cell(cells, PATH_COLUMNS)
        if name is None:
            raise DataError(
                f"{where} names no file; it has: {', '.join(map(str, cells))}, "
                f"and a file is one of {', '.join(PATH_COLUMNS)}."
            )
        path = inside(table.parent, name, where)
        text, speaker = _cell(cells, TEXT_COLUMNS), _cell(cells, SPEAKER_COLUMNS)
        yield Recording(path, _key(path, table.parent), text, speaker)


def _csv_rows(table: Path, lines: Iterable[str]) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    delimiter = "\t" if table.suffix == ".tsv" else ","
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise CorruptFileError(
            f"Row {reader.line_num + 1} of {table} is broken: {error}."
        ) from None


def _json_rows(table: Path, lines: Iterable[str]) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError):
            cells = None
        if not isinstance(cells, dict):
            raise CorruptFileError(f"Row {row} of {table} is no JSON object.")
        yield row, cells


def _cell(cells: Mapping[Any, Any], columns: Sequence[str]) -> str | None:
    """The first of the columns that holds something, as text."""
    found = (cells.get(column) for column in columns)
    return next((str(value) for value in found if value not in (None, "")), None)


def _lines(path: Path) -> list[str]:
    """Lines with their ends, at least one; a byte order mark is dropped."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise CorruptFileError(f"{path} is not UTF-8 text.") from None
    return [f"{line}\n" for line in text.split("\n")]


def _key(path: Path, root: Path) -> str:
    return readable(Path(os.path.relpath(path, root)).as_posix())


def _text_beside(item: Recording) -> str | None:
    texts = (
        read_beside(item.path.with_suffix(suffix), item.key, "transcript")
        for suffix in (".normalized.txt", ".txt")
    )
    return next((text for text in texts if text is not None), None)
