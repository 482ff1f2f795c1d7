"""``latentlm eval``: samples or a sigma-VAE => figures with their protocol.

A report is written beside what it measures, as ``evaluation/NAME.json``, with the sha256 of the
weights that were measured. Several processes share the batches; each has all figures then, and the
main one writes the report.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentlm_core.artifacts import load_tokenizer
from latentlm_core.data.sources import Source, open_source, open_with_held_out, spread
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.evaluation.image_sets import image_source, open_images
from latentlm_core.evaluation.images import FEW_IMAGES, ImageReport, Metric, evaluate_images
from latentlm_core.evaluation.reconstruction import evaluate_reconstruction as reconstruct
from latentlm_core.evaluation.statistics import reference_statistics
from latentlm_core.files import read_json, write_json
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.workflows.judges import find_extractor, find_lpips, find_reference, lpips_record
from latentlm_core.workflows.reconstruct_speech import name_of_held_out, reconstruct_speech
from latentlm_core.workflows.reports import EVALUATION, report_folder
from latentlm_core.workflows.workspace import find_export, find_samples


@joined(PATIENCE)
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
    settings = _settings(path)
    ours = open_images(path)
    if num_samples is not None:
        ours = ours.first(num_samples)
    theirs = None
    with current().main_first():
        network = find_extractor(extractor, weights, offline, "is" in metrics, device, progress)
        if set(metrics) != {"is"}:
            theirs = find_reference(reference or _origin(path, settings), ours.image_size, progress)
    report = evaluate_images(
        metrics, ours, theirs, network, batch_size=batch_size, progress=progress
    )
    name = "-".join(metrics)
    where = out or (path if path.is_dir() else path.parent) / EVALUATION / f"{name}.json"
    return _reported(name, report, settings, where)


@joined(PATIENCE)
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
    recogniser: str = "faster-whisper",
    normalise: str = "basic",
    encoder: str = "resemblyzer",
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure a sigma-VAE's reconstructions.

    Of images: rFID, PSNR, SSIM, LPIPS where possible. Of speech: mel distance, WER and SIM beside
    those of the recordings, PESQ and STOI where possible.

    Args:
        data: a data set.
        vae: run, export or hub id; by default the newest.
        split: train or test; where there is no test, what ``train_vae`` holds out of train.
        num_samples: only so many examples, from all over the set.
        extractor: of images: ``inception``, the folder of a classifier, or ``none`` for no rFID.
        weights: file of Inception's weights.
        offline: never download weights.
        batch_size: images at a time.
        recogniser: of speech: as ``load_recogniser`` takes it, or ``none`` for no WER.
        normalise: of its transcripts and the texts.
        encoder: of speech: as ``load_speaker_encoder`` takes it, or ``none`` for no SIM.
        out: file of the report; by default in ``evaluation`` of the run.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    where = resolve_device(device)
    with current().main_first():
        export = find_export(vae, "sigma-vae", progress)
    tokenizer = load_tokenizer(export, where)
    if tokenizer.model.modality == "speech":
        if extractor != "inception" or weights is not None:
            raise ConfigError(
                "--extractor and --weights are for images; this is a tokenizer of speech."
            )
        return reconstruct_speech(
            tokenizer,
            data=data,
            vae=vae,
            split=split,
            num_samples=num_samples,
            recogniser=None if recogniser == "none" else recogniser,
            normalise=normalise,
            encoder=None if encoder == "none" else encoder,
            out=out,
            device=where,
            progress=progress,
        )
    if (recogniser, normalise, encoder) != ("faster-whisper", "basic", "resemblyzer"):
        raise ConfigError(
            "--recogniser, --normaliser and --encoder are for speech; this is a tokenizer of "
            "images."
        )
    with current().main_first():
        source, part = _open_split(data, split)
        network = (
            None
            if extractor == "none"
            else find_extractor(extractor, weights, offline, False, device, progress)
        )
        perceptual = find_lpips(offline, where, progress)
    images = image_source(spread(source, num_samples), tokenizer.model.image_size, progress)
    report = reconstruct(
        tokenizer.model,
        images,
        extractor=network,
        perceptual=perceptual,
        batch_size=batch_size,
        device=where,
        progress=progress,
    )
    warnings = list(report.warnings)
    if part == "train":
        warnings.append("The tokenizer may have been trained on these images: they are of train.")
        progress.warn(warnings[-1])
    details = report.to_dict() | {
        "split": part,
        "lpips": lpips_record(perceptual),
        "vae": str(tokenizer.folder),
        "vae_sha256": tokenizer.sha256,
        "warnings": warnings,
    }
    path = out or report_folder(tokenizer.folder, vae) / "recon.json"
    current().once(lambda: write_json(path, finite(details)))
    figures = dict(report.values) | {"images": report.num_images, "split": part}
    return Result("Reconstruction", figures, {"report": str(path)}, details)


@joined(PATIENCE)
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
    """Write the reference statistics of a data set: ``mu`` and ``sigma`` as in ADM's npz files.

    Args:
        data: a data set.
        image_size: to which ADM's centre crop brings the images.
        out: the npz.
        split: train or test.
        extractor: ``inception``, or the folder of a classifier.
        weights: file of Inception's weights.
        offline: never download them.
        batch_size: images at a time.
        num_samples: only so many, from all over the set.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    with current().main_first():
        network = find_extractor(extractor, weights, offline, False, device, progress)
        source = open_source(data, split)
    images = image_source(spread(source, num_samples), image_size, progress)
    made = reference_statistics(images, network, batch_size=batch_size, progress=progress)
    current().once(lambda: made.save(out))
    if made.num is not None and made.num < FEW_IMAGES:
        progress.warn(
            f"Distances to statistics of {made.num} images, fewer than {FEW_IMAGES}, are biased."
        )
    figures = {"images": made.num, "sha256": made.sha256, "extractor": network.name}
    return Result("Reference statistics", figures, {"statistics": str(out)}, dict(made.protocol))


def _open_split(data: str, split: str) -> tuple[Source, str]:
    """A part of a data set, and what it is called in the report."""
    if split != "test":
        return open_source(data, split), split
    train, held_out = open_with_held_out(data)
    return held_out, name_of_held_out(train, held_out)


def _settings(samples: Path) -> dict[str, Any] | None:
    """What ``latentlm sample`` says of its samples; None of images from elsewhere."""
    folder = samples.parent if samples.name == "samples.npz" else samples
    path = folder / "settings.json"
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} must be a JSON object.")
    return found


def _origin(samples: Path, settings: dict[str, Any] | None) -> str:
    """The data set that the model of these samples was trained on."""
    data = settings and settings.get("data")
    if data:
        return str(data)
    raise ArtifactError(
        f"What data the samples in {samples} should be compared with is not known.",
        hint="Name it with --reference.",
    )


def _reported(
    name: str, report: ImageReport, settings: dict[str, Any] | None, path: Path
) -> Result:
    details = report.to_dict() | {
        "model_sha256": settings and settings.get("model_sha256"),
        "samples_settings": settings,
    }
    current().once(lambda: write_json(path, finite(details)))
    figures = dict(report.values) | {
        "num_samples": report.protocol.num_samples,
        "reference": report.protocol.reference,
        "num_reference": report.protocol.num_reference,
        "extractor": report.protocol.extractor,
    }
    return Result(name, figures, {"report": str(path)}, details)
