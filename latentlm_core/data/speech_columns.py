"""Sets of recordings of the `datasets` library: parquet folders and sets on the hub.

Notable choices:
    audio is decoded here, not by the library, which would want a decoder of its own;
    a path that a parquet file names must lie inside its folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentlm_core.data.audio import read_audio
from latentlm_core.data.base import Clip
from latentlm_core.data.columns import (
    is_text,
    one_sentence,
    read_hub,
    read_parquet,
    streamed_rows,
)
from latentlm_core.data.speech_folders import SPEAKER_COLUMNS, TEXT_COLUMNS, inside
from latentlm_core.data.streamed_table import StreamedTable
from latentlm_core.errors import DataError

AUDIO_COLUMNS = ("audio", "speech", "file", "wav", "flac")
"""Names of columns that hold files where the table does not say which are audio."""


class SpeechColumnSource:
    """A table with an audio column, and transcripts and speakers where it has such columns.

    The audio is the first column of that type; keys are row numbers.

    Args:
        table: a ``datasets.Dataset``, or a ``StreamedTable``.
        name: what it is called in messages.
        root: the folder in which all files must lie that the table names; None where the library
            itself has put them there.

    Attributes:
        streamed: where its items come from that are read in blocks, see ``blocks.streamed``.

    Raises:
        DataError: the table has no audio column.
        ArtifactError: a stream cannot be read.
    """

    def __init__(self, table: Any, name: str, root: Path | None = None) -> None:
        import datasets

        self.name = name
        features = dict(table.features)
        self._audio = _audio_column(features, name)
        self._text = next((key for key in TEXT_COLUMNS if is_text(features.get(key))), None)
        self._speaker = next((key for key in SPEAKER_COLUMNS if key in features), None)
        self._speakers = _speaker_names(table, self._speaker)
        self.classes = tuple(sorted({speaker for speaker in self._speakers if speaker}))
        self._labels = {speaker: label for label, speaker in enumerate(self.classes)}
        wanted = [key for key in (self._audio, self._text) if key is not None]
        self._table = table.select_columns(wanted).cast_column(
            self._audio, datasets.Audio(decode=False)
        )
        self._root = root
        self.streamed = streamed_rows(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Clip:
        key = f"{index:08d}"
        with one_sentence(f"{key} cannot be read"):
            row = self._table[index]
        samples, sample_rate = read_audio(self._content(row[self._audio] or {}, key), key)
        text = row[self._text] if self._text else None
        speaker = self._speakers[index]
        label = None if speaker is None else self._labels.get(speaker)
        return Clip(samples, sample_rate, text, label, key)

    def _content(self, cell: dict[str, Any], key: str) -> Path | bytes:
        if cell.get("bytes") or not cell.get("path") or self.streamed is not None:
            return cell.get("bytes") or b""
        return Path(cell["path"]) if self._root is None else inside(self._root, cell["path"], key)


def open_speech_parquet(paths: Sequence[Path], name: str) -> SpeechColumnSource:
    """Read parquet files of one folder as one table, in the order given.

    Raises:
        DataError: they cannot be read or hold no audio.
    """
    return SpeechColumnSource(read_parquet(paths, name), name, paths[0].parent)


def open_speech_hub(repository: str, split: str, name: str) -> SpeechColumnSource | None:
    """Load a set of recordings from the hub; arguments and None as ``columns.open_hub``.

    Raises:
        DataError: it cannot be loaded, holds no audio, or has no split of that very name.
    """
    table = read_hub(repository, split, name)
    return None if table is None else SpeechColumnSource(table, name)


def _audio_column(features: dict[str, Any], name: str) -> str:
    import datasets

    typed = [key for key, kind in features.items() if isinstance(kind, datasets.Audio)]
    named = [key for key in AUDIO_COLUMNS if {"bytes", "path"} == set(_fields(features.get(key)))]
    if not typed + named:
        raise DataError(f"{name} has no audio column; it has: {', '.join(features)}.")
    return (typed + named)[0]


def _fields(kind: Any) -> Sequence[str]:
    return tuple(kind) if isinstance(kind, dict) else ()


def _speaker_names(table: Any, column: str | None) -> list[str | None]:
    if column is None:
        return [None] * len(table)
    names = getattr(table.features[column], "names", None)
    cells = table.column(column) if isinstance(table, StreamedTable) else table[column][:]
    if names is not None:
        cells = [names[cell] if cell is not None and cell >= 0 else None for cell in cells]
    return [None if cell is None else str(cell) for cell in cells]
