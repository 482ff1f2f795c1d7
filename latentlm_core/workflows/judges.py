"""What a measurement needs: a network that sees, and a reference to compare with."""

from pathlib import Path

import torch

from latentlm_core.data.sources import open_source
from latentlm_core.errors import ArtifactError, ConfigError, DataError, MissingExtraError
from latentlm_core.evaluation.classifier import ClassifierExtractor, ImageClassifier
from latentlm_core.evaluation.features import FeatureExtractor
from latentlm_core.evaluation.image_sets import ImageSet, image_source, open_images
from latentlm_core.evaluation.inception import load_inception
from latentlm_core.evaluation.npz import npz_keys
from latentlm_core.evaluation.statistics import ReferenceStatistics, load_statistics
from latentlm_core.files import sha256_file
from latentlm_core.progress import Progress
from latentlm_core.runtime import resolve_device
from latentlm_core.tokenizers.lpips import LPIPS, load_lpips


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
    spec: str, image_size: tuple[int, int], progress: Progress
) -> ImageSet | ReferenceStatistics:
    """A file or a folder of images, statistics, or the training part of a data set.

    Args:
        spec: how the user named it.
        image_size: (H, W) of the samples, to which a data set is cropped.
        progress: listener.

    Raises:
        DataError: it is nothing of these, or cannot be cropped to that size.
    """
    path = Path(spec)
    if path.suffix == ".npz" and path.is_file():
        return load_statistics(path) if "mu" in npz_keys(path) else open_images(path)
    if (path / "samples.jsonl").is_file():
        return open_images(path)
    height, width = image_size
    if height != width:
        raise DataError(
            f"The samples are {width}x{height}, but a data set such as {spec} is cropped to "
            "squares only.",
            hint="Name an npz of images or of statistics with --reference.",
        )
    return image_source(open_source(spec, "train"), height, progress)


def find_lpips(offline: bool, device: torch.device, progress: Progress) -> LPIPS | None:
    """LPIPS, where its package is installed and its weights can be had."""
    try:
        return load_lpips("alex", offline=offline, progress=progress).to(device)
    except (MissingExtraError, ArtifactError) as error:
        progress.note(f"LPIPS is left out. {error}")
        return None


def lpips_record(lpips: LPIPS | None) -> dict[str, str] | None:
    """Which network with which weights measured LPIPS."""
    if lpips is None or lpips.weights_file is None:
        return None
    return {
        "net": lpips.net,
        "weights_file": str(lpips.weights_file),
        "weights_sha256": sha256_file(lpips.weights_file),
    }
