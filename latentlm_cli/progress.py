"""Long work on stderr: bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from latentlm_cli.console import is_main, say, terminal
from latentlm_core.progress import SILENT, Bar, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Display
    from rich.progress import TaskID

FIRST_LINE = 2.0
"""Seconds until a piped bar first speaks; short work stays silent until it ends."""


def listener() -> Progress:
    """The progress that fits this process: bars, lines, or nothing on ranks that are not 0."""
    if not is_main():
        return SILENT
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()


class LineProgress:
    """Plain lines for logs and pipes: a few in the first minute, then one or two a minute."""

    @contextmanager
    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
        """A bar that writes where it stands, and once more when it closes."""
        bar = _LineBar(label, total, unit, done)
        try:
            yield bar
        finally:
            bar.write()

    def note(self, message: str) -> None:
        """One line."""
        say(message)

    def warn(self, message: str) -> None:
        """One line that says it is a warning."""
        say(message, "Warning: ")


class TerminalProgress:
    """Live bars; a bar opened inside another is shown below it and goes when it is done."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = terminal(stderr=True)
        self._display = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", style="cyan"),
            console=self._console,
            refresh_per_second=4,
        )
        self._num_open = 0

    @contextmanager
    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
        """A live bar."""
        if not self._num_open:
            self._display.start()
        self._num_open += 1
        task = self._display.add_task(
            label, total=total, completed=done, unit=unit, rate="", figures=""
        )
        try:
            yield _TerminalBar(self._display, task, total, done)
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._display.stop()
            self._display.remove_task(task)

    def note(self, message: str) -> None:
        """One line above the bars."""
        self._console.print(message)

    def warn(self, message: str) -> None:
        """One coloured line above the bars."""
        from rich.text import Text

        self._console.print(Text.assemble(("Warning: ", "bold yellow"), message))


class _Pace:
    """How far a bar is, and how fast it got there in this process."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._start = done
        self._began = time.monotonic()
        self._figures: dict[str, float] = {}

    def advance(self, amount: int, figures: Mapping[str, float]) -> None:
        self.done += amount
        self._figures.update(figures)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        return max(self.done - self._start, 0) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / self.rate if self.rate else 0.0

    def show_rate(self) -> str:
        return f"{self.rate:,.0f}/s" if self.rate >= 100 else f"{self.rate:.3g}/s"

    def show_figures(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self._figures.items())


class _LineBar:
    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self._label, self._unit = label, unit
        self._pace = _Pace(total, done)
        self._next = FIRST_LINE

    def advance(self, amount: int = 1, **figures: float) -> None:
        self._pace.advance(amount, figures)
        if self._pace.seconds >= self._next:
            self.write()
            self._next = self._pace.seconds + min(max(5.0, self._pace.seconds / 4), 60.0)

    def write(self) -> None:
        pace = self._pace
        left = pace.seconds_left
        say(
            f"{self._label} {pace.done:,}/{pace.total:,} {self._unit}"
            f"  {pace.done / max(pace.total, 1):.0%}  {pace.show_rate()}"
            f"  {f'{_clock(left)} left' if left else f'in {_clock(pace.seconds)}'}"
            f"  {pace.show_figures()}".rstrip()
        )


class _TerminalBar:
    def __init__(self, display: "Display", task: "TaskID", total: int, done: int) -> None:
        self._display, self._task = display, task
        self._pace = _Pace(total, done)

    def advance(self, amount: int = 1, **figures: float) -> None:
        self._pace.advance(amount, figures)
        self._display.update(
            self._task,
            advance=amount,
            rate=self._pace.show_rate(),
            figures=self._pace.show_figures(),
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
