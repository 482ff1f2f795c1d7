"""latentlm eval: one command a metric, and what they need."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from latentlm_cli import console, evaluate_multimodal, options
from latentlm_cli.progress import listener

Metric = Literal["fid", "is", "kid", "precision-recall"]
METRICS: dict[Metric, str] = {
    "fid": "Fréchet Inception distance of samples to a reference (lower is better).",
    "is": "Inception Score of samples (higher is better; needs no reference).",
    "kid": "Kernel Inception distance of samples to a reference (lower is better).",
    "precision-recall": "Share of samples among the real images, and the reverse.",
}

app = typer.Typer(
    help="Measure samples, tokenizers and settings.",
    no_args_is_help=True,
    epilog=options.examples(
        "latentlm eval fid --samples samples/digits --reference mnist",
        "latentlm eval recon --data mnist --vae runs/digits-vae",
        "latentlm eval wer --samples samples/speech",
        "latentlm eval caption --data coloured-digits",
    ),
)


def _add_metric(metric: Metric, purpose: str) -> None:
    example = options.examples(f"latentlm eval {metric} --samples samples/digits --json")

    @app.command(metric, help=purpose, epilog=example)
    def measure(
        samples: options.Samples = None,
        reference: options.Reference = None,
        extractor: options.Extractor = "inception",
        weights: options.Weights = None,
        offline: options.Offline = False,
        num_samples: options.NumImages = None,
        batch_size: options.BatchSize = 32,
        out: options.Report = None,
        device: options.Device = "auto",
        json: options.Json = False,
    ) -> None:
        from latentlm_core import workflows

        result = workflows.evaluate_samples(
            metrics=(metric,),
            samples=samples,
            reference=reference,
            extractor=extractor,
            weights=weights,
            offline=offline,
            batch_size=batch_size,
            num_samples=num_samples,
            out=out,
            device=device,
            progress=listener(),
        )
        console.show(result, json)


for _metric, _purpose in METRICS.items():
    _add_metric(_metric, _purpose)


@app.command(epilog=options.examples("latentlm eval recon --data mnist --vae runs/digits-vae"))
def recon(
    data: options.Data,
    vae: options.Vae = None,
    split: options.Split = "test",
    extractor: options.OptionalExtractor = "inception",
    weights: options.Weights = None,
    offline: options.Offline = False,
    num_samples: options.NumImages = None,
    batch_size: options.BatchSize = 32,
    recogniser: options.Recogniser = "faster-whisper",
    normalise: options.Normaliser = "basic",
    encoder: options.SpeakerEncoder = "resemblyzer",
    out: options.Report = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """How well a tokenizer gives its data back.

    Images: rFID, PSNR, SSIM, and LPIPS where it can. Speech: mel distance,
    WER and speaker similarity beside the recordings', PESQ and STOI where it
    can; "none" leaves out what a recogniser or encoder would measure.
    """
    from latentlm_core import workflows

    result = workflows.evaluate_reconstruction(
        vae=vae,
        data=data,
        split=split,
        num_samples=num_samples,
        extractor=extractor,
        weights=weights,
        offline=offline,
        batch_size=batch_size,
        recogniser=recogniser,
        normalise=normalise,
        encoder=encoder,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm eval wer --samples samples/speech --of originals"))
def wer(
    samples: options.SpokenSamples = None,
    side: Annotated[
        Literal["samples", "originals", "voices"],
        typer.Option("--of", help="The samples, or the recordings that lie beside them."),
    ] = "samples",
    recogniser: options.Recogniser = "faster-whisper",
    normalise: options.Normaliser = "basic",
    num_samples: options.NumSpoken = None,
    out: options.Report = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Word error rate of samples of speech, of all words and a mean over samples."""
    from latentlm_core import workflows

    result = workflows.evaluate_wer(
        samples=samples,
        side=side,
        recogniser=recogniser,
        normalise=normalise,
        num_samples=num_samples,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm eval sim --samples samples/speech"))
def sim(
    samples: options.SpokenSamples = None,
    encoder: options.SpeakerEncoder = "resemblyzer",
    num_samples: options.NumSpoken = None,
    out: options.Report = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Speaker similarity of samples to their prompts and to recordings of the same text."""
    from latentlm_core import workflows

    result = workflows.evaluate_sim(
        samples=samples,
        encoder=encoder,
        num_samples=num_samples,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm eval drift --samples samples/speech --window 5"))
def drift(
    samples: options.SpokenSamples = None,
    window_seconds: Annotated[
        float, typer.Option("--window", min=0.5, metavar="S", help="Seconds of voice at a time.")
    ] = 10.0,
    recogniser: options.Recogniser = "faster-whisper",
    normalise: options.Normaliser = "basic",
    encoder: options.SpeakerEncoder = "resemblyzer",
    num_samples: options.NumSpoken = None,
    out: options.Report = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """How word errors and the voice change from the beginning of samples to their end."""
    from latentlm_core import workflows

    result = workflows.evaluate_drift(
        samples=samples,
        window_seconds=window_seconds,
        recogniser=recogniser,
        normalise=normalise,
        encoder=encoder,
        num_samples=num_samples,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(epilog=options.examples("latentlm eval sweep --cfg 1,1.5,2,3 --steps 10,20 -n 1000"))
def sweep(
    scales: Annotated[
        str, typer.Option("--cfg", metavar="S,S,...", help="Guidance scales to try.")
    ] = "1,1.5,2,3,4",
    steps: Annotated[
        str, typer.Option("--steps", metavar="K,K,...", help="Numbers of solver steps to try.")
    ] = "20",
    num_samples: Annotated[
        int, typer.Option("-n", "--num-samples", min=2, metavar="N", help="Images a setting.")
    ] = 1000,
    model: options.Model = None,
    reference: options.Reference = None,
    seed: options.Seed = 0,
    extractor: options.Extractor = "inception",
    weights: options.Weights = None,
    offline: options.Offline = False,
    batch_size: options.BatchSize = 64,
    mode: options.Mode = "auto",
    dtype: options.Dtype = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of report and curve; beside the run if left out."),
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Walk guidance scales and solver steps at a cheap N, and draw the curve."""
    from latentlm_core import workflows

    result = workflows.sweep(
        model=model,
        reference=reference,
        scales=_numbers(scales, float, "--cfg"),
        steps=_numbers(steps, int, "--steps"),
        num_samples=num_samples,
        seed=seed,
        extractor=extractor,
        weights=weights,
        offline=offline,
        mode=mode,
        dtype=dtype,
        batch_size=batch_size,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


@app.command(
    epilog=options.examples("latentlm eval stats --data cifar10 --image-size 32 --out cifar10.npz")
)
def stats(
    data: options.Data,
    image_size: Annotated[
        int,
        typer.Option(
            "--image-size", min=1, metavar="PIXELS", help="Side that images are cropped to."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The .npz to write: mu and sigma, as in ADM's files.")
    ],
    split: options.Split = "train",
    extractor: options.Extractor = "inception",
    weights: options.Weights = None,
    offline: options.Offline = False,
    num_samples: options.NumImages = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Reference statistics of a data set, to be used as --reference."""
    from latentlm_core import workflows

    result = workflows.make_statistics(
        data=data,
        split=split,
        image_size=image_size,
        extractor=extractor,
        weights=weights,
        offline=offline,
        batch_size=batch_size,
        num_samples=num_samples,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


Number = TypeVar("Number", int, float)


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    """``"1,1.5"`` as numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list like 1,2,3.", param_hint=option) from None


evaluate_multimodal.add_to(app)
