"""latentlm bench: how fast sampling, training, tokenizing and reading are on this machine."""

from typing import Annotated, Literal

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

app = typer.Typer(
    help="Measure speed on this machine, against a plain loop in the same run.",
    no_args_is_help=True,
    epilog=options.examples(
        "latentlm bench sample --size mnist",
        "latentlm bench sample --size latentlm-l --batch 1,64,256 --dtype bfloat16 --json",
        "latentlm bench sample --size latentlm-l --against dit-medium --batch 128,256",
        "latentlm bench train --recipe latentlm-l --batch 64",
    ),
)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter("numbers with commas between, as in 1,64.") from None


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A run, an export or a hub id; without --size, the newest if left out.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="RECIPE",
        help="Instead of a model: the sizes of a recipe, with fresh weights, as latentlm-l.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="RECIPE",
        help="Instead of the plain loop: the network of another recipe, as dit-medium.",
    ),
]
Batches = Annotated[
    str, typer.Option("--batch", metavar="N,N", help="How many at once; each is measured.")
]
RecipeBatches = Annotated[
    str | None,
    typer.Option(
        "--batch", metavar="N,N", help="Sequences a step, each measured; else the recipe's."
    ),
]
Latents = Annotated[
    int | None,
    typer.Option(
        "--latents",
        min=1,
        metavar="N",
        help="Latents of an image; 256 of published sizes and 16 of others if left out.",
    ),
]
SolverSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        metavar="S",
        help="Solver steps per latent; 20, or the most of a distilled head, if left out.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Training steps a repeat.")]
Scale = Annotated[
    float | None,
    typer.Option(
        "--cfg",
        min=0,
        metavar="SCALE",
        help="Guidance scale; 1 is off. 2, or that of a distilled head, if left out.",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option("--dtype", help="Of the weights, ours and the reference's."),
]
BatchSteps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Batches a repeat.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Rounds that count.")]
WarmUp = Annotated[
    int, typer.Option("--warm-up", min=0, metavar="N", help="Rounds before those that count.")
]
Recipe = Annotated[
    str, typer.Option("--recipe", metavar="RECIPE", help="What is trained: a name or a file.")
]
VaeRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Instead of --vae: the networks of a recipe, with fresh weights.",
    ),
]
LatentData = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="LATENTS", help="A latent set; latents are drawn once if left out."
    ),
]
StoredData = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="LATENTS", help="A latent set; the newest of the workspace if left out."
    ),
]
Encode = Annotated[
    bool,
    typer.Option("--encode", help="Also train with images of --data encoded at every step."),
]


@app.command(epilog=options.examples("latentlm bench sample --size mnist --batch 1,64 --json"))
def sample(
    model: Model = None,
    size: Size = None,
    against: Against = None,
    batch: Batches = "1,64",
    num_latents: Latents = None,
    num_inference_steps: SolverSteps = None,
    guidance_scale: Scale = None,
    mode: options.Mode = "auto",
    dtype: Dtype = "float32",
    repeats: Repeats = 5,
    warm_up: WarmUp = 1,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Images a second, ours and a plain eager loop's, in turns.

    Both draw the same latents. On a GPU also the share of its speed that is
    reached: the time that arithmetic or weight traffic must take, whichever is
    more, in what was taken. With --against, another network instead of the loop.
    """
    from latentlm_core import workflows

    result = workflows.bench_sample(
        model=model,
        size=size,
        against=against,
        batches=_numbers(batch),
        num_latents=num_latents,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        mode=mode,
        dtype=dtype,
        repeats=repeats,
        warm_up=warm_up,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm bench train --recipe mnist --data latents/mnist"))
def train(
    recipe: Recipe = "mnist",
    overrides: options.Overrides = None,
    data: LatentData = None,
    batch: RecipeBatches = None,
    num_latents: Latents = None,
    encode: Encode = False,
    steps: Steps = 10,
    repeats: Repeats = 5,
    warm_up: WarmUp = 1,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Training steps and tokens a second, and the share of what a product reaches.

    Also the share of the time that steps wait for data, and with --encode
    what it is worth to read latents that were encoded before.
    """
    from latentlm_core import workflows

    result = workflows.bench_train(
        recipe=recipe,
        overrides=overrides or (),
        data=data,
        batches=() if batch is None else _numbers(batch),
        num_latents=num_latents,
        encode=encode,
        steps=steps,
        repeats=repeats,
        warm_up=warm_up,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm bench tokenize --data mnist --recipe mnist"))
def tokenize(
    data: options.Data = "embedded:shapes",
    split: options.Split = "train",
    vae: options.Vae = None,
    recipe: VaeRecipe = None,
    batch_size: options.BatchSize = 64,
    steps: BatchSteps = 8,
    num_workers: options.NumWorkers = 0,
    repeats: Repeats = 5,
    warm_up: WarmUp = 1,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Images a second from a data set to shards, and by a plain loop, in turns.

    Also those of each stage alone, read, encode and write, and the share of the
    slowest one's that the whole reaches; and what the encoder waits for.
    """
    from latentlm_core import workflows

    result = workflows.bench_tokenize(
        data=data,
        split=split,
        vae=vae,
        recipe=recipe,
        batch_size=batch_size,
        steps=steps,
        num_workers=num_workers,
        repeats=repeats,
        warm_up=warm_up,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm bench load --data latents/mnist"))
def load(
    data: StoredData = None,
    recipe: Recipe = "mnist",
    batch_size: options.BatchSize = 64,
    steps: Steps = 10,
    repeats: Repeats = 5,
    warm_up: WarmUp = 1,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Latents a second out of shards, and the share of a training step that waits."""
    from latentlm_core import workflows

    result = workflows.bench_load(
        data=data,
        recipe=recipe,
        batch_size=batch_size,
        steps=steps,
        repeats=repeats,
        warm_up=warm_up,
        device=device,
        progress=listener(),
    )
    console.show(result, json)
