"""latentlm doctor."""

from typing import Annotated

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm doctor",
    "latentlm doctor latents/mnist",
    "latentlm doctor runs/lm-mnist --json",
)


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|LATENTS|DATA|EXPORT",
            help="What to examine: a folder, a name in the workspace, or a data set as --data "
            "takes it; this machine if left out.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Examine this machine, a data set, latents, a run or an export: a line a thing.

    Each line says ok, warning or fault, and what to do. Nothing is changed.
    The exit code is 1 where there is a fault, else 0.
    """
    from latentlm_core import workflows

    result = workflows.doctor(target=target, progress=listener())
    console.show(result, json)
    raise typer.Exit(1 if result.details["faults"] else 0)
