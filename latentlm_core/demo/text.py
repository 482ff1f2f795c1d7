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
from latentlm_core.demo.timer import Timer, result_table
from latentlm_core.figures import captioned_grid
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import Command, Picture, ReportPage, Section, Table, write_report
from latentlm_core.result import Result
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.workflows.workspace import workspace

DATA, TEXT = "coloured-digits", "pydoc"
MIX = "text:{text}=1,{latents}=10,interleaved:{latents}=1"
VAE_STEPS, LM_STEPS = 4500, 2200
"""Fewer than the recipe's: all of it in eight minutes on two cores. More help, the images first."""
NUM_DRAWN = 500
"""Captions of held-out images that are drawn."""
NUM_DESCRIBED = 500
"""Held-out images that are described and asked about."""
NUM_SHOWN = 24


def demo_text(
    *,
    out: Path = Path("demo"),
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Train, tokenize, train, draw, describe, answer and measure.

    Args:
        out: folder of the report; runs, latents and samples go where they always go.
        seed: of everything.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        how often the model is right, the times, and the report.

    Raises:
        MissingExtraError: the digits are not installed.
    """
    home, suffix = workspace(), f"-seed{seed}" if seed else ""
    runs = home / "runs"
    same: dict[str, Any] = {"device": device, "progress": progress}
    seeded = [f"trainer.seed={seed}"]
    timer = Timer(out / "seconds.json")

    vae = timer.run(
        "train the sigma-VAE",
        lambda: workflows.train_vae(
            data=DATA,
            recipe=DATA,
            overrides=[*seeded, f"trainer.total_steps={VAE_STEPS}"],
            out=runs / f"demo-text-vae{suffix}",
            **same,
        ),
    )
    latents = timer.run(
        "tokenize",
        lambda: workflows.tokenize(
            data=DATA,
            vae=str(runs / f"demo-text-vae{suffix}"),
            out=home / "latents" / f"demo-text{suffix}",
            **same,
        ),
    )
    model = timer.run(
        "train the LatentLM",
        lambda: workflows.train_lm(
            data=MIX.format(text=TEXT, latents=latents.files["latents"]),
            recipe=DATA,
            overrides=[*seeded, f"trainer.total_steps={LM_STEPS}"],
            out=runs / f"demo-text-lm{suffix}",
            **same,
        ),
    )
    asked: dict[str, Any] = {"model": str(runs / f"demo-text-lm{suffix}"), "seed": seed, **same}
    samples = timer.run(
        "draw",
        lambda: workflows.write(
            data=DATA,
            num_samples=NUM_DRAWN,
            out=home / "samples" / f"demo-text{suffix}",
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
        "seconds in all": round(sum(timer.seconds.values()), 1),
    }
    grid = out / "drawn.png"
    _draw_prompts(folder, grid)
    measured = {"t2i": checked, "caption": described, "vqa": answered, "ppl": read}
    page = _page(figures, grid, vae, model, measured, timer, device)
    as_html, as_json = write_report(page, out)
    files = {"report": str(as_html), "json": str(as_json), "samples": str(folder)}
    progress.note('Next: latentlm sample --prompt "a red seven on a blue background" -n 16')
    return Result("Demo of text and images", figures, files, dict(page.details))


def _draw_prompts(folder: Path, path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    shown = rows[:NUM_SHOWN]
    images = [read_image(folder / row["file"], row["file"]) for row in shown]
    captioned_grid(images, [row["prompt"] for row in shown], path)


def _page(
    figures: dict[str, Any],
    grid: Path,
    vae: Result,
    model: Result,
    measured: dict[str, Result],
    timer: Timer,
    device: str,
) -> ReportPage:
    where = machine(resolve_device(device))
    return ReportPage(
        title="One model that reads and writes text and images",
        lead=(
            "A sigma-VAE turns each image into four continuous latents. One causal Transformer "
            "with a softmax head and a diffusion head draws images of captions, describes images, "
            f"answers questions about them and writes text. Trained from nothing on {where}."
        ),
        figures=figures,
        sections=[
            Section(
                "Drawn",
                "Captions of held-out images, not selected, and what the model drew of them.",
                [
                    Picture(grid, "Images over their prompts"),
                    result_table(measured["t2i"], "What a checker reads in all images"),
                    Command('latentlm sample --prompt "a red seven on a blue background" -n 16'),
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
                    Table(("stage", "seconds"), list(timer.seconds.items()), "Time"),
                ],
            ),
        ],
        details={
            "machine": where,
            "versions": versions(),
            "seconds": timer.seconds,
            "vae": vae.details,
            "model": model.details,
            **{name: result.details for name, result in measured.items()},
        },
    )


def _table(result: Result, columns: tuple[str, ...], caption: str) -> Table:
    """The first rows of what was said."""
    rows = [json.loads(line) for line in Path(result.files["rows"]).read_text().splitlines()]
    cells = [
        tuple("; ".join(row[c]) if isinstance(row[c], list) else row[c] for c in columns)
        for row in rows[:NUM_SHOWN]
    ]
    return Table(columns, cells, caption)
