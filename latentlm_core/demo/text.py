"""The whole path on text and images: one model writes, draws, describes and answers.

    runs/demo-text-vae  latents/demo-text  runs/demo-text-lm  samples/demo-text   and OUT/

The images are real handwriting, coloured and placed by a seeded recipe, with captions, questions
and answers; the plain text is Python's own documentation. What is asked of the model is about
handwriting that nothing has been trained on, and a checker that is trained apart judges its images.
"""

import json
from pathlib import Path
from typing import Any

from latentlm_core import workflows
from latentlm_core.data.media import read_image
from latentlm_core.demo.stages import Stages, result_table
from latentlm_core.figures import captioned_grid
from latentlm_core.progress import Progress
from latentlm_core.report import Command, Picture, ReportPage, Section, Table
from latentlm_core.result import Result

DATA, TEXT = "coloured-digits", "pydoc"
MIX = "text:{text}=1,{latents}=10,interleaved:{latents}=1"
VAE_STEPS, LM_STEPS = 4500, 2000
"""Fewer than the recipe's: all of it in eight minutes on two cores. More help, the images first."""
NUM_DRAWN = 500
"""Captions of held-out images that are drawn."""
NUM_DESCRIBED = 500
"""Held-out images that are described and asked about."""
NUM_SHOWN = 24
NEXT = 'latentlm sample --prompt "a red seven on a blue background" -n 16'


def demo_text(*, out: Path, seed: int, device: str, progress: Progress) -> Result:
    """Train, tokenize, train, draw, describe, answer and measure.

    Arguments as ``demo``.

    Returns:
        how often the model is right, the times, and the report.

    Raises:
        MissingExtraError: the digits are not installed.
    """
    stages = Stages("demo-text", DATA, out=out, seed=seed, device=device, progress=progress)
    timer, same = stages.timer, stages.same
    vae = stages.train_vae(f"trainer.total_steps={VAE_STEPS}")
    latents = stages.tokenize()
    mix = MIX.format(text=TEXT, latents=latents.files["latents"])
    model = stages.train_lm(mix, f"trainer.total_steps={LM_STEPS}")
    asked: dict[str, Any] = {"model": str(stages.folder("runs", "-lm")), "seed": seed, **same}
    samples = timer.run(
        "draw",
        lambda: workflows.write(
            data=DATA,
            num_samples=NUM_DRAWN,
            out=stages.folder("samples"),
            batch_size=100,
            **asked,
        ),
    )
    folder = Path(samples.files["samples"])
    checked = timer.run(
        "check the images",
        lambda: workflows.evaluate_text_to_image(
            samples=str(folder), extractor="none", clip="none", **same
        ),
    )
    about = {"data": DATA, "num_samples": NUM_DESCRIBED, "batch_size": 100, **asked}
    described = timer.run("describe", lambda: workflows.evaluate_captions(**about))
    answered = timer.run("answer", lambda: workflows.evaluate_vqa(**about))
    read = timer.run(
        "read text", lambda: workflows.evaluate_perplexity(data=TEXT, model=asked["model"], **same)
    )
    figures = {
        "images with all that their captions say": checked.figures["agreement"],
        "captions that are exactly right": described.figures["exact_match"],
        "answers that are right": answered.figures["match_accuracy"],
        "bits a byte of text": read.figures["bits_per_byte"],
        "PSNR of reconstructions, dB": vae.figures["psnr"],
        "seconds in all": timer.total,
    }
    grid = out / "drawn.png"
    _draw_prompts(folder, grid)
    measured = {"t2i": checked, "caption": described, "vqa": answered, "ppl": read}
    page = _page(stages, figures, grid, vae, model, measured)
    return stages.report("Demo of text and images", page, str(folder), NEXT)


def _draw_prompts(folder: Path, path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    shown = rows[:NUM_SHOWN]
    images = [read_image(folder / row["file"], row["file"]) for row in shown]
    captioned_grid(images, [row["prompt"] for row in shown], path)


def _page(
    stages: Stages,
    figures: dict[str, Any],
    grid: Path,
    vae: Result,
    model: Result,
    measured: dict[str, Result],
) -> ReportPage:
    return ReportPage(
        title="One model that reads and writes text and images",
        lead=(
            "A sigma-VAE turns each image into four continuous latents. One causal Transformer "
            "with a softmax head and a diffusion head draws images of captions, describes images, "
            "answers questions about them and writes text. Trained from nothing on "
            f"{stages.machine}."
        ),
        figures=figures,
        sections=[
            Section(
                "Drawn",
                "Captions of held-out images, not selected, and what the model drew of them.",
                [
                    Picture(grid, "Images over their prompts"),
                    result_table(measured["t2i"], "What a checker reads in all images"),
                    Command(NEXT),
                ],
            ),
            Section(
                "Described and answered",
                "Held-out images; the model saw no stroke of them.",
                [
                    _table(measured["caption"], ("said", "references"), "Captions"),
                    result_table(measured["caption"], "All captions"),
                    _table(measured["vqa"], ("question", "said", "references"), "Answers"),
                    result_table(measured["vqa"], "All answers"),
                    Command('latentlm sample --ask "which digit?" --image FILE.png'),
                ],
            ),
            Section(
                "Text",
                "Held-out topics of Python's documentation.",
                [result_table(measured["ppl"], "How well it predicts text")],
            ),
            Section(
                "How it learned",
                "Validation loss is split by band of timesteps; t = 0 is almost clean.",
                [
                    Picture(
                        Path(vae.files["reconstructions"]), "Originals and reconstructions", True
                    ),
                    Picture(Path(model.files["curves"]), "Training of the LatentLM"),
                    result_table(model, "The LatentLM on what is held out"),
                    stages.timer.table(),
                ],
            ),
        ],
        details=stages.details(vae=vae, model=model, **measured),
    )


def _table(result: Result, columns: tuple[str, ...], caption: str) -> Table:
    """The first rows of what was said."""
    rows = [json.loads(line) for line in Path(result.files["rows"]).read_text().splitlines()]
    cells = [
        tuple("; ".join(row[c]) if isinstance(row[c], list) else row[c] for c in columns)
        for row in rows[:NUM_SHOWN]
    ]
    return Table(columns, cells, caption)
