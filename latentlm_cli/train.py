"""latentlm train-vae and latentlm train-lm."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from latentlm_cli import console, options, prompts
from latentlm_cli.progress import listener

VAE_EXAMPLES = options.examples(
    "latentlm train-vae --data mnist --out runs/digits-vae",
    "latentlm train-vae --data cifar10 --set loss.beta=1e-4 --dry-run",
    "latentlm train-vae --data ljspeech:PATH --recipe speech-7.5hz",
    "latentlm train-vae --data stream:hf:ORG/NAME --recipe imagenet",
)
LM_EXAMPLES = options.examples(
    "latentlm train-lm --data latents/mnist --out runs/digits",
    "latentlm train-lm --data latents/mnist --recipe mnist --set optimizer.lr=5e-4",
    "latentlm train-lm --data s3://BUCKET/latents/imagenet",
    "latentlm train-lm --data text:pydoc=1,latents/coloured-digits=3",
    "latentlm train-lm --data text:pydoc=1,latents/coloured-digits=3 --init hf:Qwen/Qwen3-0.6B",
    "latentlm train-lm --data latents/mnist --distill runs/digits",
)


def _list_vae_recipes(asked: bool) -> None:
    if asked:
        from latentlm_core.recipes import vae_recipe_names

        _list(vae_recipe_names())


def _list_lm_recipes(asked: bool) -> None:
    if asked:
        from latentlm_core.recipes import distill_recipe_names, lm_recipe_names

        _list([*lm_recipe_names(), *(f"{name} (--distill)" for name in distill_recipe_names())])


def _list(names: Sequence[str]) -> None:
    typer.echo("\n".join(names))
    raise typer.Exit


LIST_HELP = "Print the names of the recipes and exit."
ListVaeRecipes = Annotated[
    bool,
    typer.Option("--list-recipes", is_eager=True, callback=_list_vae_recipes, help=LIST_HELP),
]
ListLmRecipes = Annotated[
    bool,
    typer.Option("--list-recipes", is_eager=True, callback=_list_lm_recipes, help=LIST_HELP),
]


def train_vae(
    data: options.Data,
    recipe: options.Recipe = None,
    list_recipes: ListVaeRecipes = False,
    overrides: options.Overrides = None,
    out: options.Out = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Train a sigma-VAE, the tokenizer of images or of speech.

    Running the same command again continues an interrupted run.
    """
    from latentlm_core import workflows

    result = workflows.train_vae(
        data=data,
        recipe=recipe,
        overrides=overrides or (),
        out=out,
        device=device,
        dry_run=dry_run,
        progress=listener(),
    )
    console.show(result, json, dry_run)


def train_lm(
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="A latent set made by tokenize, the newest of the workspace if left out, or its "
            "URL (stream:URL shard by shard, of any size); or a mix with weights, as in "
            "text:pydoc=1,latents/NAME=2,interleaved:latents/NAME=1.",
        ),
    ] = None,
    recipe: options.Recipe = None,
    list_recipes: ListLmRecipes = False,
    overrides: options.Overrides = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="CHECKPOINT",
            help="Begin with a language model: a folder or hf:ORG/NAME of a Llama, Mistral or Qwen "
            "in safetensors, whose tokenizer comes with it.",
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            metavar="RUN",
            help="Distill the head of this LatentLM, with the --data that it learned from, into "
            "one that draws a latent in 1, 2 or 4 evaluations.",
        ),
    ] = None,
    out: options.Out = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Train a LatentLM on images, on speech, or on text and images; or a baseline.

    Running the same command again continues an interrupted run.
    """
    from latentlm_core import workflows

    common: dict[str, Any] = {
        "data": data,
        "recipe": recipe,
        "overrides": overrides or (),
        "out": out,
        "device": device,
        "dry_run": dry_run,
        "progress": listener(),
    }
    if distill is None:
        result = workflows.train_lm(init=init, **common)
    else:
        prompts.refuse({"init": init}, "--distill begins with a LatentLM, so {} cannot.")
        result = workflows.distill(teacher=distill, **common)
    console.show(result, json, dry_run)
