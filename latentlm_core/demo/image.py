"""The whole path on real handwriting, as a person would walk it, and a report of what came out.

runs/demo-vae  latents/demo  runs/demo-lm  runs/demo-classifier  samples/demo    and OUT/report
"""

from pathlib import Path

import numpy as np

from latentlm_core import workflows
from latentlm_core.data.sources import open_source
from latentlm_core.demo.stages import Stages, result_table
from latentlm_core.evaluation.classifier import ImageClassifier, class_accuracy, train_classifier
from latentlm_core.evaluation.image_sets import ImageSet, image_folder
from latentlm_core.figures import class_grid
from latentlm_core.progress import Progress
from latentlm_core.report import Command, Picture, ReportPage, Section
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device

DATA = "mnist"
NUM_SAMPLES = 1000
"""Drawn in all, as many of each digit."""
NUM_JUDGED = 200
"""Of these, what the classifier reads for the headline figure."""
IMAGE_SIZE = 32
NEXT = "latentlm sample --class 3 -n 20 --seed 3 --out d3"


def demo_images(*, out: Path, seed: int, device: str, progress: Progress) -> Result:
    """Train, tokenize, train, sample and measure on handwritten digits.

    Arguments as ``demo``.

    Returns:
        accuracy, distances and times, and the report.

    Raises:
        MissingExtraError: the digits are not installed.
    """
    stages = Stages("demo", DATA, out=out, seed=seed, device=device, progress=progress)
    timer, same = stages.timer, stages.same
    vae = stages.train_vae()
    latents = stages.tokenize()
    model = stages.train_lm(latents.files["latents"])
    samples = timer.run(
        "sample",
        lambda: workflows.sample(
            model=str(stages.folder("runs", "-lm")),
            num_samples=NUM_SAMPLES,
            seed=seed,
            out=stages.folder("samples"),
            batch_size=200,
            **same,
        ),
    )
    judge = stages.folder("runs", "-classifier")
    classifier = timer.run(
        "train a classifier to judge", lambda: _classifier(judge, seed, device, progress)
    )
    judged = timer.run(
        "evaluate",
        lambda: workflows.evaluate_samples(
            metrics=("fid", "precision-recall"),
            samples=samples.files["samples"],
            reference=DATA,
            extractor=str(judge),
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
        "seconds in all": timer.total,
    }
    grid = out / "samples.png"
    _draw_classes(drawn, classifier.config.classes, grid)
    page = _page(stages, figures, grid, vae, model, judged)
    return stages.report("Demo", page, samples.files["samples"], NEXT)


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
    stages: Stages,
    figures: dict[str, float | None],
    grid: Path,
    vae: Result,
    model: Result,
    judged: Result,
) -> ReportPage:
    return ReportPage(
        title="LatentLM on handwritten digits",
        lead=(
            "A sigma-VAE turns each digit into 16 continuous latents, a causal Transformer with a "
            "diffusion head learns to write them one after the other, and every image below was "
            f"drawn by it. Trained from nothing on {stages.machine}."
        ),
        figures=figures,
        sections=[
            Section(
                "Samples",
                "Ten of each digit, by class, not selected.",
                [
                    Picture(grid, "Samples, a row for each class", pixelated=True),
                    Command(NEXT),
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
                    stages.timer.table(),
                ],
            ),
        ],
        details=stages.details(vae=vae, model=model, evaluation=judged),
    )
