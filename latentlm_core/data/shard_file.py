"""Shards of raw posterior means: written once, read memory-mapped.

A shard of n examples holds, as safetensors:

    mean            (V, n * T, C)   raw latents, variant by variant, example after example
    log_variance    (V, n * T, C)   where the posterior is learned
    offsets         (n + 1,)        where the positions of each example begin, in each variant
    label           (n,)            -1 where there is none
    key, caption                    UTF-8 bytes of all texts, one after the other, with
    key_offsets, caption_offsets    (n + 1,); an absent caption is an empty one

Offsets leave room for examples of different lengths; where all have T positions, a shard reads as
(V, n, T, C) without a copy. Noise and normalisation are no part of a shard: they are applied when
a batch is made.

Axes: V variants, n examples, T latent positions, C latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from latentlm_core import files
from latentlm_core.data.manifest import LatentPlan, LatentSums, Manifest, ShardEntry, shard_name
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.tokenizers.base import PosteriorKind


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples on their way into a shard.

    Attributes:
        mean: (n, V, T, C) posterior means of every variant.
        log_variance: (n, V, T, C) where the posterior is learned, else None.
        labels: (n,) int64.
        captions: n texts, None where there is none.
        keys: n keys.
    """

    mean: Tensor
    log_variance: Tensor | None
    labels: Tensor
    captions: tuple[str | None, ...]
    keys: tuple[str, ...]


def write_shard(folder: Path, plan: LatentPlan, number: int, encoded: Encoded) -> ShardEntry:
    """Write shard ``number`` of a latent set.

    Raises:
        DataError: a latent is not finite in the plan's dtype.
        ArtifactError: the file system refused.
    """
    dtype = _DTYPES[plan.dtype]
    mean = encoded.mean.to(dtype)
    log_variance = None if encoded.log_variance is None else encoded.log_variance.to(dtype)
    for values in (mean, log_variance):
        _check_finite(values, encoded.keys, plan.dtype)
    count = len(encoded.keys)
    key, key_offsets = _pack(encoded.keys)
    caption, caption_offsets = _pack([text or "" for text in encoded.captions])
    tensors = {
        "mean": _by_variant(mean),
        "offsets": torch.arange(count + 1) * plan.num_positions,
        "label": encoded.labels,
        "key": key,
        "key_offsets": key_offsets,
        "caption": caption,
        "caption_offsets": caption_offsets,
    }
    if log_variance is not None:
        tensors["log_variance"] = _by_variant(log_variance)
    path = folder / shard_name(number)
    files.write_safetensors(path, tensors)
    return ShardEntry(
        file=path.name,
        first=plan.covers(number).start,
        count=count,
        sha256=files.sha256_file(path),
        num_bytes=path.stat().st_size,
        sums=LatentSums.of(mean, log_variance),
    )


class Shard:
    """An open shard whose every tensor was checked against the manifest.

    Args:
        folder: of the latent set.
        manifest: of the latent set.
        entry: which shard of it.

    Attributes:
        count: n.
        mean: (V, n, T, C), a view of the file.
        log_variance: (V, n, T, C), a view of the file, where the posterior is learned.
        labels: (n,) int64.
        keys, captions: n texts by index.

    Raises:
        CorruptFileError: the file cannot be read or is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, entry: ShardEntry) -> None:
        self.count = entry.count
        self._path = folder / entry.file
        self._tensors = self._map()
        self.mean = self._latents("mean", manifest)
        learned = manifest.posterior.kind is PosteriorKind.LEARNED
        self.log_variance = self._latents("log_variance", manifest) if learned else None
        expected = torch.arange(self.count + 1) * manifest.num_positions
        if not torch.equal(self._take("offsets", torch.int64, (self.count + 1,)), expected):
            raise CorruptFileError(f"{self._path}: its offsets are not those of its grid.")
        self.labels = self._take("label", torch.int64, (self.count,))
        if ((self.labels < -1) | (self.labels >= len(manifest.classes))).any():
            raise CorruptFileError(f"{self._path}: a label is none of the classes.")
        self.keys = self._texts("key")
        self.captions = self._texts("caption")

    def _map(self) -> dict[str, Tensor]:
        try:
            with safetensors.safe_open(self._path, "pt") as file:
                return {name: file.get_tensor(name) for name in _NAMES & set(file.keys())}
        except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CorruptFileError(f"{self._path} cannot be read ({error}).") from None

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CorruptFileError(
                f"{self._path}: {name} is {found}, not {dtype} {shape} as its manifest says."
            )
        return tensor

    def _latents(self, name: str, manifest: Manifest) -> Tensor:
        """(V, n, T, C), a view of the file."""
        variants, positions = len(manifest.variants), manifest.num_positions
        shape = (variants, self.count * positions, manifest.latent_channels)
        flat = self._take(name, _DTYPES[manifest.dtype], shape)
        return flat.view(variants, self.count, positions, manifest.latent_channels)

    def _texts(self, name: str) -> "Texts":
        offsets = self._take(f"{name}_offsets", torch.int64, (self.count + 1,))
        content = self._tensors.get(name)
        size = 0 if content is None else content.numel()
        content = self._take(name, torch.uint8, (size,))
        if offsets[0] != 0 or offsets[-1] != size or (offsets.diff() < 0).any():
            raise CorruptFileError(f"{self._path}: {name}_offsets do not fit its texts.")
        return Texts(content, offsets, f"{self._path}: {name}")


class Texts:
    """Texts out of one run of bytes, decoded one at a time.

    Args:
        content: all bytes.
        offsets: where each text begins, and the end.
        where: the file, for messages.
    """

    def __init__(self, content: Tensor, offsets: Tensor, where: str) -> None:
        self._content = content.numpy()
        self._offsets = offsets.numpy()
        self._where = where

    def __getitem__(self, index: int) -> str:
        start, end = self._offsets[index], self._offsets[index + 1]
        try:
            return self._content[start:end].tobytes().decode()
        except UnicodeDecodeError:
            raise CorruptFileError(f"{self._where} {index} is no UTF-8.") from None


_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_NAMES = {
    *("mean", "log_variance", "offsets", "label"),
    *("key", "key_offsets", "caption", "caption_offsets"),
}


def _by_variant(latents: Tensor) -> Tensor:
    """(n, V, T, C) => (V, n * T, C)."""
    return latents.transpose(0, 1).flatten(1, 2)


def _pack(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    parts = [text.encode("utf-8", "replace") for text in texts]
    offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    content = np.frombuffer(b"".join(parts), np.uint8).copy()
    return torch.from_numpy(content), offsets


def _check_finite(values: Tensor | None, keys: Sequence[str], dtype: str) -> None:
    if values is None or bool(values.isfinite().all()):
        return
    broken = (~values.isfinite()).flatten(1).any(1).nonzero()[0, 0]
    raise DataError(f"The latents of {keys[int(broken)]} are not finite as {dtype}.")
