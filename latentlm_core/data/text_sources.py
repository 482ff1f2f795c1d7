"""Finite sets of documents: files of text, jsonl, csv, tables of the `datasets` library.

Notable choices:
    no set is held in memory: of a jsonl or csv the places of its lines are found once (8 bytes a
    line) and a line is read when it is asked for; tables are memory-mapped;
    a document may be empty here, for the places of a file are its lines: who reads skips it;
    bytes that are no UTF-8 become U+FFFD.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from latentlm_core.data.base import AnySource
from latentlm_core.data.columns import is_text
from latentlm_core.data.folders import find_files, readable
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.tokenizers.text_normalise import whole

TEXT_SUFFIXES = (".txt", ".md")
TEXT_COLUMNS = (
    *("text", "content", "document", "article", "body", "story", "passage"),
    *("sentence", "raw_content", "code", "transcription", "transcript"),
)
"""Names of columns of text, the first that is there."""

_CHUNK = 1 << 22
"""Bytes that are searched for line ends at once."""
_MAX_CELL = (1 << 31) - 1
_NEWLINE, _QUOTE = b'\n"'


class TextItem(NamedTuple):
    """One document."""

    text: str
    key: str
    """Its name inside its set, the same on every machine."""


TextSource = AnySource[TextItem]
"""Documents in a fixed order."""


class ListTexts:
    """Documents that are at hand.

    Args:
        items: the documents.
        name: what they are called in messages.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, items: Sequence[TextItem], name: str) -> None:
        self.name = name
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> TextItem:
        return self._items[index]


class FileTexts:
    """Files, each one a document.

    Args:
        root: the folder.
        paths: of the files in it; these are the keys.
        name: what they are called in messages.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, root: Path, paths: Sequence[str], name: str) -> None:
        self.name = name
        self._root = root
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> TextItem:
        relative = Path(self._paths[index])
        key = readable(PurePosixPath(*relative.parts).as_posix())
        try:
            text = (self._root / relative).read_text("utf-8-sig", "replace")
        except OSError as error:
            raise CorruptFileError(f"{key} cannot be read: {error.strerror}.") from None
        return TextItem(text, key)


class JsonlTexts:
    """A file with a JSON object on each line; keys are line numbers from 0.

    Args:
        path: the file.
        name: what it is called in messages.

    Raises:
        DataError: it cannot be read, or its first object has no text.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._file = path.name
        self._lines = _Lines(path, is_csv=False)
        rows = (self._row(index) for index in range(len(self._lines)))
        first = next((row for row in rows if row is not None), {})
        texts = [key for key, cell in first.items() if cell is None or isinstance(cell, str)]
        self._column = text_column(texts, first, name)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> TextItem:
        text = (self._row(index) or {}).get(self._column)
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise DataError(f"{self._file}, line {index + 1}: {self._column} is no text.")
        return TextItem(whole(text), f"{index:08d}")

    def _row(self, index: int) -> dict[str, Any] | None:
        """None of a blank line."""
        line = self._lines[index]
        if not line.strip():
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise CorruptFileError(f"{self._file}, line {index + 1} is no JSON.") from None
        if not isinstance(row, dict):
            raise CorruptFileError(f"{self._file}, line {index + 1} is no JSON object.")
        return row


class CsvTexts:
    """A table with commas and a row of names, as RFC 4180 has it; keys are row numbers from 0.

    Args:
        path: the file.
        name: what it is called in messages.

    Raises:
        DataError: it cannot be read, or has no column of text.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._file = path.name
        self._lines = _Lines(path, is_csv=True)
        self._names = self._row(0)
        self._column = self._names.index(text_column(self._names, self._names, name))

    def __len__(self) -> int:
        return len(self._lines) - 1

    def __getitem__(self, index: int) -> TextItem:
        row = self._row(index + 1)
        if len(row) not in (0, len(self._names)):
            raise CorruptFileError(
                f"{self._file}, row {index + 2} has {len(row)} cells, not {len(self._names)}."
            )
        return TextItem(row[self._column] if row else "", f"{index:08d}")

    def _row(self, index: int) -> list[str]:
        """Nothing of a blank row."""
        limit = csv.field_size_limit(_MAX_CELL)  # of the whole process
        try:
            return next(csv.reader([self._lines[index]], strict=True), [])
        except csv.Error as error:
            raise CorruptFileError(f"{self._file}, row {index + 1} is no CSV: {error}.") from None
        finally:
            csv.field_size_limit(limit)


class TableTexts:
    """A table with a column of text; keys are row numbers.

    Args:
        table: a ``datasets.Dataset``.
        name: what it is called in messages.

    Raises:
        DataError: it has no column of text.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, table: Any, name: str) -> None:
        self.name = name
        texts = [key for key, kind in table.features.items() if is_text(kind)]
        self._column = text_column(texts, table.features, name)
        self._table = table.select_columns([self._column])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TextItem:
        key = f"{index:08d}"
        try:
            row = self._table[index]
        except Exception as error:  # whatever pyarrow makes of a damaged table
            raise DataError(f"{self.name}: {key} cannot be read: {error}.") from None
        return TextItem(row[self._column] or "", key)


def open_text_folder(root: Path, name: str) -> FileTexts:
    """Every .txt and .md file below a folder; hidden ones are not looked at.

    Raises:
        DataError: the folder cannot be read or has none.
    """
    paths = find_files(root, TEXT_SUFFIXES)
    if not paths:
        raise DataError(f"{name} holds no {', '.join(TEXT_SUFFIXES)} or .parquet files.")
    return FileTexts(root, paths, name)


def text_column(texts: Iterable[str], columns: Iterable[str], name: str) -> str:
    """The column to read.

    Args:
        texts: columns that hold text.
        columns: every column, for the message.
        name: of the set, for the message.

    Raises:
        DataError: none has a usual name.
    """
    found = set(texts)
    column = next((known for known in TEXT_COLUMNS if known in found), None)
    if column is None:
        listed = ", ".join(columns) or "nothing"
        raise DataError(
            f"{name} has no text column; it has: {listed[:300]}.",
            hint=f"Text is read from a column of the name {', '.join(TEXT_COLUMNS)}.",
        )
    return column


class _Lines:
    """The lines of a file of any size; of a csv, line ends inside quotes are none.

    Raises:
        DataError: the file cannot be read or is empty.
    """

    def __init__(self, path: Path, is_csv: bool) -> None:
        try:
            if not path.stat().st_size:
                raise DataError(f"{path} is empty.")
            self._content = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
        self._ends = _line_ends(self._content, is_csv)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        content = self._content[start : self._ends[index]].tobytes()
        text = content.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
        return text if index else text.removeprefix("\ufeff")


def _line_ends(content: npt.NDArray[np.uint8], is_csv: bool) -> npt.NDArray[np.int64]:
    """Where each line of a file ends, its newline included."""
    found, num_quotes = [], 0
    for start in range(0, len(content), _CHUNK):
        chunk = content[start : start + _CHUNK]
        ends = np.flatnonzero(chunk == _NEWLINE)
        if is_csv:
            quotes = np.cumsum(chunk == _QUOTE) + num_quotes
            ends = ends[quotes[ends] % 2 == 0]
            num_quotes = int(quotes[-1])
        found.append(ends + start + 1)
    if not (len(found[-1]) and found[-1][-1] == len(content)):
        found.append(np.array([len(content)]))
    return np.concatenate(found)
