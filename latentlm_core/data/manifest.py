"""The manifest of a latent set: what it was made of, what it consists of, its exact statistics.

Statistics are float64 sums of what the shards store, kept a shard and merged in the order of the
shards, so they do not depend on how, where or in how many attempts the shards were made.
Nothing that a manifest says is believed: sizes, names and sums are checked against each other here
and against the files when these are opened, and the whole against its seal (``files.SEAL``).

Images of one size have one grid; recordings differ in length, so a set of them has none. Of speech,
captions are the transcripts, labels the speakers and ``classes`` the speakers' names.

Axes: V variants of each example, T latent positions, C latent channels.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from annotated_types import Len
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from latentlm_core import files
from latentlm_core.config import Config, build
from latentlm_core.data.base import SkippedItem
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, DataError
from latentlm_core.tokenizers.base import (
    Grid,
    LatentPosteriorConfig,
    LatentStats,
    PosteriorKind,
)

MANIFEST = "manifest.json"
FIXED_VERSION: Final = 1
"""Format version of sets with a grid."""
RAGGED_VERSION: Final = 2
"""Format version of sets whose examples differ in length, and the newest that is read."""

Size = Annotated[int, Field(ge=0, lt=2**48)]
Sums = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class LatentSums(Config):
    """Exact sums over latents, from which every normalisation follows."""

    count: Size
    """Latent positions, those of all variants together."""
    sum: Sums
    """Sum of the means, for each channel."""
    sum_squares: Sums
    """Sum of their squares, for each channel."""
    sum_variance: Sums
    """Sum of exp(log-variance), for each channel; zero unless the posterior is learned."""

    @classmethod
    def of(cls, mean: Tensor, log_variance: Tensor | None) -> Self:
        """Sums over stored latents (..., C)."""
        channels = mean.shape[-1]
        values = mean.reshape(-1, channels).double().numpy()
        variance = np.zeros((1, channels))
        if log_variance is not None:
            variance = np.exp(log_variance.reshape(-1, channels).double().numpy())
        return cls(
            count=len(values),
            sum=tuple(values.sum(axis=0).tolist()),
            sum_squares=tuple((values**2).sum(axis=0).tolist()),
            sum_variance=tuple(variance.sum(axis=0).tolist()),
        )

    @classmethod
    def merge(cls, parts: Iterable["LatentSums"], channels: int) -> Self:
        """Add sums up in the order given, ``channels`` zeros first."""
        count = 0
        totals = np.zeros((3, channels))
        with np.errstate(over="ignore"):
            for part in parts:
                count += part.count
                totals += np.array([part.sum, part.sum_squares, part.sum_variance])
        first, second, variance = (tuple(row) for row in totals.tolist())
        return cls(count=count, sum=first, sum_squares=second, sum_variance=variance)


class ShardEntry(Config):
    """One file of a latent set."""

    file: str
    """Its name in the folder."""
    first: Size
    """The first index of the source that it covers."""
    count: Size
    """Examples in it; broken ones are left out."""
    sha256: Digest
    """Of the file."""
    num_bytes: Size
    """Of the file."""
    sums: LatentSums
    """Over its latents."""


class LatentPlan(Config):
    """Everything that decides the content of a latent set, known before anything runs."""

    format: Literal["latentlm-latents"] = "latentlm-latents"
    """What kind of file this is."""
    format_version: Literal[1, 2] = FIXED_VERSION
    """Of the manifest and of the shards; 2 where there is no grid."""
    data: str
    """The data set, as ``open_source`` takes it."""
    split: str
    """Which part of it."""
    classes: tuple[str, ...]
    """Names by label: the speakers' of speech."""
    tokenizer: dict[str, Any]
    """Configuration of the tokenizer."""
    tokenizer_sha256: Digest
    """Of the tokenizer's weights."""
    grid: Annotated[tuple[Annotated[int, Field(gt=0, le=2**16)], ...], Len(1, 2)] | None
    """How the T latent positions of an example fold back; None where examples differ in length."""
    latent_channels: Annotated[int, Field(gt=0, le=2**14)]
    """C."""
    dtype: Literal["float32", "float16"]
    """Of the stored latents."""
    variants: Annotated[tuple[str, ...], Len(1, 2**10)]
    """What is stored of each example: plain, flip, crop-0, ..."""
    num_source: Annotated[int, Field(gt=0, lt=2**48)]
    """Items of the source, the broken ones included."""
    shard_size: PositiveInt
    """Items of the source that each shard covers."""
    batch_size: PositiveInt = 64
    """Views (of speech, seconds) that were encoded at once: with another number, other kernels run
    and the last bits differ."""
    limits: dict[str, Any] | None = None
    """Which recordings were taken, of speech; no key of format version 1."""

    @property
    def fixed_grid(self) -> Grid:
        """The grid of a set that has one.

        Raises:
            DataError: examples differ in length.
        """
        if self.grid is None:
            raise DataError(
                f"The latents of {self.data} differ in length from example to example, where "
                "latents of one grid are wanted."
            )
        return self.grid

    @property
    def num_positions(self) -> int:
        """T of a set with a grid.

        Raises:
            DataError: examples differ in length.
        """
        return math.prod(self.fixed_grid)

    @property
    def posterior(self) -> LatentPosteriorConfig:
        """The tokenizer's rule by which a latent is drawn around its mean.

        Raises:
            ConfigError: the tokenizer's configuration has no such rule.
        """
        return _posterior(self.tokenizer, "the posterior of the tokenizer")

    @property
    def num_shards(self) -> int:
        """Files of the set."""
        return -(-self.num_source // self.shard_size)

    def covers(self, number: int) -> range:
        """Indices of the source that a shard covers."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.num_source))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the keys that the format version has."""
        content = super().to_dict()
        if self.format_version == FIXED_VERSION:
            del content["limits"]
        return content

    @model_validator(mode="after")
    def _is_of_its_version(self) -> Self:
        if (self.grid is None) != (self.format_version == RAGGED_VERSION):
            raise ValueError(
                f"format version {RAGGED_VERSION} is that of sets without a grid, "
                f"{FIXED_VERSION} of those with one"
            )
        if self.limits is not None and self.format_version == FIXED_VERSION:
            raise ValueError(f"format version {FIXED_VERSION} has no limits")
        return self


class Manifest(LatentPlan):
    """A complete latent set."""

    name: str
    """Of the set: that of the folder it was made in."""
    num_examples: Size
    """Examples in all shards."""
    shards: tuple[ShardEntry, ...]
    """The files, in order."""
    statistics: LatentSums
    """Over all shards."""
    skipped: tuple[SkippedItem, ...]
    """What was broken and left out."""

    def stats(self, rule: LatentPosteriorConfig, per_channel: bool = False) -> LatentStats:
        """Normalisation to zero mean and unit variance of the latents as they are drawn.

        The variance is that of the means plus E[sigma^2] of the noise around them.

        Args:
            rule: how latents are drawn.
            per_channel: one shift and scale a channel, else one for all.

        Raises:
            DataError: the latents do not vary.
        """
        sums = self.statistics
        moments = np.array([sums.sum, sums.sum_squares, sums.sum_variance]) / max(sums.count, 1)
        if rule.kind is not PosteriorKind.LEARNED:
            moments[2] = rule.noise_variance()
        with np.errstate(all="ignore"):
            mean, square, noise = moments if per_channel else moments.mean(axis=1, keepdims=True)
            scale = 1.0 / np.sqrt(square - mean**2 + noise)
        if not np.isfinite(scale).all() or not scale.all():
            raise DataError(f"The latents of {self.name} do not vary, so they have no scale.")
        return LatentStats(shift=tuple(mean.tolist()), scale=tuple(scale.tolist()))

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(self.shards) != self.num_shards:
            raise ValueError(f"{len(self.shards)} shards are listed, not {self.num_shards}")
        for number, entry in enumerate(self.shards):
            if entry.file != shard_name(number) or entry.first != number * self.shard_size:
                raise ValueError(f"shard {number} is not {shard_name(number)} in its place")
            if entry.count > len(self.covers(number)):
                raise ValueError(f"{entry.file} has more examples than it covers")
            if not self._has_positions_of(entry):
                raise ValueError(f"the sums of {entry.file} are not of its examples")
        for sums in (self.statistics, *(entry.sums for entry in self.shards)):
            if {len(sums.sum), len(sums.sum_squares), len(sums.sum_variance)} != {
                self.latent_channels
            }:
                raise ValueError(f"there are sums that are not of {self.latent_channels} channels")
        merged = LatentSums.merge((entry.sums for entry in self.shards), self.latent_channels)
        if self.statistics != merged:
            raise ValueError("the statistics are not the sums of the shards")
        if self.num_examples != sum(entry.count for entry in self.shards):
            raise ValueError("num_examples is not the sum of the shards")
        return self

    def _has_positions_of(self, entry: ShardEntry) -> bool:
        if self.grid is not None:
            return entry.sums.count == entry.count * len(self.variants) * self.num_positions
        positions, rest = divmod(entry.sums.count, len(self.variants))
        return not rest and positions >= entry.count and (entry.count > 0 or positions == 0)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a latent set.

    Raises:
        ArtifactError: there is none.
        DataError: it is of a newer format.
        CorruptFileError: it is no manifest, or contradicts itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        state = "is not complete" if folder.is_dir() else "is not there"
        raise ArtifactError(
            f"The latent set {folder} {state}: it has no {MANIFEST}.", hint="Run tokenize again."
        )
    data = files.read_json(path)
    if not isinstance(data, dict) or data.get("format") != "latentlm-latents":
        raise CorruptFileError(f"{path} is not the manifest of a latent set.")
    version = data.get("format_version")
    if isinstance(version, int) and version > RAGGED_VERSION:
        raise DataError(
            f"{path} has format version {version}, and this latentlm reads up to {RAGGED_VERSION}.",
            hint="Update latentlm.",
        )
    seal = data.pop(files.SEAL, None)
    try:
        manifest = build(Manifest, data, str(path))
        _posterior(manifest.tokenizer, f"{path}: the posterior of the tokenizer")
    except ConfigError as error:
        raise CorruptFileError(
            str(error), hint="Remove that file and run tokenize again."
        ) from None
    files.check_seal(path, data, seal)
    return manifest


def _posterior(tokenizer: dict[str, Any], where: str) -> LatentPosteriorConfig:
    rule: Any = tokenizer.get("posterior")
    return build(LatentPosteriorConfig, rule, where)
