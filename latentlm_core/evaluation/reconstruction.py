"""How much of an image a tokenizer keeps: PSNR, SSIM, LPIPS, rFID, and the noise it lives with.

Everything is measured on reconstructions rounded to uint8, as they would be saved, in one pass
that keeps no images. A latent that is drawn depends on the seed and the image's place alone, never
on the batch.

Axes: B batch, N images, T latent positions, C latent channels, H W image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.data.base import Image
from latentlm_core.data.media import to_tensor, to_uint8
from latentlm_core.draws import Draws
from latentlm_core.errors import DataError
from latentlm_core.evaluation.distances import frechet_distance
from latentlm_core.evaluation.features import (
    FeatureExtractor,
    Moments,
    PixelHash,
    image_digests,
    to_float64,
)
from latentlm_core.evaluation.image_sets import ImageSet
from latentlm_core.evaluation.images import FEW_IMAGES
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import generator, versions
from latentlm_core.tokenizers.base import LatentPosterior, Tokenizer

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""A distance (B,) between media (B, 3, H, W) in [-1, 1], such as LPIPS."""

IDENTICAL_PSNR = 100.0
"""What identical images get, whose PSNR would be infinite."""
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


class ReconstructionReport(Config):
    """What a tokenizer keeps of a set of images."""

    values: dict[str, float]
    """psnr (dB), ssim, lpips, rfid (``rfid[NAME]`` where the extractor is not Inception), and of
    the raw latents std_mean, std_latent and noise_to_signal = RMS sigma / std_latent."""
    data: str
    """Where the images came from."""
    num_images: int
    """N."""
    data_sha256: str
    """Of their decoded pixels."""
    image_size: tuple[int, int]
    """(H, W)."""
    resize: str
    """How they were brought to that size."""
    latents: str
    """What was decoded: `drawn` from the posterior, or its `mean`."""
    seed: int
    """Of the draws."""
    extractor: str | None
    """The network of the rFID, None if it was not measured."""
    weights_file: str | None
    """The file that its weights came from."""
    weights_sha256: str | None
    """Of that file."""
    versions: dict[str, str]
    """Of everything that was involved."""
    warnings: tuple[str, ...]
    """What speaks against comparing the numbers with published ones."""


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    images: ImageSet,
    extractor: FeatureExtractor | None = None,
    perceptual: Perceptual | None = None,
    *,
    draw: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> ReconstructionReport:
    """Encode, decode and compare; the batches are shared among the processes.

    Args:
        tokenizer: in evaluation mode, on ``device``.
        images: originals; the rFID compares with these same images.
        extractor: for the rFID.
        perceptual: for LPIPS, on ``device``.
        draw: decode a draw from the posterior, which is what a language model would hand over,
            instead of its mean.
        seed: of the draws.
        batch_size: images at a time; the numbers do not depend on it.
        device: where the tokenizer is.
        progress: hears of the pass.

    Raises:
        DataError: images that cannot be read or that the tokenizer cannot take; none at all.
    """

    def compare(first: int, batch: Image) -> _Compared:
        rebuilt, posterior = reconstruct(tokenizer, batch, first if draw else None, seed, device)
        original = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device)
        sums = _compare(original, rebuilt, posterior, perceptual)
        seen = [extractor(side)[0].cpu() for side in (original, rebuilt)] if extractor else []
        return _Compared(image_digests(batch), sums, seen)

    pixels, tally = PixelHash(images.image_size), _Tally()
    rfid = _RFID(extractor) if extractor else None
    with progress.bar(f"reconstructing {images.name}", len(images), "images") as bar:
        for compared in images.map_batches(batch_size, compare):
            pixels.add(compared.digests)
            tally.add(len(compared.digests), compared.sums)
            if rfid:
                rfid.add(compared.features)
            bar.advance(len(compared.digests))
    values = tally.values()
    if rfid:
        values |= rfid.values()
    too_few = f"An rFID of {tally.count} images, fewer than {FEW_IMAGES}, is biased."
    warnings = (too_few,) if rfid and tally.count < FEW_IMAGES else ()
    for warning in warnings:
        progress.warn(warning)
    return ReconstructionReport(
        values=values,
        data=images.name,
        num_images=tally.count,
        data_sha256=pixels.hexdigest(),
        image_size=images.image_size,
        resize=images.resize,
        latents="drawn" if draw else "mean",
        seed=seed,
        extractor=extractor.name if extractor else None,
        weights_file=extractor.weights.file if extractor else None,
        weights_sha256=extractor.weights.sha256 if extractor else None,
        versions=versions(),
        warnings=warnings,
    )


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer,
    images: Image,
    first: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, LatentPosterior]:
    """Encode and decode images uint8 (B, H, W, 3).

    Args:
        tokenizer: in evaluation mode, on ``device``.
        images: to encode.
        first: place of the first image in its set: each latent is drawn with a generator of its
            own, made from the seed and its place. None decodes the posterior's mean.
        seed: of the draws.
        device: where the tokenizer is.

    Returns:
        Reconstructions uint8 (B, 3, H, W) and the posterior, on ``device``.
    """
    media = to_tensor(images).to(device)
    posterior = tokenizer.encode(media)
    raw = posterior.mode() if first is None else _draw(posterior, first, seed)
    return to_uint8(tokenizer.decode(raw, tokenizer.grid(media.shape))), posterior


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of uint8 images (B, 3, H, W), 100 at most."""
    error = (to_float64(x) - to_float64(y)).square().mean((1, 2, 3))
    return (10.0 * torch.log10(255.0**2 / error)).clamp(max=IDENTICAL_PSNR)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (B,) of uint8 images (B, 3, H, W).

    Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5, K = (0.01, 0.03), windows that
    lie inside the image, mean over windows and the three channels.

    Raises:
        DataError: images smaller than the window.
    """
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise DataError(
            f"SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} pixels or more, not "
            f"{x.shape[3]}x{x.shape[2]}."
        )
    a, b = to_float64(x), to_float64(y)
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variance_a = _window_mean(a * a) - mean_a**2
    variance_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean((1, 2, 3))


