"""A walk over guidance scales and numbers of solver steps.

What is best is a property of a model, and the first thing that its users ask for. Each point draws
few samples and is compared with the same reference statistics, so the points are comparable with
each other, not with an FID of 50,000 samples.
"""

from collections.abc import Callable, Sequence

from pydantic import Field

from latentlm_core.config import Config, build
from latentlm_core.errors import ConfigError
from latentlm_core.evaluation.features import FeatureExtractor
from latentlm_core.evaluation.image_sets import ImageSet
from latentlm_core.evaluation.images import ImageProtocol, evaluate_images
from latentlm_core.evaluation.statistics import ReferenceStatistics
from latentlm_core.progress import SILENT, Progress


class SweepPoint(Config):
    """Settings of the sampler."""

    guidance_scale: float = Field(ge=0.0, le=1000.0)
    """1 is no guidance."""
    num_inference_steps: int = Field(ge=1, le=1000)
    """Steps of the solver."""


class SweepRow(SweepPoint):
    """A point and its distance."""

    fid: float
    """Frechet distance to the reference on the extractor's features."""


class SweepReport(Config):
    """All points, and the best."""

    rows: tuple[SweepRow, ...]
    """In the order they were walked."""
    best: SweepRow
    """The least distance; the first one of equals."""
    metric: str
    """`fid`, or `fid[NAME]` where the extractor is not Inception."""
    protocol: ImageProtocol
    """Of the best point; all points share everything but the samples."""
    warnings: tuple[str, ...]
    """What speaks against comparing the numbers with published ones."""


def sweep(
    points: Sequence[SweepPoint],
    draw: Callable[[SweepPoint], ImageSet],
    reference: ReferenceStatistics,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    progress: Progress = SILENT,
) -> SweepReport:
    """Sample and measure each point.

    Args:
        points: what to try.
        draw: makes the samples of a point, equally many and with the same seeds each time.
        reference: what to compare with.
        extractor: the network that made the reference.
        batch_size: images at a time.
        progress: hears of the walk, and once of the warnings.

    Raises:
        ConfigError: no points.
        DataError: the reference was made by another extractor.
    """
    if not points:
        raise ConfigError("A sweep needs at least one guidance scale and one number of steps.")
    rows, reports = [], []
    with progress.bar("sweep", len(points), "points") as bar:
        for point in points:
            report = evaluate_images(
                ["fid"], draw(point), reference, extractor, batch_size=batch_size
            )
            (distance,) = report.values.values()
            rows.append(SweepRow(**point.model_dump(), fid=distance))
            reports.append(report)
            bar.advance(1, guidance_scale=point.guidance_scale, fid=distance)
    best = min(range(len(rows)), key=lambda index: rows[index].fid)
    (metric,) = reports[best].values
    for warning in reports[best].warnings:
        progress.warn(warning)
    return SweepReport(
        rows=tuple(rows),
        best=rows[best],
        metric=metric,
        protocol=reports[best].protocol,
        warnings=reports[best].warnings,
    )


def grid_points(
    guidance_scales: Sequence[float], num_inference_steps: Sequence[int]
) -> tuple[SweepPoint, ...]:
    """Every scale with every number of steps.

    Raises:
        ConfigError: one is out of range.
    """
    return tuple(
        build(SweepPoint, {"guidance_scale": scale, "num_inference_steps": steps}, "sweep")
        for steps in num_inference_steps
        for scale in guidance_scales
    )
