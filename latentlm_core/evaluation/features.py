"""Features of images, streamed: what every distribution metric is made of.

Notable choices:
- A network that yields features is any ``FeatureExtractor``; its name and digest travel with every
  number, so that figures of different extractors cannot be mistaken for each other.
- Images arrive as uint8 batches and leave as float64 sums: the mean and the covariance of 50,000
  images need neither the images nor their features in memory. Only the metrics that compare single
  images keep float32 rows: features for KID and precision-recall, logits for the Inception Score
  (50,000 of them: 0.4 GB and 0.2 GB).
- The content hash is taken from the decoded pixels in the same pass, so it cannot go stale. It is
  made of each image's own, which is all that processes need to hand over.
- Processes share a pass by its batches, and each sums up all of them in their order, so nothing
  that is measured depends on how many there are.

Axes: N images, B batch, H W image, D features, K classes.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentlm_core.data.base import Image
from latentlm_core.errors import DataError
from latentlm_core.evaluation.image_sets import ImageSet
from latentlm_core.progress import SILENT, Progress


class FeatureExtractor(Protocol):
    """A network that turns images into features."""

    @property
    def name(self) -> str:
        """Short name; ``inception`` alone may call its distances FID, IS and KID."""

    @property
    def dims(self) -> int:
        """D."""

    @property
    def has_logits(self) -> bool:
        """Whether it yields logits too, which the Inception Score needs."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the weights that the features depend on."""

    @property
    def weights(self) -> "WeightsFile":
        """Where the weights came from."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (B, 3, H, W) => features (B, D), logits (B, K) or None."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The origin of an extractor's weights, for reports.

    Attributes:
        file: path of the file, or a word for weights that never were in one.
        sha256: of that file, or of the tensors.
    """

    file: str
    sha256: str


class Moments:
    """Running mean and covariance of features, as float64 sums.

    Args:
        dims: D.
        device: where they are summed up, if it is a CUDA device, else on the CPU.
    """

    def __init__(self, dims: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._device = torch.device(device)
        self._sum = torch.zeros(dims, dtype=torch.float64)
        self._outer = torch.zeros(dims, dims, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in features (B, D)."""
        rows = to_float64(features.to(self._device))
        self.count += len(rows)
        self._sum = self._sum.to(rows.device) + rows.sum(0)
        self._outer = self._outer.to(rows.device).addmm_(rows.T, rows)

    def mean(self) -> np.ndarray:
        """Mean (D,)."""
        return (self._sum / self.count).cpu().numpy()

    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D), as ``numpy.cov`` has it.

        Raises:
            DataError: fewer than two images.
        """
        if self.count < 2:
            raise DataError(f"A covariance needs two images or more; there is {self.count}.")
        centred = self._outer - torch.outer(self._sum, self._sum) / self.count
        return (centred / (self.count - 1)).cpu().numpy()


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What one pass over an image set leaves.

    Attributes:
        moments: of the features of all images.
        sha256: of the decoded pixels, in order.
        features: (N, D) float32 on the CPU, if they were asked for.
        logits: (N, K) float32 on the CPU, if they were asked for.
    """

    moments: Moments
    sha256: str
    features: Tensor | None
    logits: Tensor | None


def extract_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    keep_features: bool = False,
    keep_logits: bool = False,
    progress: Progress = SILENT,
) -> ImageFeatures:
    """Stream an image set through an extractor, its batches shared among the processes.

    Raises:
        DataError: an image cannot be read or has another size than the first.
    """

    def see(_: int, batch: Image) -> tuple[list[bytes], Tensor, Tensor | None]:
        rows, scores = extractor(torch.from_numpy(batch).permute(0, 3, 1, 2))
        kept = scores.float().cpu() if keep_logits and scores is not None else None
        return image_digests(batch), rows.float().cpu(), kept

    pixels, moments = PixelHash(images.image_size), Moments(extractor.dims, extractor.device)
    features: list[Tensor] = []
    logits: list[Tensor] = []
    with progress.bar(f"features of {images.name}", len(images), "images") as bar:
        for digests, rows, scores in images.map_batches(batch_size, see):
            pixels.add(digests)
            moments.add(rows)
            if keep_features:
                features.append(rows)
            if scores is not None:
                logits.append(scores)
            bar.advance(len(rows))
    if not moments.count:
        raise DataError(f"{images.name} holds no images.")
    return ImageFeatures(
        moments=moments,
        sha256=pixels.hexdigest(),
        features=torch.cat(features) if features else None,
        logits=torch.cat(logits) if logits else None,
    )


class PixelHash:
    """SHA-256 over decoded pixels: the size, then the ``image_digests`` in order.

    Args:
        image_size: (H, W).
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        self._hash = hashlib.sha256(f"uint8 {image_size[0]} {image_size[1]} 3;".encode())

    def add(self, digests: Iterable[bytes]) -> None:
        """Take in images by their digests."""
        for digest in digests:
            self._hash.update(digest)

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def image_digests(images: Image) -> list[bytes]:
    """SHA-256 of the RGB values of each of the images uint8 (B, H, W, 3)."""
    return [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes, types and values, whatever their order or container."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def to_float64(values: Tensor) -> Tensor:
    """The same numbers in float64: where they are, or on the CPU if that is no CUDA device."""
    return values.to(values.device if values.is_cuda else "cpu", torch.float64)
