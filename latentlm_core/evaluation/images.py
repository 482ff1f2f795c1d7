"""Metrics of generated images, each with the protocol that it was measured by.

What is known to spoil comparisons is part of the report: how many images there were on both
sides, of what content, size and label policy, and which network with which weights saw them.
A distance on features other than Inception's carries the extractor's name.

Axes: N images, D features.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.evaluation.distances import (
    FIDELITY_SEED,
    IS_SPLITS,
    KID_SUBSETS,
    NEIGHBOURS,
    frechet_distance,
    inception_score,
    kernel_distance,
    kid_subset_size,
    precision_recall,
)
from latentlm_core.evaluation.features import FeatureExtractor, ImageFeatures, extract_features
from latentlm_core.evaluation.image_sets import ImageSet
from latentlm_core.evaluation.statistics import ReferenceStatistics, fit_statistics
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import versions

Metric = Literal["fid", "is", "kid", "precision-recall"]
METRICS: tuple[Metric, ...] = ("fid", "is", "kid", "precision-recall")

FEW_IMAGES = 2048
"""Below this the covariance of 2,048 features has no full rank."""


class ImageProtocol(Config):
    """Everything that a number depends on besides the images themselves."""

    samples: str
    """Where the samples came from."""
    num_samples: int
    """N of the samples."""
    samples_sha256: str
    """Of the samples' decoded pixels."""
    samples_resize: str
    """How the samples were brought to their size."""
    image_size: tuple[int, int]
    """(H, W) of the samples."""
    label_policy: str
    """How the classes of the samples are spread: balanced, unbalanced, one class, unknown."""
    reference: str | None
    """Where the reference came from; None for the Inception Score."""
    num_reference: int | None
    """N of the reference; None if its statistics do not say."""
    reference_sha256: str | None
    """Of the reference's decoded pixels, or of a foreign statistics file."""
    reference_resize: str | None
    """How the reference was brought to its size."""
    extractor: str
    """The network that made the features."""
    extractor_digest: str
    """Of its weights."""
    weights_file: str
    """The file that they came from."""
    weights_sha256: str
    """Of that file."""
    seed: int
    """Of the IS shuffle and the KID subsets."""
    settings: dict[str, int]
    """Splits, subsets, neighbours and numbers of images of the metrics that have them."""
    versions: dict[str, str]
    """Of everything that was involved."""


class ImageReport(Config):
    """Metrics of a set of samples."""

    values: dict[str, float]
    """By name: fid, is, is_std, kid, kid_std, precision, recall; ``fid[NAME]`` and so on where the
    extractor is not Inception."""
    protocol: ImageProtocol
    """What they depend on."""
    warnings: tuple[str, ...]
    """What speaks against comparing them with published ones."""


def evaluate_images(
    metrics: Sequence[Metric],
    samples: ImageSet,
    reference: ImageSet | ReferenceStatistics | None,
    extractor: FeatureExtractor,
    *,
    seed: int = FIDELITY_SEED,
    batch_size: int = 64,
    progress: Progress = SILENT,
) -> ImageReport:
    """Measure samples against a reference.

    Args:
        metrics: which ones.
        samples: the generated images.
        reference: images, or statistics (which serve the FID alone, unless images came with
            them); None will do for the Inception Score.
        extractor: the network that makes the features.
        seed: of the IS shuffle and the KID subsets.
        batch_size: images at a time; the numbers do not depend on it.
        progress: hears of the passes and of the warnings.

    Raises:
        ConfigError: a metric lacks its reference or its logits.
        DataError: too few images, unreadable ones, or statistics of another extractor.
    """
    _check_request(metrics, samples, reference, extractor)
    compared = set(metrics) - {"is"}
    keep = bool(compared - {"fid"})
    ours = extract_features(
        samples,
        extractor,
        batch_size=batch_size,
        keep_features=keep,
        keep_logits="is" in metrics,
        progress=progress,
    )
    values: dict[str, float] = {}
    if ours.logits is not None:
        values["is"], values["is_std"] = inception_score(ours.logits, seed)
    theirs, features = None, None
    if reference is not None and compared:
        theirs, features = _measure_reference(reference, extractor, keep, batch_size, progress)
        values |= _compare(metrics, ours, theirs, features, seed)
    if extractor.name != "inception":
        values = {f"{name}[{extractor.name}]": value for name, value in values.items()}
    warnings = _warnings(samples, ours.moments.count, theirs)
    for warning in warnings:
        progress.warn(warning)
    settings = _settings(metrics, ours.features, features)
    protocol = _protocol(samples, ours, theirs, extractor, seed, settings)
    return ImageReport(values=values, protocol=protocol, warnings=warnings)


