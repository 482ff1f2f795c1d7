"""A folder of spoken samples, and what stands beside them.

    settings.json       what decides the samples: model, seed, sampler, texts or protocol
    000000.wav ...      the samples, each written when it is whole (or while it is streamed)
    samples.jsonl       a row for each: file, text, how it ended, seconds, voice, original
    progress/           rows that are to be put there, a file for each
    voices/000000.wav   the recording that gave the voice, and originals/ that of the same text
    spectrograms.png    the first of them

``latentlm eval wer`` and ``sim`` read this folder and need nothing else.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from latentlm_core.data.audio import prepare, read_audio, write_wav
from latentlm_core.data.base import Clip
from latentlm_core.errors import CorruptFileError
from latentlm_core.figures import spectrograms
from latentlm_core.files import read_text, write_text
from latentlm_core.workflows.claimed_folder import ClaimedFolder
from latentlm_core.workflows.speaking import Line, Spoken
from latentlm_core.workflows.watch import longest_silence

NUM_SHOWN = 6


class SpokenFolder(ClaimedFolder):
    """Speech of one model, seed and setting; of other settings it takes none.

    Args:
        path: the folder.
        settings: JSON values that decide the samples.
        sample_rate: of what is written.
    """

    suffix = ".wav"

    def __init__(self, path: Path, settings: dict[str, Any], sample_rate: int) -> None:
        super().__init__(path, settings)
        self._sample_rate = sample_rate
        self._rows_path = path / "samples.jsonl"
        self._progress = path / "progress"

    def claim(self) -> None:
        """Take the folder, and account for what an interrupted command left there."""
        super().claim()
        self.settle()

    def settle(self) -> None:
        """Put the rows of all samples into ``samples.jsonl``."""
        if self._progress.is_dir():
            rows = self.rows()
            for path in sorted(self._progress.glob("[0-9]*.jsonl")):
                rows |= _read_rows(path)
            self._write(self._rows_path, rows)
            shutil.rmtree(self._progress)

    def missing(self, count: int) -> list[int]:
        """Which of the first ``count`` samples have no row, which is written last, or no file."""
        rows = self.rows()
        return [index for index in range(count) if not self._is_whole(rows.get(index))]

    def forget(self, index: int) -> None:
        """Take a sample's row back, before its file is written bit by bit."""
        rows = self.rows()
        if rows.pop(index, None):
            self._write(self._rows_path, rows)

    def rows(self) -> dict[int, dict[str, Any]]:
        """What ``samples.jsonl`` says of the samples, by index.

        Raises:
            CorruptFileError: a row is no JSON object with an index.
        """
        return _read_rows(self._rows_path) if self._rows_path.is_file() else {}

    def add(self, index: int, line: Line, said: Spoken) -> None:
        """Write a sample, what it is compared with, and then its row."""
        write_wav(self.file(index), said.audio.numpy(), self._sample_rate)
        row = {
            "file": self.file(index).name,
            "index": index,
            "text": line.text,
            "seconds": round(len(said.audio) / self._sample_rate, 3),
            "latents": said.num_latents,
            "ended_by": said.ended_by,
            "longest_silence": round(longest_silence(said.audio, self._sample_rate), 2),
            "prompt": self._keep(line.voice, "voices", index),
            "prompt_text": line.voice.text if line.voice else None,
            "original": self._keep(line.original, "originals", index),
        }
        self._write(self._progress / f"{index:06d}.jsonl", {index: row})

    def draw(self, count: int) -> Path:
        """Spectrograms of the first samples, with their texts."""
        rows = self.rows()
        shown = list(range(min(count, NUM_SHOWN)))
        audio = [read_audio(self.file(index), str(self.file(index)))[0] for index in shown]
        path = self.path / "spectrograms.png"
        titles = [str(rows[index]["text"]) for index in shown]
        spectrograms([torch.from_numpy(one) for one in audio], self._sample_rate, titles, path)
        return path

    def _is_whole(self, row: dict[str, Any] | None) -> bool:
        """Whether a sample is there, with all that its row names."""
        if row is None:
            return False
        names = (row.get(kind) for kind in ("file", "prompt", "original"))
        return all(os.path.isfile(self.path / name) for name in names if name)

    def _write(self, path: Path, rows: dict[int, dict[str, Any]]) -> None:
        write_text(path, "".join(json.dumps(rows[index]) + "\n" for index in sorted(rows)))

    def _keep(self, clip: Clip | None, kind: str, index: int) -> str | None:
        """Write a recording as the networks hear it; its name within the folder."""
        if clip is None:
            return None
        name = f"{kind}/{index:06d}.wav"
        write_wav(self.path / name, prepare(clip, self._sample_rate), self._sample_rate)
        return name


def _read_rows(path: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            named = [row["file"], row["text"], row.get("prompt") or "", row.get("original") or ""]
            if not all(isinstance(name, str) for name in named):
                raise TypeError
            found[int(row["index"])] = row
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise CorruptFileError(f"{path}, line {number}, is no row of a sample.") from None
    return found
