"""What every demo has: the time of its stages, and its tables."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from latentlm_core.files import read_json, write_json
from latentlm_core.report import Table
from latentlm_core.result import Result

T = TypeVar("T")


class Timer:
    """Seconds of each stage, added up over all starts until the stage is complete.

    Args:
        path: where they are kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        return {name: round(stage["seconds"], 1) for name, stage in self._stages.items()}

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Do the work of a stage; a start that finds it complete costs nothing."""
        stage = self._stages.setdefault(name, {"seconds": 0.0, "is_complete": False})
        start = time.perf_counter()
        was_complete = stage["is_complete"]
        try:
            result = work()
            stage["is_complete"] = True
            return result
        finally:
            if not was_complete:
                stage["seconds"] += time.perf_counter() - start
                write_json(self._path, self._stages)


def result_table(result: Result, caption: str) -> Table:
    """The figures of a command as a table."""
    return Table(("figure", "value"), list(result.figures.items()), caption)
