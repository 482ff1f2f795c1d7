"""latentlm sample."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm sample --class 3 -n 20 --seed 3 --out threes",
    "latentlm sample --class dog --class 207 --cfg 1.5 --steps 20 --npz",
    'latentlm sample --text "three one four" --voice prompt.wav --stream',
    "latentlm sample --protocol reference-utterance --data librispeech:PATH --seconds 4:10",
)
IMAGES, SPEECH = "Images", "Speech"


def sample(
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help="Number or name. Repeatable. All classes in turn if none is named.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="TEXT", help="What to say. Repeatable.", rich_help_panel=SPEECH
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--num-samples",
            min=1,
            metavar="N",
            help="Of each class that is named, 16 in all if none is; of each text, 1 if left out; "
            "of the utterances of --data, all if left out.",
        ),
    ] = None,
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
            rich_help_panel=IMAGES,
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
    voice: Annotated[
        Path | None,
        typer.Option(
            "--voice",
            metavar="AUDIO",
            help="A recording of the speaker; whatever voice comes if left out.",
            rich_help_panel=SPEECH,
        ),
    ] = None,
    voice_text: Annotated[
        str | None,
        typer.Option(
            "--voice-text",
            metavar="TEXT",
            help="What that recording says; the .txt beside it, if there is one, if left out.",
            rich_help_panel=SPEECH,
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Write the audio while it is made; tells how soon and how fast.",
            rich_help_panel=SPEECH,
        ),
    ] = False,
    protocol: Annotated[
        Literal["reference-utterance", "3s-prefix"] | None,
        typer.Option(
            "--protocol",
            help="Say what --data says, each with another utterance of its speaker as its voice, "
            "or going on after its own first three seconds.",
            rich_help_panel=SPEECH,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", help="The protocol's data set.", rich_help_panel=SPEECH
        ),
    ] = None,
    split: Annotated[
        Literal["train", "test"] | None,
        typer.Option("--split", help="Part of --data; test if left out.", rich_help_panel=SPEECH),
    ] = None,
    seconds: Annotated[
        str | None,
        typer.Option(
            "--seconds",
            metavar="MIN:MAX",
            help="Take only utterances of --data of such lengths; the paper's are 4:10.",
            rich_help_panel=SPEECH,
        ),
    ] = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    npz: Annotated[
        bool,
        typer.Option(
            "--npz", help="Also write all images as one ADM-style npz.", rich_help_panel=IMAGES
        ),
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
    """Draw images of classes, or say texts.

    Sample k of a seed is the same alone or in any batch, so asking for more
    only adds files.
    """
    common: dict[str, Any] = {
        "model": model,
        "seed": seed,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "solver": solver,
        "out": out,
        "batch_size": batch_size,
        "vae": vae,
        "device": device,
        "dry_run": dry_run,
        "progress": listener(),
    }
    images: dict[str, Any] = {
        "classes": classes,
        "guidance_schedule": guidance_schedule,
        "npz": npz,
    }
    speech = {
        "voice": voice,
        "voice_text": voice_text,
        "stream": stream,
        "data": data,
        "split": split,
        "seconds": _range(seconds),
    }
    if texts or protocol:
        _refuse(images, "--text and --protocol are for speech; {} is for images.")
        words = {"texts": texts or (), "protocol": protocol}
        result = _speak(num_samples=num_samples, **words, **speech, **common)
    else:
        _refuse(speech, "{} is for speech, which needs --text or --protocol.")
        images["classes"] = classes or ()
        result = _draw(num_samples=num_samples or 16, **images, **common)
    console.show(result, json, dry_run)


def _speak(**settings: Any) -> Any:
    from latentlm_core import workflows

    return workflows.speak(**settings)


def _draw(**settings: Any) -> Any:
    from latentlm_core import workflows

    return workflows.sample(**settings)


def _refuse(options_given: dict[str, Any], sentence: str) -> None:
    """Usage that mixes the two kinds of models."""
    names = {"classes": "--class", "guidance_schedule": "--cfg-schedule"}
    for name, value in options_given.items():
        if value:
            option = names.get(name, f"--{name.replace('_', '-')}")
            raise typer.BadParameter(sentence.format(option))


def _range(text: str | None) -> tuple[float, float] | None:
    """``"4:10"`` as two numbers."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
        if not 0 <= low <= high < math.inf:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not MIN:MAX, as in 4:10.", param_hint="--seconds"
        ) from None
    return low, high
