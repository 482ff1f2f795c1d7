"""latentlm eval ppl | t2i | caption | vqa: models of text and images."""

from typing import Annotated, Literal

import typer

from latentlm_cli import console, options
from latentlm_cli.progress import listener

Text = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="TEXT",
        help="pydoc, a .txt, .md, .jsonl or .csv, a folder of them or of parquet, hf:ORG/NAME.",
    ),
]


def ppl(
    data: Text,
    model: options.Model = None,
    split: Annotated[
        Literal["train", "test", "all"],
        typer.Option("--split", help="Part of the texts to read; all of a set that has no parts."),
    ] = "test",
    num_samples: Annotated[
        int | None,
        typer.Option("-n", "--num-samples", min=1, metavar="N", help="Only the first N documents."),
    ] = None,
    batch_size: options.BatchSize = 16,
    out: options.Report = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Perplexity per token of text, and bits per byte, which compare between tokenizers."""
    from latentlm_core import workflows

    result = workflows.evaluate_perplexity(
        data=data,
        model=model,
        split=split,
        num_samples=num_samples,
        batch_size=batch_size,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


def t2i(
    samples: options.Samples = None,
    reference: options.Reference = None,
    extractor: options.OptionalExtractor = "inception",
    weights: options.Weights = None,
    clip: Annotated[
        str, typer.Option("--clip", help="ORG/NAME or folder of a CLIP, or none for no CLIP score.")
    ] = "openai/clip-vit-base-patch16",
    offline: options.Offline = False,
    batch_size: options.BatchSize = 32,
    out: options.Report = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """How well images fit the prompts that they were drawn of.

    FID to the captioned set, the CLIP score where its weights can be had, and
    for coloured digits the share that a checker reads as the prompt says.
    """
    from latentlm_core import workflows

    result = workflows.evaluate_text_to_image(
        samples=samples,
        reference=reference,
        extractor=extractor,
        weights=weights,
        clip=clip,
        offline=offline,
        batch_size=batch_size,
        out=out,
        device=device,
        progress=listener(),
    )
    console.show(result, json)


def _add_question(
    app: typer.Typer, command: Literal["caption", "vqa"], known: str, purpose: str, example: str
) -> None:
    """A command that asks the model about images of which a data set holds what is ``known``."""
    about = f"A data set with {known}, such as coloured-digits."

    @app.command(command, help=purpose, epilog=options.examples(example))
    def ask(
        data: Annotated[str, typer.Option("--data", metavar="DATA", help=about)],
        model: options.Model = None,
        split: options.Split = "test",
        num_samples: options.NumImages = None,
        batch_size: options.BatchSize = 64,
        seed: options.Seed = 0,
        out: options.Report = None,
        device: options.Device = "auto",
        json: options.Json = False,
    ) -> None:
        from latentlm_core import workflows

        is_caption = command == "caption"
        evaluate = workflows.evaluate_captions if is_caption else workflows.evaluate_vqa
        result = evaluate(
            data=data,
            model=model,
            split=split,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            out=out,
            device=device,
            progress=listener(),
        )
        console.show(result, json)


def add_to(app: typer.Typer) -> None:
    """Make these commands of `latentlm eval`."""
    app.command(epilog=options.examples("latentlm eval ppl --data pydoc"))(ppl)
    app.command(epilog=options.examples("latentlm eval t2i --samples samples/drawn"))(t2i)
    _add_question(
        app,
        "caption",
        "captions",
        "Captions of images beside what people wrote: exact match and CIDEr-D.",
        "latentlm eval caption --data coloured-digits",
    )
    _add_question(
        app,
        "vqa",
        "questions",
        "Answers to questions about images, compared under VQA's rules.",
        "latentlm eval vqa --data coloured-digits -n 200",
    )
