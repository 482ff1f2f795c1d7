"""The figures of a run: ``metrics.jsonl`` and the means that go into it.

One JSON object a line, one line a step at most, ``step`` first; numbers are finite or null. A run
that resumes at step s drops the rows after s first, so no step is there twice; the log is on disk
before the checkpoint that follows it, so none is missing.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core.errors import ArtifactError, CorruptFileError
from latentlm_core.files import read_text, write_text
from latentlm_core.training.tasks import Term, Turn

Row = dict[str, Any]
Sums = dict[str, tuple[float, int]]
"""Sum and count of each term."""


class RunLog:
    """Writer of a ``metrics.jsonl``.

    Args:
        path: the file; its rows after ``step`` are dropped.
        step: where the run stands.

    Raises:
        ArtifactError: the file cannot be written.
        CorruptFileError: a row of it is no JSON object.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows = read_metrics(path) if path.exists() else []
        write_text(path, "".join(_line(row) for row in rows if row["step"] <= step))

    def write(self, step: int, figures: Mapping[str, float | None]) -> dict[str, float]:
        """Append the row of ``step`` and put it on disk.

        Returns:
            The figures that are finite numbers; the others are null in the log.

        Raises:
            ArtifactError: the file cannot be written.
        """
        finite = {
            name: value
            for name, value in figures.items()
            if value is not None and math.isfinite(value)
        }
        row = {"step": step} | {name: finite.get(name) for name in figures}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = error.strerror or error
            raise ArtifactError(f"{self.path} cannot be written: {reason}.") from error
        return finite


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, without a last line that is only half written.

    Raises:
        ArtifactError: there is no such file.
        CorruptFileError: it is no text, or a line is no JSON object with a ``step``.
    """
    *lines, _ = read_text(path).split("\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def last_figures(path: Path) -> dict[str, float | None]:
    """The newest value of each figure in a ``metrics.jsonl``."""
    newest: Row = {}
    for row in read_metrics(path):
        newest |= row
    newest.pop("step", None)
    return newest


def figures_of(sums: Sums) -> dict[str, float]:
    """The means of one step's sums."""
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


def shown_figures(turn: Turn, figures: Mapping[str, float]) -> dict[str, float]:
    """What of a row belongs on a progress bar, in the bar's words: a loss and how fast it falls."""
    shown = {
        f"loss/{turn.name}": "loss",
        "tokens_per_second": "tokens/s",
        "flops_utilisation": "MFU",
        "data_wait_share": "waiting",
    }
    return {word: figures[name] for name, word in shown.items() if name in figures}


class Means:
    """Means of terms over several steps, whose values stay on the device until they are withdrawn.

    Sums are float64 and in the order of the steps, so they depend neither on when values are
    withdrawn nor on a checkpoint in between.
    """

    def __init__(self) -> None:
        self._sums: Sums = {}
        self._waiting: list[tuple[dict[str, int], Tensor]] = []

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add one step's terms; nothing is copied to the host."""
        totals = torch.stack([term.total.detach().float() for term in terms.values()])
        self._waiting.append(({name: term.count for name, term in terms.items()}, totals))

    def withdraw(self) -> list[Sums]:
        """Copy what was added since the last call to the host, in one transfer, and forget it.

        Returns:
            The sums of each ``add`` since then.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        values = iter(torch.cat([totals for _, totals in waiting]).tolist())
        return [{name: (next(values), counts[name]) for name in counts} for counts, _ in waiting]

    def count(self, sums: Sums) -> None:
        """Add one step's sums, which are on the host.

        Terms are in the order of the newest step, which a checkpoint does not keep.
        """
        newest: Sums = {}
        for name, (total, count) in sums.items():
            total_before, count_before = self._sums.pop(name, (0.0, 0))
            newest[name] = (total_before + total, count_before + count)
        self._sums = newest | dict(sorted(self._sums.items()))

    def take(self) -> dict[str, float | None]:
        """The means of what was counted, None where nothing was counted; then start anew."""
        means = {name: total / n if n else None for name, (total, n) in self._sums.items()}
        self._sums = {}
        return means

    def tensors(self) -> dict[str, Tensor]:
        """What was counted, as (2,) float64 sum and count, for a checkpoint."""
        return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in self._sums.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``tensors`` returned."""
        self._sums = {name: (float(pair[0]), int(pair[1])) for name, pair in tensors.items()}


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _parse(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise CorruptFileError(f"{path} line {number} is no JSON object with a step.")
    return row
