"""latentlm sample."""

from typing import Annotated, Literal

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm sample --class 3 -n 20 --seed 3 --out threes",
    "latentlm sample --class dog --class 207 --cfg 1.5 --steps 20 --npz",
)


def sample(
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help="Number or name. Repeatable. All classes in turn if none is named.",
        ),
    ] = None,
    num_samples: Annotated[
        int,
        typer.Option(
            "-n",
            "--num-samples",
            min=1,
            metavar="N",
            help="Of each class that is named; in all if none is.",
        ),
    ] = 16,
    model: options.Model = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--cfg",
            min=0.0,
            metavar="SCALE",
            help="Guidance scale; 1 is off; the model's if left out.",
        ),
    ] = None,
    guidance_schedule: Annotated[
        Literal["constant", "linear"] | None,
        typer.Option(
            "--cfg-schedule",
            help="linear ramps from 1 to --cfg over the positions; the model's if left out.",
        ),
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, metavar="N", help="Solver steps a latent; the model's if left out."
        ),
    ] = None,
    solver: Annotated[
        Literal["dpmsolver++", "ddpm"] | None,
        typer.Option("--solver", help="How noise becomes a latent; the model's if left out."),
    ] = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    npz: Annotated[
        bool, typer.Option("--npz", help="Also write all images as one ADM-style npz.")
    ] = False,
    batch_size: options.BatchSize = 64,
    vae: Annotated[
        str | None,
        typer.Option("--vae", metavar="VAE", help="Decode with this copy of the model's own."),
    ] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Draw images, of the classes that are named or of all.

    Sample k of a seed is the same alone or in any batch, so asking for more
    only adds files.
    """
    from latentlm_core import workflows

    result = workflows.sample(
        model=model,
        classes=classes or (),
        num_samples=num_samples,
        seed=seed,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        num_inference_steps=num_inference_steps,
        solver=solver,
        out=out,
        npz=npz,
        batch_size=batch_size,
        vae=vae,
        device=device,
        dry_run=dry_run,
        progress=listener(),
    )
    console.show(result, json, dry_run)
