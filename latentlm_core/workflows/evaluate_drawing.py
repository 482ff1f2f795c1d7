"""``latentlm eval t2i``: how well images fit the prompts that they were drawn of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentlm_core.data.coloured_digits import ColouredDigitSource, parse_caption
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError, MissingExtraError
from latentlm_core.evaluation.clip_score import DEFAULT_CLIP, clip_score, load_clip
from latentlm_core.evaluation.digit_checker import DigitChecker
from latentlm_core.evaluation.image_sets import ImageSet, image_folder
from latentlm_core.evaluation.images import evaluate_images
from latentlm_core.files import read_json, write_json, write_text
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.workflows.judges import find_extractor, find_reference
from latentlm_core.workflows.reports import EVALUATION
from latentlm_core.workflows.workspace import find_samples, workspace


@joined(PATIENCE)
def evaluate_text_to_image(
    *,
    samples: str | None = None,
    reference: str | None = None,
    extractor: str = "inception",
    weights: Path | None = None,
    clip: str = DEFAULT_CLIP,
    offline: bool = False,
    batch_size: int = 32,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure images that were drawn of prompts: FID, CLIP score, agreement with the prompts.

    The CLIP score is left out, with a note, where its weights cannot be had; the checker is there
    for prompts of coloured digits.

    Args:
        samples: a folder that ``sample --prompt`` or ``sample --data`` made; by default the newest.
        reference: a data set (its training part), a folder, or an npz of images or statistics; by
            default the data that the model was trained on.
        extractor: ``inception``, the folder of a classifier, or ``none`` for no FID.
        weights: file of Inception's weights.
        clip: ORG/NAME or folder of a CLIP, or ``none``.
        offline: never download weights.
        batch_size: images at a time.
        out: file of the report; by default beside the samples.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    folder = find_samples(samples, progress)
    settings = read_json(folder / "settings.json")
    if not isinstance(settings, dict):
        raise CorruptFileError(f"{folder / 'settings.json'} is not an object.")
    images, prompts = image_folder(folder), _prompts(folder)
    if len(images) != len(prompts):
        raise DataError(
            f"{folder} has {len(images)} images of {len(prompts)} prompts, not one each."
        )
    values: dict[str, Any] = {"images": len(images)}
    details: dict[str, Any] = {"metric": "text-to-image", "samples_settings": settings}
    if extractor != "none":
        known = reference or settings.get("data")
        with current().main_first():
            network = find_extractor(extractor, weights, offline, False, device, progress)
            theirs = find_reference(str(known), images.image_size, progress)
        distances = evaluate_images(
            ("fid",), images, theirs, network, batch_size=batch_size, progress=progress
        )
        values |= dict(distances.values)
        details["fid"] = distances.to_dict()
    if clip != "none":
        values["clip_score"] = _clip(images, prompts, clip, offline, device, details, progress)
    if all(parse_caption(prompt) for prompt in prompts):
        values |= _check(images, prompts, folder, device, details, progress)
    details |= {
        "model_sha256": settings.get("model_sha256"),
        "machine": machine(resolve_device(device)),
        "versions": versions(),
        "values": values,
    }
    path = out or folder / EVALUATION / "t2i.json"
    current().once(lambda: write_json(path, finite(details)))
    return Result("Text to image", values, {"report": str(path)}, details)


def _prompts(folder: Path) -> list[str]:
    """The prompt of each image of a folder.

    Raises:
        CorruptFileError: its rows name no prompts.
    """
    try:
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
        prompts = [row["prompt"] for row in rows if row["file"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        prompts = []
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise CorruptFileError(
            f"{folder / 'samples.jsonl'} names no prompts, so its images were drawn of none.",
            hint="Draw some with: latentlm sample --prompt or --data",
        )
    return prompts


def _clip(
    images: ImageSet,
    prompts: Sequence[str],
    name: str,
    offline: bool,
    device: str,
    details: dict[str, Any],
    progress: Progress,
) -> float | None:
    try:
        with current().main_first():
            encoder = load_clip(name, offline=offline, device=resolve_device(device))
    except (MissingExtraError, ArtifactError) as error:
        progress.note(f"The CLIP score is left out. {error}")
        return None
    found = clip_score(encoder, images, prompts, progress)
    details["clip"] = {"encoder": found.encoder, "each": found.each}
    return found.mean


def _check(
    images: ImageSet,
    prompts: Sequence[str],
    folder: Path,
    device: str,
    details: dict[str, Any],
    progress: Progress,
) -> dict[str, float]:
    """Agreement of coloured digits with their prompts, by the checker of the workspace."""
    with current().main_first():
        checker = digit_checker(device, progress)
    scenes = [scene for prompt in prompts if (scene := parse_caption(prompt)) is not None]
    batches = images.batches(len(images))
    readings = checker.read(next(batches), scenes)
    right = {
        "agreement": [one.is_right for one in readings],
        "digits_right": [one.digits for one in readings],
        "colours_right": [one.colours for one in readings],
        "positions_right": [one.positions for one in readings],
    }
    rows = [
        {"prompt": prompt} | {name: each[place] for name, each in right.items()}
        for place, prompt in enumerate(prompts)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    current().once(lambda: write_text(folder / EVALUATION / "t2i-checked.jsonl", text))
    details["checker"] = {
        "name": ColouredDigitSource.name,
        "digit_accuracy": checker.classifier.config.test_accuracy,
    }
    return {name: sum(each) / len(each) for name, each in right.items()}


def digit_checker(device: str, progress: Progress) -> DigitChecker:
    """The checker of the workspace, trained when it is first asked for."""
    folder = workspace() / "runs" / "digit-checker"
    where = resolve_device(device)
    if (folder / "config.json").is_file():
        return DigitChecker.load(folder, where)
    checker = DigitChecker.train(device=where, progress=progress)
    checker.save(folder)
    return checker