def _check_request(
    metrics: Sequence[Metric],
    samples: ImageSet,
    reference: ImageSet | ReferenceStatistics | None,
    extractor: FeatureExtractor,
) -> None:
    compared = [metric for metric in metrics if metric != "is"]
    if reference is None and compared:
        raise ConfigError(
            f"{', '.join(compared)} needs a reference to compare {samples.name} with."
        )
    if "is" in metrics and not extractor.has_logits:
        raise ConfigError(
            "The Inception Score needs the network's last layer, which "
            f"{extractor.weights.file} lacks.",
            hint="Use torch-fidelity's own weights file.",
        )
    if not compared or not isinstance(reference, ReferenceStatistics):
        return
    needing = [metric for metric in compared if metric != "fid"]
    if needing and reference.images is None:
        raise ConfigError(
            f"{', '.join(needing)} needs the images of the reference, and {reference.name} holds "
            "statistics only; name a data set, a folder or an npz of images."
        )
    made_by = reference.protocol.get("extractor_digest", extractor.digest)
    if made_by != extractor.digest or len(reference.mean) != extractor.dims:
        raise DataError(
            f"The statistics {reference.name} were not made by {extractor.name} with the weights "
            f"{extractor.weights.file}; their distance would mean nothing."
        )


def _measure_reference(
    reference: ImageSet | ReferenceStatistics,
    extractor: FeatureExtractor,
    keep_features: bool,
    batch_size: int,
    progress: Progress,
) -> tuple[ReferenceStatistics, Tensor | None]:
    """The Gaussian of a reference, and its features (N, D) if they are wanted."""

    def extract(images: ImageSet) -> ImageFeatures:
        return extract_features(
            images, extractor, batch_size=batch_size, keep_features=keep_features, progress=progress
        )

    if isinstance(reference, ImageSet):
        seen = extract(reference)
        return fit_statistics(reference, extractor, seen), seen.features
    if reference.images is not None and keep_features:
        return reference, extract(reference.images).features
    return reference, None


def _compare(
    metrics: Sequence[Metric],
    ours: ImageFeatures,
    theirs: ReferenceStatistics,
    features: Tensor | None,
    seed: int,
) -> dict[str, float]:
    values = {}
    if "fid" in metrics:
        mean, covariance = ours.moments.mean(), ours.moments.covariance()
        values["fid"] = frechet_distance(mean, covariance, theirs.mean, theirs.covariance)
    if ours.features is None or features is None:
        return values
    if "kid" in metrics:
        values["kid"], values["kid_std"] = kernel_distance(ours.features, features, seed)
    if "precision-recall" in metrics:
        values["precision"], values["recall"] = precision_recall(ours.features, features)
    return values


def _settings(
    metrics: Sequence[Metric], ours: Tensor | None, theirs: Tensor | None
) -> dict[str, int]:
    settings = {}
    if "is" in metrics:
        settings["is_splits"] = IS_SPLITS
    if "kid" in metrics and ours is not None and theirs is not None:
        settings["kid_subsets"] = KID_SUBSETS
        settings["kid_subset_size"] = kid_subset_size(ours, theirs)
    if "precision-recall" in metrics:
        settings["neighbours"] = NEIGHBOURS
    if theirs is not None:
        settings["reference_features"] = len(theirs)
    return settings


def _protocol(
    samples: ImageSet,
    ours: ImageFeatures,
    theirs: ReferenceStatistics | None,
    extractor: FeatureExtractor,
    seed: int,
    settings: dict[str, int],
) -> ImageProtocol:
    return ImageProtocol(
        samples=samples.name,
        num_samples=ours.moments.count,
        samples_sha256=ours.sha256,
        samples_resize=samples.resize,
        image_size=samples.image_size,
        label_policy=samples.label_policy,
        reference=theirs.name if theirs else None,
        num_reference=theirs.num if theirs else None,
        reference_sha256=theirs.sha256 if theirs else None,
        reference_resize=str(theirs.protocol.get("resize", "unknown")) if theirs else None,
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        weights_file=extractor.weights.file,
        weights_sha256=extractor.weights.sha256,
        seed=seed,
        settings=settings,
        versions=versions(),
    )


def _warnings(
    samples: ImageSet, num_samples: int, theirs: ReferenceStatistics | None
) -> tuple[str, ...]:
    found = []
    if num_samples < FEW_IMAGES:
        found.append(
            f"{num_samples} samples are fewer than {FEW_IMAGES}: distances between sets this small "
            "are biased, and comparable only at equal numbers."
        )
    if samples.lossy:
        found.append("The samples went through a lossy format, which by itself moves every metric.")
    if samples.label_policy == "unbalanced":
        found.append("The samples do not have equally many of each class.")
    covered, known = samples.num_covered, theirs.num_classes if theirs else None
    if covered is not None and known is not None and covered < known:
        found.append(f"The samples cover {covered} of the {known} classes of the reference.")
    elif covered == 1 and known is None:
        found.append("All samples are of one class.")
    if theirs is None:
        return tuple(found)
    if theirs.num is None:
        found.append(f"{theirs.name} does not say how many images or which network made it.")
    elif theirs.num < FEW_IMAGES:
        found.append(f"The reference has {theirs.num} images, fewer than {FEW_IMAGES}.")
    size = theirs.protocol.get("image_size")
    if size is not None and size != list(samples.image_size):
        found.append(
            f"The reference was measured at (H, W) = {size}, the samples are "
            f"{list(samples.image_size)}."
        )
    return tuple(found)