@dataclass(frozen=True, slots=True)
class _Compared:
    """What becomes of a batch.

    Attributes:
        digests: of its images.
        sums: of the figures that ``_compare`` names.
        features: (B, D) of originals and reconstructions, if they are wanted.
    """

    digests: list[bytes]
    sums: dict[str, float]
    features: list[Tensor]


@dataclass(slots=True)
class _Tally:
    """Sums over images, and over elements of their latents."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, count: int, sums: dict[str, float]) -> None:
        self.count += count
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        if not self.count:
            raise DataError("There are no images to reconstruct.")
        elements = self.sums["elements"]
        mean = self.sums["mu"] / elements
        signal = max(self.sums["mu_squared"] / elements - mean**2, 0.0)
        noise = self.sums["noise_variance"] / elements
        known = ("psnr", "ssim", "lpips")
        values = {name: self.sums[name] / self.count for name in known if name in self.sums}
        values["std_mean"] = signal**0.5
        values["std_latent"] = (signal + noise) ** 0.5
        if signal + noise > 0:
            values["noise_to_signal"] = (noise / (signal + noise)) ** 0.5
        return values


def _compare(
    original: Tensor, rebuilt: Tensor, posterior: LatentPosterior, perceptual: Perceptual | None
) -> dict[str, float]:
    """Sums over a batch: of the images' figures, and over the elements of their latents."""
    found = {"psnr": psnr(original, rebuilt), "ssim": ssim(original, rebuilt)}
    if perceptual:
        with torch.inference_mode():
            pair = (image.float() / 127.5 - 1.0 for image in (original, rebuilt))
            found["lpips"] = perceptual(*pair)
    sums = {name: float(to_float64(each).sum()) for name, each in found.items()}
    mu = to_float64(posterior.mean)
    noise = posterior.rule.noise_variance(posterior.log_variance)
    return sums | {
        "elements": mu.numel(),
        "mu": float(mu.sum()),
        "mu_squared": float(mu.square().sum()),
        "noise_variance": noise * mu.numel(),
    }


class _RFID:
    """Feature moments of originals and reconstructions."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor
        dims, device = extractor.dims, extractor.device
        self._moments = (Moments(dims, device), Moments(dims, device))

    def add(self, features: Sequence[Tensor]) -> None:
        for moments, rows in zip(self._moments, features, strict=True):
            moments.add(rows)

    def values(self) -> dict[str, float]:
        ours, theirs = ((each.mean(), each.covariance()) for each in self._moments)
        plain = self._extractor.name == "inception"
        name = "rfid" if plain else f"rfid[{self._extractor.name}]"
        return {name: frechet_distance(*ours, *theirs)}


def _draw(posterior: LatentPosterior, first: int, seed: int) -> Tensor:
    """Draw raw latents (B, T, C), each with a generator of its own."""
    drawn = []
    for place in range(len(posterior.mean)):
        one = slice(place, place + 1)
        log_variance = None if posterior.log_variance is None else posterior.log_variance[one]
        random = generator("reconstruction", seed, first + place, device=posterior.mean.device)
        drawn.append(posterior.rule.draw(posterior.mean[one], log_variance, Draws(random)))
    return torch.cat(drawn)


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted mean of each window inside the image (B, 3, H - 10, W - 10)."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = torch.tensor(np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2), dtype=x.dtype)
    weights = (weights / weights.sum()).to(x.device)
    rows = F.conv2d(x.flatten(0, 1)[:, None], weights.view(1, 1, 1, -1))
    means = F.conv2d(rows, weights.view(1, 1, -1, 1))
    return means.view(*x.shape[:2], *means.shape[2:])
