"""What every demo has: the stages up to a model, the time of each, the report and its tables.

    runs/NAME-vae  latents/NAME  runs/NAME-lm   and OUT/report, OUT/seconds.json

Every stage is an ordinary workflow, so what a demo leaves is there for the other commands, and a
second start goes on where the first ended, or only writes the report again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from latentlm_core import workflows
from latentlm_core.files import read_json, write_json
from latentlm_core.progress import Progress
from latentlm_core.report import ReportPage, Table, write_report
from latentlm_core.result import Result
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.workflows.workspace import workspace

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

    @property
    def total(self) -> float:
        """Seconds in all."""
        return round(sum(self.seconds.values()), 1)

    def table(self) -> Table:
        """The seconds of each stage."""
        return Table(("stage", "seconds"), list(self.seconds.items()), "Time")

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


class Stages:
    """The stages of one demo.

    Args:
        name: of all that it leaves in the workspace; the seed follows where it is not 0.
        data: what it learns from, and the recipe of both models.
        out: folder of the report.
        seed: of everything.
        device: auto, cpu, cuda, ...
        progress: listener.

    Attributes:
        same: the device and the listener, which every workflow takes.
        timer: of the stages.
    """

    def __init__(
        self, name: str, data: str, *, out: Path, seed: int, device: str, progress: Progress
    ) -> None:
        self.same: dict[str, Any] = {"device": device, "progress": progress}
        self.timer = Timer(out / "seconds.json")
        self._name, self._suffix = name, f"-seed{seed}" if seed else ""
        self._data, self._seeded = data, f"trainer.seed={seed}"
        self._out, self._progress = out, progress

    def folder(self, kind: Literal["runs", "latents", "samples"], part: str = "") -> Path:
        """Where a result goes: NAME and its part, under its kind in the workspace."""
        return workspace() / kind / f"{self._name}{part}{self._suffix}"

    def train_vae(self, *overrides: str) -> Result:
        """The sigma-VAE, with changes to its recipe."""
        return self.timer.run(
            "train the sigma-VAE",
            lambda: workflows.train_vae(
                data=self._data,
                recipe=self._data,
                overrides=[self._seeded, *overrides],
                out=self.folder("runs", "-vae"),
                **self.same,
            ),
        )

    def tokenize(self) -> Result:
        """The latents of the training part."""
        return self.timer.run(
            "tokenize",
            lambda: workflows.tokenize(
                data=self._data,
                vae=str(self.folder("runs", "-vae")),
                out=self.folder("latents"),
                **self.same,
            ),
        )

    def train_lm(self, data: str, *overrides: str) -> Result:
        """The LatentLM on a latent set or a mix, with changes to its recipe."""
        return self.timer.run(
            "train the LatentLM",
            lambda: workflows.train_lm(
                data=data,
                recipe=self._data,
                overrides=[self._seeded, *overrides],
                out=self.folder("runs", "-lm"),
                **self.same,
            ),
        )

    @property
    def machine(self) -> str:
        """The hardware, in words."""
        return machine(resolve_device(self.same["device"]))

    def details(self, **results: Result) -> dict[str, Any]:
        """A page's details: the machine, versions, seconds, and those of each result."""
        return {
            "machine": self.machine,
            "versions": versions(),
            "seconds": self.timer.seconds,
            **{name: result.details for name, result in results.items()},
        }

    def report(self, title: str, page: ReportPage, samples: str, command: str) -> Result:
        """Write the page.

        Args:
            title: of the result.
            page: of which figures and details are the result's.
            samples: their folder.
            command: what the user may try next.
        """
        as_html, as_json = write_report(page, self._out)
        files = {"report": str(as_html), "json": str(as_json), "samples": samples}
        self._progress.note(f"Next: {command}")
        return Result(title, dict(page.figures), files, dict(page.details))


def result_table(result: Result, caption: str) -> Table:
    """The figures of a command as a table."""
    return Table(("figure", "value"), list(result.figures.items()), caption)
