"""Options of `latentlm sample`: what is asked of each kind of model."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

IMAGES, SPEECH, MULTIMODAL = "Images of classes", "Speech", "Text and images"

Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="CLASS",
        help="Number or name. Repeatable. All classes in turn if none is named.",
        rich_help_panel=IMAGES,
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--num-samples",
        min=1,
        metavar="N",
        help="Of each class that is named, 16 in all if none is; of each text or prompt, 1 if left "
        "out; of the examples of --data, all if left out.",
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--cfg",
        min=0.0,
        metavar="SCALE",
        help="Guidance scale; 1 is off; the model's if left out.",
    ),
]
GuidanceSchedule = Annotated[
    Literal["constant", "linear"] | None,
    typer.Option(
        "--cfg-schedule",
        help="linear ramps from 1 to --cfg over the positions; the model's if left out.",
        rich_help_panel=IMAGES,
    ),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(
        "--guidance-interval",
        metavar="LOW HIGH",
        help="Guide at timesteps within these shares of the last one, as 0.2 0.8; less work. The "
        "model's if left out.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Solver steps a latent; the model's if left out."
    ),
]
Solver = Annotated[
    Literal["dpmsolver++", "ddpm", "few-step"] | None,
    typer.Option("--solver", help="How noise becomes a latent; the model's if left out."),
]
Npz = Annotated[
    bool,
    typer.Option(
        "--npz", help="Also write all images as one ADM-style npz.", rich_help_panel=IMAGES
    ),
]
VaeCopy = Annotated[
    str | None,
    typer.Option("--vae", metavar="VAE", help="Decode with this copy of the model's own."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="The protocol's data set; of text and images, one whose captions are drawn.",
    ),
]
Split = Annotated[
    Literal["train", "test"] | None,
    typer.Option("--split", help="Part of --data; test if left out."),
]

Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="TEXT", help="What to say. Repeatable.", rich_help_panel=SPEECH),
]
Voice = Annotated[
    Path | None,
    typer.Option(
        "--voice",
        metavar="AUDIO",
        help="A recording of the speaker; whatever voice comes if left out.",
        rich_help_panel=SPEECH,
    ),
]
VoiceText = Annotated[
    str | None,
    typer.Option(
        "--voice-text",
        metavar="TEXT",
        help="What that recording says; the .txt beside it, if there is one, if left out.",
        rich_help_panel=SPEECH,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Write the audio while it is made; tells how soon and how fast.",
        rich_help_panel=SPEECH,
    ),
]
Protocol = Annotated[
    Literal["reference-utterance", "3s-prefix"] | None,
    typer.Option(
        "--protocol",
        help="Say what --data says, each with another utterance of its speaker as its voice, "
        "or going on after its own first three seconds.",
        rich_help_panel=SPEECH,
    ),
]
Seconds = Annotated[
    str | None,
    typer.Option(
        "--seconds",
        metavar="MIN:MAX",
        help="Take only utterances of --data of such lengths; the paper's are 4:10.",
        rich_help_panel=SPEECH,
    ),
]

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="What to draw. Repeatable.", rich_help_panel=MULTIMODAL
    ),
]
Captions = Annotated[
    list[Path] | None,
    typer.Option(
        "--caption",
        metavar="IMAGE",
        help="An image to describe. Repeatable.",
        rich_help_panel=MULTIMODAL,
    ),
]
Ask = Annotated[
    str | None,
    typer.Option(
        "--ask",
        metavar="QUESTION",
        help="A question about each --image.",
        rich_help_panel=MULTIMODAL,
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        metavar="IMAGE",
        help="What the question is about. Repeatable.",
        rich_help_panel=MULTIMODAL,
    ),
]
TextOnly = Annotated[
    list[str] | None,
    typer.Option(
        "--text-only",
        metavar="TEXT",
        help="A text to go on with. Repeatable.",
        rich_help_panel=MULTIMODAL,
    ),
]
Interleaved = Annotated[
    Path | None,
    typer.Option(
        "--interleaved",
        metavar="FILE.json",
        help='Words and images to go on with: ["words", {"image": "a.png"}, ...]; the model says '
        "when it draws.",
        rich_help_panel=MULTIMODAL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        metavar="N",
        help="To write at most; 256 if left out.",
        rich_help_panel=MULTIMODAL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        metavar="T",
        help="Of words; 0, the likeliest, if left out.",
        rich_help_panel=MULTIMODAL,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        metavar="P",
        help="Choose from the likeliest words that make up this share; all if left out.",
        rich_help_panel=MULTIMODAL,
    ),
]

OPTIONS = {
    "classes": "--class",
    "prompts": "--prompt",
    "guidance_schedule": "--cfg-schedule",
    "captions_of": "--caption",
    "question": "--ask",
    "images": "--image",
    "guidance_scale": "--cfg",
    "num_inference_steps": "--steps",
}
"""Options whose settings have other names."""


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user gave."""
    return {
        name: value for name, value in settings.items() if value is not None and value is not False
    }


def refuse(settings: dict[str, Any], sentence: str) -> None:
    """Refuse settings that were given for another kind of model; {} is the option's name."""
    for name in given(settings):
        option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
        raise typer.BadParameter(sentence.format(option))


def seconds_range(text: str | None) -> tuple[float, float] | None:
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
