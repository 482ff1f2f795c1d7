"""latentlm demo."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm demo",
    "latentlm demo --modality speech --out speech-demo",
    "latentlm demo --modality text --out text-demo",
)


def demo(
    modality: Annotated[
        Literal["image", "speech", "text"],
        typer.Option("--modality", help="What the model learns to make."),
    ] = "image",
    out: Annotated[
        Path, typer.Option("--out", help="Where the report and the pictures go.")
    ] = Path("demo"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """The whole path on handwriting, on speech, or on text with images, in minutes on two cores.

    Trains a sigma-VAE, tokenizes, trains a LatentLM, samples, measures, and
    writes a report. A second start reuses what is done.
    """
    from latentlm_core.demo import demo as run

    result = run(out=out, modality=modality, seed=seed, device=device, progress=listener())
    console.show(result, json)
