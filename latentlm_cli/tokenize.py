"""latentlm tokenize."""

from typing import Annotated, Literal

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm tokenize --data mnist",
    "latentlm tokenize --data imagenet --vae runs/vae --flip --num-workers 8",
    "latentlm tokenize --data librispeech:PATH --vae hf:microsoft/VibeVoice-1.5B",
    "latentlm tokenize --data stream:hf:ORG/NAME --num-workers 8",
)


def tokenize(
    data: options.Data,
    vae: options.Vae = None,
    split: options.Split = "train",
    flip: Annotated[
        bool, typer.Option("--flip", help="Store each image's mirror image as well.")
    ] = False,
    crops: Annotated[
        int,
        typer.Option("--crops", min=0, metavar="N", help="Store N random crops, not the centre."),
    ] = 0,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option("--dtype", help="Type of the stored latents.")
    ] = "float32",
    num_workers: options.NumWorkers = 0,
    batch_size: options.BatchSize = 64,
    out: options.Out = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Encode a data set once: a latent set that train-lm reads.

    Shards that are there already are kept, so an interrupted run goes on.
    """
    from latentlm_core import workflows

    result = workflows.tokenize(
        data=data,
        vae=vae,
        split=split,
        out=out,
        flip=flip,
        crops=crops,
        batch_size=batch_size,
        dtype=dtype,
        num_workers=num_workers,
        device=device,
        dry_run=dry_run,
        progress=listener(),
    )
    console.show(result, json, dry_run)
