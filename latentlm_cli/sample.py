"""latentlm sample."""

from typing import Any, Literal

import typer

from latentlm_cli import console, options, prompts
from latentlm_cli.progress import listener

EXAMPLES = options.examples(
    "latentlm sample --class 3 -n 20 --seed 3 --out threes",
    "latentlm sample --class dog --class 207 --cfg 1.5 --steps 20 --npz",
    'latentlm sample --text "three one four" --voice prompt.wav --stream',
    "latentlm sample --protocol reference-utterance --data librispeech:PATH --seconds 4:10",
    'latentlm sample --prompt "a red seven on a blue background" -n 16',
    'latentlm sample --ask "which digit?" --image seven.png',
)


def sample(
    classes: prompts.Classes = None,
    texts: prompts.Texts = None,
    prompt: prompts.Prompts = None,
    num_samples: prompts.NumSamples = None,
    model: options.Model = None,
    guidance_scale: prompts.GuidanceScale = None,
    guidance_schedule: prompts.GuidanceSchedule = None,
    guidance_interval: prompts.GuidanceInterval = None,
    num_inference_steps: prompts.Steps = None,
    solver: prompts.Solver = None,
    voice: prompts.Voice = None,
    voice_text: prompts.VoiceText = None,
    stream: prompts.Stream = False,
    protocol: prompts.Protocol = None,
    seconds: prompts.Seconds = None,
    captions_of: prompts.Captions = None,
    question: prompts.Ask = None,
    images: prompts.Images = None,
    text_only: prompts.TextOnly = None,
    interleaved: prompts.Interleaved = None,
    max_tokens: prompts.MaxTokens = None,
    temperature: prompts.Temperature = None,
    top_p: prompts.TopP = None,
    data: prompts.Data = None,
    split: prompts.Split = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    npz: prompts.Npz = False,
    batch_size: options.BatchSize = 64,
    vae: prompts.VaeCopy = None,
    mode: options.Mode = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Draw images, say texts, or go on with text and images.

    Which options apply is up to the model: one of classes, of speech, or of text and images.
    Sample k of a seed is the same alone or in any batch, so asking for more
    only adds files.
    """
    of_latents = {
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "num_inference_steps": num_inference_steps,
        "solver": solver,
    }
    common: dict[str, Any] = {
        **of_latents,
        "model": model,
        "num_samples": num_samples,
        "seed": seed,
        "out": out,
        "batch_size": batch_size,
        "vae": vae,
        "mode": mode,
        "dtype": dtype,
        "device": device,
        "dry_run": dry_run,
        "progress": listener(),
    }
    of_classes = {"classes": classes, "guidance_schedule": guidance_schedule, "npz": npz}
    of_speech = {
        "texts": texts,
        "protocol": protocol,
        "voice": voice,
        "voice_text": voice_text,
        "stream": stream,
        "seconds": prompts.seconds_range(seconds),
    }
    of_words = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    of_multimodal = {
        "prompts": prompt,
        "captions_of": captions_of,
        "question": question,
        "images": images,
        "text_only": text_only,
        "interleaved": interleaved,
        **of_words,
    }
    of_data = {"data": data, "split": split}
    if data is None:
        prompts.refuse({"split": split}, "{} is a part of --data, and none is named.")
    if texts or protocol:
        prompts.refuse(of_classes, "--text and --protocol are for speech; {} is for classes.")
        prompts.refuse(
            of_multimodal, "--text and --protocol are for speech; {} is for other models."
        )
        result = _run("speak", common | of_speech | of_data)
    elif prompts.given(of_multimodal | of_data):
        prompts.refuse(of_speech, "{} is for speech, which needs --text or --protocol.")
        prompts.refuse(of_classes, "{} is for classes, and not for text and images.")
        if prompt or data:
            prompts.refuse(of_words, "{} is of words, and this draws images without any.")
        elif interleaved is None:
            prompts.refuse(of_latents, "{} is of images, and this writes words alone.")
        if not temperature:
            greedy = "{} chooses among words, and without --temperature the likeliest is taken."
            prompts.refuse({"top_p": top_p}, greedy)
        sink = None if json else _show_text
        result = _run("write", common | of_multimodal | of_data | {"sink": sink})
    else:
        prompts.refuse(of_speech, "{} is for speech, which needs --text or --protocol.")
        result = _run("sample", common | of_classes)
    console.show(result, json, dry_run)


def _run(workflow: Literal["sample", "speak", "write"], settings: dict[str, Any]) -> Any:
    """Call it with what the user gave; the rest is its own to decide."""
    from latentlm_core import workflows

    return getattr(workflows, workflow)(**prompts.given(settings))


def _show_text(text: str) -> None:
    """Text on stderr as it is written; the result holds it again."""
    if console.is_main():
        typer.echo(text, nl=False, err=True)
