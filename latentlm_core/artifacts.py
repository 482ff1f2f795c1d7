"""Exports: what a run gives to the world, as JSON and safetensors and nothing else.

    EXPORT/config.json          what the weights are: kind, configuration, provenance
    EXPORT/model.safetensors    averaged weights
    EXPORT/tokenizer/           of a generator: the export of its tokenizer
    EXPORT/README.md            of a pushed export: its model card

A generator's export holds all that sampling needs: normalisation, grid, classes, tokenizer. The
folder has the layout of a hub repository, so the two are read alike.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from latentlm_core.config import C, Config, build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    read_json,
    read_safetensors,
    sha256_file,
    write_folder,
    write_json,
    write_safetensors,
)
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig

Generator = LatentLM | DiT


class TokenizerExport(Config):
    """``config.json`` of a sigma-VAE."""

    format: Literal["latentlm"] = "latentlm"
    """Marks our exports among all files of that name."""
    format_version: Literal[1] = 1
    """Of this file's layout."""
    kind: Literal["sigma-vae"] = "sigma-vae"
    """What the weights are."""
    tokenizer: SigmaVAEConfig
    """The networks and the posterior."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Data, recipe, steps, figures and versions of the training run."""


class GeneratorExport(Config):
    """``config.json`` of a LatentLM or a DiT."""

    format: Literal["latentlm"] = "latentlm"
    """Marks our exports among all files of that name."""
    format_version: Literal[1] = 1
    """Of this file's layout."""
    kind: Literal["generator"] = "generator"
    """What the weights are."""
    model: LatentLMConfig | DiTConfig = Field(discriminator="kind")
    """The network."""
    stats: LatentStats
    """Normalisation of its latents."""
    grid: tuple[int, ...]
    """How its latent positions fold back."""
    classes: tuple[str, ...]
    """Names of the classes; the token after the last stands for none."""
    tokenizer_sha256: str
    """Of the weights of the tokenizer whose latents it learned."""
    sampler: SamplerConfig = SamplerConfig()
    """Settings that sampling uses where the user says nothing."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Data, recipe, steps, figures and versions of the training run."""

    @model_validator(mode="after")
    def _check(self) -> "GeneratorExport":
        if self.model.vocab_size != len(self.classes) + 1:
            raise ValueError(
                f"{len(self.classes)} classes and a null class need a vocabulary of "
                f"{len(self.classes) + 1}, not {self.model.vocab_size}"
            )
        return self

    @property
    def num_latents(self) -> int:
        """T."""
        return math.prod(self.grid)


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer from an export.

    Attributes:
        model: in evaluation mode, on the device asked for.
        config: its ``config.json``.
        folder: where it came from.
        sha256: of its weights file.
    """

    model: SigmaVAE
    config: TokenizerExport
    folder: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class LoadedGenerator:
    """A LatentLM or DiT from an export; attributes as ``LoadedTokenizer``."""

    model: Generator
    config: GeneratorExport
    folder: Path
    sha256: str


def save_tokenizer(folder: Path, model: SigmaVAE, config: TokenizerExport) -> None:
    """Write an export, whole or not at all."""
    with write_folder(folder) as part:
        _write(part, model, config)


def save_generator(
    folder: Path, model: Generator, config: GeneratorExport, tokenizer: Path
) -> None:
    """Write an export with the export of its tokenizer inside, whole or not at all."""
    with write_folder(folder) as part:
        _write(part, model, config)
        copy_export(tokenizer, part / TOKENIZER_FOLDER)


def copy_export(source: Path, target: Path) -> None:
    """Copy the configuration and the weights of an export."""
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, target / name)


def load_tokenizer(folder: Path, device: torch.device) -> LoadedTokenizer:
    """Read a tokenizer's export.

    Raises:
        ArtifactError: there is none, it is of another kind, or its weights do not fit.
        CorruptFileError: a file is damaged.
    """
    config = _read_config(folder, TokenizerExport)
    model = build_tokenizer(config.tokenizer)
    sha256 = _load_weights(model, folder)
    return LoadedTokenizer(model.to(device).eval(), config, folder, sha256)


def load_generator(folder: Path, device: torch.device) -> LoadedGenerator:
    """Read a generator's export.

    Raises:
        ArtifactError: there is none, it is of another kind, or its weights do not fit.
        CorruptFileError: a file is damaged.
    """
    config = _read_config(folder, GeneratorExport)
    model = build_generator(config.model)
    sha256 = _load_weights(model, folder)
    return LoadedGenerator(model.to(device).eval(), config, folder, sha256)


def build_generator(config: LatentLMConfig | DiTConfig) -> Generator:
    """The network of a configuration, with fresh weights."""
    return LatentLM(config) if isinstance(config, LatentLMConfig) else DiT(config)


def export_kind(folder: Path) -> str | None:
    """The kind of export that a folder holds, or None."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (ArtifactError, CorruptFileError):
        return None
    if not isinstance(config, dict) or config.get("format") != "latentlm":
        return None
    return str(config.get("kind"))


def _write(folder: Path, model: nn.Module, config: Config) -> None:
    write_json(folder / CONFIG_FILE, config.to_dict())
    write_safetensors(folder / WEIGHTS_FILE, model.state_dict(), {"format": "pt"})


def _read_config(folder: Path, kind: type[C]) -> C:
    path = folder / CONFIG_FILE
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != "latentlm":
        raise ArtifactError(f"{path} does not describe an export of latentlm.")
    expected = kind.model_fields["kind"].default
    if data.get("kind") != expected:
        raise ArtifactError(f"{folder} holds a {data.get('kind')}, where a {expected} is wanted.")
    try:
        return build(kind, data, str(path))
    except ConfigError as error:
        raise CorruptFileError(str(error)) from None


def _load_weights(model: nn.Module, folder: Path) -> str:
    path = folder / WEIGHTS_FILE
    weights = read_safetensors(path)
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if own != found:
        names = sorted(
            name for name in own.keys() | found.keys() if own.get(name) != found.get(name)
        )
        raise ArtifactError(
            f"{path} does not fit its {CONFIG_FILE}: {len(names)} tensors differ, "
            f"{', '.join(names[:3])} among them."
        )
    model.load_state_dict(weights)
    return sha256_file(path)
