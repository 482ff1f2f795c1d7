"""Reference statistics: the mean and covariance of a reference set's features.

The file is an npz with ``mu`` and ``sigma`` as in ADM's files (and pytorch-fid's); ADM's evaluator
also wants spatial statistics, which are not made here. Ours adds ``protocol``, a JSON string that
says what the numbers were made of. Files without it (ADM's own) are known by their file hash.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latentlm_core.errors import DataError
from latentlm_core.evaluation.features import FeatureExtractor, ImageFeatures, extract_features
from latentlm_core.evaluation.image_sets import ImageSet, image_npz
from latentlm_core.evaluation.npz import (
    npz_keys,
    npz_member,
    read_floats,
    read_record,
    write_arrays,
)
from latentlm_core.files import sha256_file, write_file
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import versions

MAX_DIMS = 8192


@dataclass(frozen=True, slots=True)
class ReferenceStatistics:
    """Gaussian fit of a reference set in feature space.

    Attributes:
        name: of the reference, for reports.
        mean: float64 (D,).
        covariance: float64 (D, D).
        sha256: of the reference's pixels; of the file where nothing is known of them.
        protocol: num, num_classes, resize, image_size, extractor, extractor_digest, versions; {} if
            unknown.
        images: reference images that came with it (ADM's files carry 10,000), for KID and
            precision-recall.
    """

    name: str
    mean: np.ndarray
    covariance: np.ndarray
    sha256: str
    protocol: Mapping[str, object] = field(default_factory=dict)
    images: ImageSet | None = None

    @property
    def num(self) -> int | None:
        """How many images it was made of, if that is known."""
        return self._integer("num")

    @property
    def num_classes(self) -> int | None:
        """Of how many classes they were, if that is known."""
        return self._integer("num_classes")

    def save(self, path: Path) -> None:
        """Write an npz with ``mu`` and ``sigma`` as ADM's have; equal statistics, equal bytes."""
        record = {"name": self.name, "sha256": self.sha256, **self.protocol}
        arrays = {
            "mu": self.mean,
            "sigma": self.covariance,
            "protocol": np.array(json.dumps(record, sort_keys=True)),
        }
        write_file(path, lambda part: write_arrays(part, arrays))

    def _integer(self, name: str) -> int | None:
        value = self.protocol.get(name)
        return value if isinstance(value, int) else None


def reference_statistics(
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    progress: Progress = SILENT,
) -> ReferenceStatistics:
    """Make the statistics of an image set.

    Raises:
        DataError: fewer than two images, or one that cannot be read.
    """
    seen = extract_features(images, extractor, batch_size=batch_size, progress=progress)
    return fit_statistics(images, extractor, seen)


def fit_statistics(
    images: ImageSet, extractor: FeatureExtractor, seen: ImageFeatures
) -> ReferenceStatistics:
    """The statistics of an image set whose features were extracted already.

    Raises:
        DataError: fewer than two images.
    """
    protocol = {
        "num": seen.moments.count,
        "num_classes": images.num_covered,
        "resize": images.resize,
        "image_size": list(images.image_size),
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "versions": versions(),
    }
    return ReferenceStatistics(
        name=images.name,
        mean=seen.moments.mean(),
        covariance=seen.moments.covariance(),
        sha256=seen.sha256,
        protocol=protocol,
    )


def load_statistics(path: Path) -> ReferenceStatistics:
    """Read an npz of statistics, ADM's or ours.

    Raises:
        DataError: ``mu`` and ``sigma`` are missing, of the wrong shape, not finite, or no
            covariance; or the file holds pickled objects.
        CorruptFileError: the file is damaged.
    """
    with npz_member(path, "mu") as member:
        shape = member.shape
    if len(shape) != 1 or not 1 <= shape[0] <= MAX_DIMS:
        raise DataError(f"{path}[mu] must have shape (D,) with D of 1 to {MAX_DIMS}, not {shape}.")
    mean = read_floats(path, "mu", shape)
    covariance = read_floats(path, "sigma", (shape[0], shape[0]))
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6):
        raise DataError(f"{path}[sigma] is not symmetric, so it is no covariance.")
    protocol = read_record(path, "protocol")
    return ReferenceStatistics(
        name=str(protocol.pop("name", path.name)),
        mean=mean,
        covariance=covariance,
        sha256=str(protocol.pop("sha256", "")) or sha256_file(path),
        protocol=protocol,
        images=image_npz(path) if "arr_0" in npz_keys(path) else None,
    )
