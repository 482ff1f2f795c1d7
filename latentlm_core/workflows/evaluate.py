"""``latentlm eval``: samples or a sigma-VAE => figures with their protocol.

A report is written beside what it measures, as ``evaluation/NAME.json``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from latentlm_core.artifacts import load_generator, load_tokenizer
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ArtifactError, ConfigError, MissingExtraError
from latentlm_core.evaluation.classifier import ClassifierExtractor, ImageClassifier
from latentlm_core.evaluation.features import FeatureExtractor
from latentlm_core.evaluation.image_sets import ImageSet, image_array, image_source, open_images
from latentlm_core.evaluation.images import ImageReport, Metric, evaluate_images
from latentlm_core.evaluation.inception import load_inception
from latentlm_core.evaluation.npz import npz_keys
from latentlm_core.evaluation.reconstruction import evaluate_reconstruction as reconstruct
from latentlm_core.evaluation.statistics import (
    ReferenceStatistics,
    load_statistics,
    reference_statistics,
)
from latentlm_core.evaluation.sweep import SweepPoint, grid_points
from latentlm_core.evaluation.sweep import sweep as walk
from latentlm_core.figures import sweep_curve
from latentlm_core.files import read_json, write_json
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.sampling import make_engine
from latentlm_core.tokenizers.lpips import LPIPS, load_lpips
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.workspace import find_export, find_samples

EVALUATION = "evaluation"


def evaluate_samples(
    *,
    metrics: Sequence[Metric],
    samples: str | None = None,
    reference: str | None = None,
    extractor: str = "inception",
    weights: Path | None = None,
    offline: bool = False,
    batch_size: int = 32,
    num_samples: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure samples against a reference.

    Args:
        metrics: of fid, is, kid, precision-recall.
        samples: a folder of images or an npz of images; by default the newest samples.
        reference: a data set (its training part), a folder, or an npz of images or statistics;
            by default the data that the samples' model was trained on.
        extractor: ``inception``, or the folder of a classifier.
        weights: file of Inception's weights.
        offline: never download them.
        batch_size: images at a time.
        num_samples: only the first so many.
        out: file of the report; by default beside the samples.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    path = find_samples(samples, progress)
    ours = _first(open_images(path), num_samples)
    network = find_extractor(extractor, weights, offline, "is" in metrics, device, progress)
    theirs = None
    if set(metrics) != {"is"}:
        theirs = find_reference(reference or _origin(path), ours.image_size[0], progress)
    report = evaluate_images(
        metrics, ours, theirs, network, batch_size=batch_size, progress=progress
    )
    name = "-".join(metrics)
    where = out or (path if path.is_dir() else path.parent) / EVALUATION / f"{name}.json"
    return _reported(name, report, where)


def evaluate_reconstruction(
    *,
    data: str,
    vae: str | None = None,
    split: str = "test",
    num_samples: int | None = None,
    extractor: str = "inception",
    weights: Path | None = None,
    offline: bool = False,
    batch_size: int = 32,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure a sigma-VAE's reconstructions: rFID, PSNR, SSIM, LPIPS where possible.

    Args:
        data: a data set.
        vae: run, export or hub id; by default the newest.
        split: train or test.
        num_samples: only the first so many images.
        extractor: ``inception``, the folder of a classifier, or ``none`` for no rFID.
        weights: file of Inception's weights.
        offline: never download weights.
        batch_size: images at a time.
        out: file of the report; by default beside the export.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    where = resolve_device(device)
    tokenizer = load_tokenizer(find_export(vae, "sigma-vae", progress), where)
    source = open_source(data, split)
    network = (
        None
        if extractor == "none"
        else find_extractor(extractor, weights, offline, False, device, progress)
    )
    images = _first(image_source(source, tokenizer.model.image_size, progress), num_samples)
    report = reconstruct(
        tokenizer.model,
        images,
        extractor=network,
        perceptual=_perceptual(offline, where, progress),
        batch_size=batch_size,
        device=where,
        progress=progress,
    )
    path = out or tokenizer.folder.parent / EVALUATION / "recon.json"
    details = report.to_dict() | {"vae": str(tokenizer.folder), "vae_sha256": tokenizer.sha256}
    write_json(path, details)
    return Result("Reconstruction", dict(report.values), {"report": str(path)}, details)


def make_statistics(
    *,
    data: str,
    image_size: int,
    out: Path,
    split: str = "train",
    extractor: str = "inception",
    weights: Path | None = None,
    offline: bool = False,
    batch_size: int = 32,
    num_samples: int | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Write the reference statistics of a data set as an npz that ADM's evaluator reads too.

    Args:
        data: a data set.
        image_size: to which ADM's centre crop brings the images.
        out: the npz.
        split: train or test.
        extractor: ``inception``, or the folder of a classifier.
        weights: file of Inception's weights.
        offline: never download them.
        batch_size: images at a time.
        num_samples: only the first so many.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    network = find_extractor(extractor, weights, offline, False, device, progress)
    images = _first(image_source(open_source(data, split), image_size, progress), num_samples)
    made = reference_statistics(images, network, batch_size=batch_size, progress=progress)
    made.save(out)
    figures = {"images": made.num, "sha256": made.sha256, "extractor": network.name}
    return Result("Reference statistics", figures, {"statistics": str(out)}, dict(made.protocol))


def sweep(
    *,
    scales: Sequence[float],
    model: str | None = None,
    reference: str | None = None,
    steps: Sequence[int] = (20,),
    num_samples: int = 1000,
    seed: int = 0,
    extractor: str = "inception",
    weights: Path | None = None,
    offline: bool = False,
    batch_size: int = 64,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure the FID at each guidance scale and number of solver steps, and draw the curve.

    Args:
        scales: guidance scales; 1 is off.
        model: run, export or hub id of a generator; by default the newest.
        reference: as for ``evaluate_samples``.
        steps: numbers of solver steps.
        num_samples: at each point; the same seeds at all of them.
        seed: of the samples.
        extractor: ``inception``, or the folder of a classifier.
        weights: file of Inception's weights.
        offline: never download them.
        batch_size: images drawn at once.
        out: folder of the report and the curve; by default beside the export.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    where = resolve_device(device)
    loaded = load_generator(find_export(model, "generator", progress), where)
    network = find_extractor(extractor, weights, offline, False, device, progress)
    drawing = Drawing.of(loaded, None, where, progress)
    data = reference or str(loaded.config.provenance.get("data", ""))
    theirs = find_reference(data, drawing.image_size, progress)
    if not isinstance(theirs, ReferenceStatistics):
        theirs = reference_statistics(theirs, network, batch_size=batch_size, progress=progress)

    def draw(point: SweepPoint) -> ImageSet:
        labels = [index % len(loaded.config.classes) for index in range(num_samples)]
        config = loaded.config.sampler.model_copy(update=point.to_dict())
        engine = make_engine(loaded.model, config)
        chunks = [
            drawing.images(engine, labels, range(start, min(start + batch_size, num_samples)), seed)
            for start in range(0, num_samples, batch_size)
        ]
        return image_array(np.concatenate(chunks), str(point), labels)

    points = grid_points(scales, steps)
    found = walk(points, draw, theirs, network, batch_size=batch_size, progress=progress)
    folder = out or loaded.folder.parent / EVALUATION
    write_json(folder / "sweep.json", found.to_dict())
    sweep_curve([row.to_dict() for row in found.rows], folder / "sweep.png", found.metric)
    figures = {
        "best_guidance_scale": found.best.guidance_scale,
        "best_" + found.metric: found.best.fid,
    }
    files = {"report": str(folder / "sweep.json"), "curve": str(folder / "sweep.png")}
    return Result("Sweep", figures, files, found.to_dict())


def find_extractor(
    name: str,
    weights: Path | None,
    offline: bool,
    need_logits: bool,
    device: str,
    progress: Progress,
) -> FeatureExtractor:
    """Inception, or the classifier in a folder.

    Raises:
        ConfigError: the name is neither.
    """
    where = resolve_device(device)
    if name == "inception":
        return load_inception(
            weights, offline=offline, need_logits=need_logits, device=where, progress=progress
        )
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(f"--extractor {name} is neither inception nor a classifier's folder.")
    return ClassifierExtractor(ImageClassifier.load(Path(name)).to(where))


def find_reference(
    spec: str, image_size: int, progress: Progress
) -> ImageSet | ReferenceStatistics:
    """A file or a folder of images, statistics, or the training part of a data set.

    Raises:
        DataError: it is nothing of these.
    """
    path = Path(spec)
    if path.suffix == ".npz" and path.is_file():
        return load_statistics(path) if "mu" in npz_keys(path) else open_images(path)
    if (path / "samples.jsonl").is_file():
        return open_images(path)
    return image_source(open_source(spec, "train"), image_size, progress)


def _perceptual(offline: bool, device: torch.device, progress: Progress) -> LPIPS | None:
    """LPIPS, where its package is installed and its weights can be had."""
    try:
        return load_lpips("alex", offline=offline, progress=progress).to(device)
    except (MissingExtraError, ArtifactError) as error:
        progress.note(f"LPIPS is left out. {error}")
        return None


def _origin(samples: Path) -> str:
    """The data set that the model of these samples was trained on."""
    settings = samples / "settings.json"
    data = read_json(settings).get("data") if settings.is_file() else None
    if data:
        return str(data)
    raise ArtifactError(
        f"What data the samples in {samples} should be compared with is not known.",
        hint="Name it with --reference.",
    )


def _first(images: ImageSet, count: int | None) -> ImageSet:
    return images if count is None else images.first(count)


def _reported(name: str, report: ImageReport, path: Path) -> Result:
    write_json(path, report.to_dict())
    figures = dict(report.values) | {
        "num_samples": report.protocol.num_samples,
        "reference": report.protocol.reference,
        "num_reference": report.protocol.num_reference,
        "extractor": report.protocol.extractor,
    }
    return Result(name, figures, {"report": str(path)}, report.to_dict())
