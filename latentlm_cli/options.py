"""Options that several commands share, each declared once.

Nothing here imports torch: choices are written out, and a test holds them to the core's.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="mnist, cifar10, imagenet, embedded:shapes, a folder of images, or hf:ORG/NAME; of "
        "speech: digit-strings, librispeech, libritts, ljspeech, hibari, a folder, a .csv or "
        ".jsonl. Read while it is used: stream:hf:ORG/NAME, stream:FOLDER, stream:URL.",
    ),
]
Split = Annotated[
    Literal["train", "test"], typer.Option("--split", help="Part of the data set to read.")
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="A named recipe (see --list-recipes), or a .toml or .json file.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, as in --set optimizer.lr=1e-4. Repeatable.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A run, an export or a hub id; the newest of the workspace if left out.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="VAE",
        help="A run, an export or a hub id; the newest of the workspace if left out.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where to write; a name under the workspace if left out."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Decides every draw.")]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", min=1, metavar="N", help="At a time; it changes no more than rounding."
    ),
]
NumWorkers = Annotated[
    int,
    typer.Option(
        "--num-workers",
        min=0,
        metavar="N",
        help="Processes that decode images; 0: threads, as many as are of use.",
    ),
]
Mode = Annotated[
    Literal["auto", "eager", "compile", "graph"],
    typer.Option("--mode", help="How the decode step runs; graph needs CUDA."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(
        "--dtype", help="Of the model's weights; auto is bfloat16 on a GPU and float32 on a CPU."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the configuration and the plan, and do nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

Samples = Annotated[
    str | None,
    typer.Option(
        "--samples",
        metavar="IMAGES",
        help="Images to judge; the newest samples of the workspace if left out.",
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="IMAGES",
        help="What to judge against: a data set, a folder, or statistics made by `eval stats`; "
        "the data that the model was trained on if left out.",
    ),
]
Extractor = Annotated[
    str,
    typer.Option("--extractor", help="inception, or the folder of a classifier, for its features."),
]
OptionalExtractor = Annotated[
    str,
    typer.Option("--extractor", help="inception, the folder of a classifier, or none for no FID."),
]
Report = Annotated[
    Path | None,
    typer.Option("--out", help="File of the report; beside what it measures if left out."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="The extractor's weights, instead of the cache or a package."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never download weights.")]
NumImages = Annotated[
    int | None,
    typer.Option("-n", "--num-samples", min=1, metavar="N", help="Use only N; all if left out."),
]


Recogniser = Annotated[
    str,
    typer.Option(
        "--recogniser",
        help="faster-whisper (tiny.en out of a package, or :PATH), pocketsphinx, hf:ORG/NAME.",
    ),
]
Normaliser = Annotated[
    Literal["basic", "english", "spoken-digits"],
    typer.Option("--normaliser", help="What texts and transcripts go through before comparing."),
]
SpeakerEncoder = Annotated[
    str, typer.Option("--encoder", help="resemblyzer, or hf:ORG/NAME of an x-vector model.")
]
SpokenSamples = Annotated[
    str | None,
    typer.Option(
        "--samples",
        metavar="SPEECH",
        help="A folder that sample made, or a .jsonl with file and text; the newest samples of "
        "the workspace if left out.",
    ),
]
NumSpoken = Annotated[
    int | None,
    typer.Option("-n", "--num-samples", min=1, metavar="N", help="Only the first N."),
]


def examples(*commands: str) -> str:
    """The closing lines of a command's help."""
    heading = "Example" if len(commands) == 1 else "Examples"
    return "\n".join((f"[bold]{heading}[/bold]", *commands))
