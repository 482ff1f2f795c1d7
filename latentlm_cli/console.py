"""What the user sees of a finished or a failed command.

Notable choices:
- Results go to stdout, everything else to stderr, so a pipe carries results alone.
- Text is never parsed as markup and never wrapped: a path with brackets stays a path, and a piped
  line stays a line.
- Under torchrun only rank 0 speaks. Errors are the exception, since one may happen on one rank
  alone; they name their rank. A rank that fails gives rank 0 the time to fail likewise, so what all
  of them meet is told once: torchrun stops the others as soon as one has ended.
- What stopped a rank is also told to torchrun, whose own report then ends with that sentence.
- rich is imported where it draws, which keeps ``--help`` quick.
"""

import json
import os
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from latentlm_core.errors import LatentLMError, LostProcessError

if TYPE_CHECKING:
    from rich.console import Console

    from latentlm_core.result import Result


GRACE_SECONDS = 3.0
"""How long a rank waits for rank 0 to tell the same error."""


def is_main() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def terminal(*, stderr: bool) -> "Console":
    """A console that prints text as it is."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(message: str, label: str = "", style: str = "") -> None:
    """One line on stderr, after a coloured label if there is one."""
    from rich.text import Text

    terminal(stderr=True).print(Text.assemble((label, style), message))


def show(result: "Result", as_json: bool = False, dry_run: bool = False) -> None:
    """Print a result on stdout.

    Args:
        result: what a workflow returned.
        as_json: one JSON object on one line, all of the result; otherwise a table.
        dry_run: print the details below the table: they are the plan that was asked for.
    """
    from latentlm_core.report import finite

    if not is_main():
        return
    if as_json:
        typer.echo(json.dumps(finite(result.to_dict())))
        return
    rows = [(name, _readable(value)) for name, value in _flat(result.figures)]
    _show_table(result.title, [*rows, *result.files.items()])
    if dry_run and result.details:
        typer.echo("\n" + json.dumps(finite(result.details), indent=2))


def fail(error: LatentLMError | OSError) -> None:
    """Print an error as a sentence and its hint; with LATENTLM_DEBUG=1 the traceback as well."""
    if os.environ.get("LATENTLM_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, LostProcessError):
        with suppress(SystemExit):  # torchrun stops this process as well
            time.sleep(2 * GRACE_SECONDS)
        if is_main():
            say("Stopped, because another process of this command has ended.")
        return
    rank = "" if is_main() else f" (rank {os.environ['RANK']})"
    if not is_main() and os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(GRACE_SECONDS)
    _tell_torchrun(_sentence(error))
    say(_sentence(error), f"Error{rank}: ", "bold red")
    if isinstance(error, LatentLMError) and error.hint:
        say(error.hint, "Hint: ", "bold cyan")


def _tell_torchrun(sentence: str) -> None:
    """Write the file in which torchrun looks for the reason why a process has ended."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        when = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": when}}))


def _sentence(error: LatentLMError | OSError) -> str:
    if isinstance(error, LatentLMError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}."


def _show_table(title: str, rows: list[tuple[str, str]]) -> None:
    out = terminal(stderr=False)
    if not out.is_terminal:
        width = max((len(name) for name, _ in rows), default=0)
        lines = [title, *(f"{name:<{width}}  {value}" for name, value in rows)]
        typer.echo("\n".join(lines))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    out.print(Text(title, style="bold"))
    out.print(table, soft_wrap=False)


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        path = f"{prefix}{name}"
        rows += _flat(value, f"{path}.") if isinstance(value, Mapping) else [(path, value)]
    return rows


def _readable(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_readable(item) for item in value)
    return str(value)
