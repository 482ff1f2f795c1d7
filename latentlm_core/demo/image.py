"""The whole path on real handwriting, as a person would walk it, and a report of what came out.

    runs/demo-vae  latents/demo  runs/demo-lm  runs/demo-classifier  samples/demo    and OUT/report

Every stage is an ordinary workflow, so the demo's results are there for the other commands, and a
second start goes on where the first ended, or only writes the report again.
"""

from pathlib import Path
from typing import Any

import numpy as np

from latentlm_core import workflows
from latentlm_core.data.sources import open_source
from latentlm_core.demo.timer import Timer, result_table
from latentlm_core.evaluation.classifier import ImageClassifier, class_accuracy, train_classifier
from latentlm_core.evaluation.image_sets import ImageSet, image_folder
from latentlm_core.figures import class_grid
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import Command, Picture, ReportPage, Section, Table, write_report
from latentlm_core.result import Result
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.workflows.workspace import workspace

DATA = "mnist"
NUM_SAMPLES = 1000
"""Drawn in all, as many of each digit."""
NUM_JUDGED = 200
"""Of these, what the classifier reads for the headline figure."""
IMAGE_SIZE = 32


def demo_images(
    *,
    out: Path = Path("demo"),
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Train, tokenize, train, sample and measure on handwritten digits.

    Args:
        out: folder of the report; runs, latents and samples go where they always go.
        seed: of everything.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        accuracy, distances and times, and the report.

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
            data=DATA, recipe=DATA, overrides=seeded, out=runs / f"demo-vae{suffix}", **same
        ),
    )
    latents = timer.run(
        "tokenize",
        lambda: workflows.tokenize(
            data=DATA,
            vae=str(runs / f"demo-vae{suffix}"),
            out=home / "latents" / f"demo{suffix}",
            **same,
        ),
    )
    model = timer.run(
        "train the LatentLM",
        lambda: workflows.train_lm(
            data=latents.files["latents"],
            recipe=DATA,
            overrides=seeded,
            out=runs / f"demo-lm{suffix}",
            **same,
        ),
    )
    samples = timer.run(
        "sample",
        lambda: workflows.sample(
            model=str(runs / f"demo-lm{suffix}"),
            num_samples=NUM_SAMPLES,
            seed=seed,
            out=home / "samples" / f"demo{suffix}",
            batch_size=200,
            **same,
        ),
    )
    classifier = timer.run(
        "train a classifier to judge",
        lambda: _classifier(runs / f"demo-classifier{suffix}", seed, device, progress),
    )
    judged = timer.run(
        "evaluate",
        lambda: workflows.evaluate_samples(
            metrics=("fid", "precision-recall"),
            samples=samples.files["samples"],
            reference=DATA,
            extractor=str(runs / f"demo-classifier{suffix}"),
            **same,
        ),
    )
    drawn = image_folder(Path(samples.files["samples"]))
    figures = {
        "samples read as the digit asked for": class_accuracy(classifier, drawn.first(NUM_JUDGED)),
        f"of all {NUM_SAMPLES}": class_accuracy(classifier, drawn),
        "the classifier on real digits": classifier.config.test_accuracy,
        **{name: value for name, value in judged.figures.items() if "[" in name},
        "PSNR of reconstructions, dB": vae.figures["psnr"],
        "seconds in all": round(sum(timer.seconds.values()), 1),
    }
    grid = out / "samples.png"
    _draw_classes(drawn, classifier.config.classes, grid)
    page = _page(figures, grid, vae, model, judged, timer, device)
    as_html, as_json = write_report(page, out)
    files = {"report": str(as_html), "json": str(as_json), "samples": samples.files["samples"]}
    progress.note("Next: latentlm sample --class 3 -n 20 --seed 3 --out d3")
    return Result("Demo", figures, files, dict(page.details))


def _classifier(folder: Path, seed: int, device: str, progress: Progress) -> ImageClassifier:
    """The judge, which saw the training digits only and nothing of the model."""
    if (folder / "config.json").is_file():
        return ImageClassifier.load(folder).to(resolve_device(device))
    classifier = train_classifier(
        open_source(DATA, "train"),
        open_source(DATA, "test"),
        image_size=IMAGE_SIZE,
        seed=seed,
        device=resolve_device(device),
        progress=progress,
    )
    classifier.save(folder)
    return classifier


def _draw_classes(drawn: ImageSet, classes: tuple[str, ...], path: Path) -> None:
    shown = drawn.first(10 * len(classes))
    images = np.concatenate(list(shown.batches(100)))
    class_grid(images, shown.labels or (), classes, path)


def _page(
    figures: dict[str, float | None],
    grid: Path,
    vae: Result,
    model: Result,
    judged: Result,
    timer: Timer,
    device: str,
) -> ReportPage:
    where = machine(resolve_device(device))
    return ReportPage(
        title="LatentLM on handwritten digits",
        lead=(
            "A sigma-VAE turns each digit into 16 continuous latents, a causal Transformer with a "
            "diffusion head learns to write them one after the other, and every image below was "
            f"drawn by it. Trained from nothing on {where}."
        ),
        figures=figures,
        sections=[
            Section(
                "Samples",
                "Ten of each digit, by class, not selected.",
                [
                    Picture(grid, "Samples, a row for each class", pixelated=True),
                    Command("latentlm sample --class 3 -n 20 --seed 3 --out d3"),
                ],
            ),
            Section(
                "What the sigma-VAE keeps",
                "Held-out digits above, their reconstructions from the posterior's mean below.",
                [
                    Picture(
                        Path(vae.files["reconstructions"]), "Originals and reconstructions", True
                    ),
                    Picture(Path(vae.files["curves"]), "Training of the sigma-VAE"),
                    result_table(vae, "The sigma-VAE on held-out images"),
                ],
            ),
            Section(
                "How the LatentLM learned",
                "Validation loss is split by band of timesteps; t = 0 is almost clean.",
                [
                    Picture(Path(model.files["curves"]), "Training of the LatentLM"),
                    result_table(model, "The LatentLM on held-out latents"),
                ],
            ),
            Section(
                "How it was measured",
                "The judge is a small classifier trained apart, on the real training digits. "
                "Distances are taken on its features and carry its name: no published number "
                "is comparable with them.",
                [
                    result_table(judged, "Distances between samples and training digits"),
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
            "evaluation": judged.details,
        },
    )
