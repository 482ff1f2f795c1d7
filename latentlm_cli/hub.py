"""latentlm push."""

from typing import Annotated

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm push my-name/digits --model runs/digits --private",
)


def push(
    repo_id: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The hub repository; made if it is not there.")
    ],
    model: options.Model = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Upload an export with its model card and evaluation to the Hugging Face hub.

    Log in first: `hf auth login`, or set HF_TOKEN.
    """
    from latentlm_core import workflows

    result = workflows.push(model=model, repo_id=repo_id, private=private, progress=listener())
    console.show(result, json)
