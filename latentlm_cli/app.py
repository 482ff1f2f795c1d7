"""The application: which commands there are, and what an error becomes.

LatentLMError                        one sentence and a hint, exit code 1
the machine refused (disk, rights)   one sentence, 1
wrong usage                          Typer's message, 2
Ctrl-C                               one line, 130
SIGTERM                              one line, 143
anything else                        a bug of ours: the traceback
"""

import errno
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from latentlm_cli import (
    bench,
    console,
    demo,
    doctor,
    evaluate,
    hub,
    options,
    sample,
    tokenize,
    train,
)
from latentlm_core.errors import LatentLMError

MACHINE_FAULTS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
"""What an operating system refuses through no fault of the program."""

RESUMABLE = {"demo", "train-vae", "tokenize", "train-lm", "sample"}
"""Commands that go on where they were stopped."""

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Of the library's errors the one of how a command was called; its home moves between versions."""

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

_asked: list[int] = []
"""Signals that came: libraries in C may make an error of their own of what a handler raises."""


class Application(TyperGroup):
    """A group of commands that turns errors into sentences and exit codes."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command that ``ctx`` holds."""
        try:
            return self._run(ctx)
        except UsageError:
            if console.is_main():
                raise
            raise typer.Exit(2) from None  # all ranks are called alike, and rank 0 tells
        except LatentLMError as error:
            console.fail(error)
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno not in MACHINE_FAULTS:
                raise
            console.fail(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _stopped("Interrupted", ctx.invoked_subcommand)
            raise typer.Exit(INTERRUPTED) from None
        except SystemExit as stop:
            if stop.code == TERMINATED:
                _stopped("Terminated", ctx.invoked_subcommand)
            raise

    def _run(self, ctx: typer.Context) -> Any:
        """Run the command; who was asked to stop stops, whatever error a library makes of that."""
        try:
            return super().invoke(ctx)
        except Exception:
            if _asked:
                _stop(_asked[-1], None)
            raise


app = typer.Typer(
    name="latentlm",
    cls=Application,
    help="LatentLM: train, sample and measure causal Transformers over continuous latents.",
    epilog=options.examples("latentlm demo", "latentlm sample --class 3 -n 20 --seed 3 --out d3"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
START, PATH, SHARE = "Start here", "From data to samples, in this order", "Share"
app.command(rich_help_panel=START, epilog=demo.EXAMPLES)(demo.demo)
app.command(rich_help_panel=START, epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(rich_help_panel=PATH, epilog=train.VAE_EXAMPLES)(train.train_vae)
app.command(rich_help_panel=PATH, epilog=tokenize.EXAMPLES)(tokenize.tokenize)
app.command(rich_help_panel=PATH, epilog=train.LM_EXAMPLES)(train.train_lm)
app.command(rich_help_panel=PATH, epilog=sample.EXAMPLES)(sample.sample)
app.add_typer(evaluate.app, name="eval", rich_help_panel=PATH)
app.add_typer(bench.app, name="bench", rich_help_panel=SHARE)
app.command(rich_help_panel=SHARE, epilog=hub.EXAMPLES)(hub.push)


def main() -> None:
    """The console script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(prog_name="latentlm")
    except KeyboardInterrupt:  # before a command begins, or after it
        sys.exit(INTERRUPTED)


def _show_version(asked: bool) -> None:
    if asked:
        from latentlm_core import __version__

        typer.echo(f"latentlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave like any exception does: temporary files go, locks open."""
    _asked.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _stopped(how: str, command: str | None) -> None:
    if console.is_main():
        again = "resumes" if command in RESUMABLE else "starts over"
        console.say(f"{how}. The same command {again}.")
