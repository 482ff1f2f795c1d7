"""Exports: what a run gives to the world, as JSON and safetensors and nothing else.

    EXPORT/config.json          what the weights are (``export_config``)
    EXPORT/model.safetensors    averaged weights
    EXPORT/text.json            of a model that reads text: its text tokenizer
    EXPORT/tokenizer/           of a generator: the export of its tokenizer
    EXPORT/README.md            of a pushed export: its model card

A generator's export holds all that sampling needs. The folder has the layout of a hub repository,
so the two are read alike.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from latentlm_core.config import Config
from latentlm_core.errors import ArtifactError, CorruptFileError
from latentlm_core.export_config import (
    AGAIN,
    GeneratorExport,
    TokenizerExport,
    read_config,
)
from latentlm_core.files import (
    CONFIG_FILE,
    TEXT_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    read_safetensors,
    read_text,
    sha256_file,
    whole_tensors,
    write_folder,
    write_safetensors,
    write_sealed_json,
    write_text,
)
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.models.transfusion import Transfusion, TransfusionConfig
from latentlm_core.processes import current
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.tokenizers.text import TextTokenizer
from latentlm_core.weight_files import open_weights

Generator = LatentLM | Transfusion | DiT
M = TypeVar("M", bound=nn.Module)


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
    """A LatentLM or a baseline from an export; attributes as ``LoadedTokenizer``.

    Attributes:
        text: the text tokenizer, where the model reads text.
    """

    model: Generator
    config: GeneratorExport
    folder: Path
    sha256: str
    text: TextTokenizer | None


def save_tokenizer(folder: Path, model: SigmaVAE, config: TokenizerExport) -> None:
    """Write an export, whole or not at all; every process calls this, the main one writes."""
    if not current().is_main:
        _take_part(model)
        return
    with write_folder(folder) as part:
        _write(part, model, config)


def save_generator(
    folder: Path,
    model: Generator,
    config: GeneratorExport,
    tokenizer: Path | None,
    text: TextTokenizer | None = None,
) -> None:
    """Write an export with the export of its tokenizer inside, whole or not at all.

    Every process calls this, the main one writes.
    """
    if not current().is_main:
        _take_part(model)
        return
    with write_folder(folder) as part:
        _write(part, model, config)
        if text is not None:
            write_text(part / TEXT_FILE, text.to_json())
        if tokenizer is not None:
            copy_export(tokenizer, part / TOKENIZER_FOLDER)


def copy_export(source: Path, target: Path) -> None:
    """Copy the configuration, the weights and, where there is one, the text tokenizer."""
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE, TEXT_FILE):
        if name != TEXT_FILE or (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def load_tokenizer(folder: Path, device: torch.device) -> LoadedTokenizer:
    """Read a tokenizer's export.

    Raises:
        ArtifactError: there is none, it is of another kind, or its weights do not fit.
        CorruptFileError: a file is damaged.
    """
    config = read_config(folder, TokenizerExport)
    model, sha256 = _load(folder, config, lambda: build_tokenizer(config.tokenizer))
    return LoadedTokenizer(model.to(device).eval(), config, folder, sha256)


def load_generator(folder: Path, device: torch.device) -> LoadedGenerator:
    """Read a generator's export.

    Raises:
        ArtifactError: there is none, it is of another kind, or its weights do not fit.
        CorruptFileError: a file is damaged.
    """
    config = read_config(folder, GeneratorExport)
    model, sha256 = _load(folder, config, lambda: build_generator(config.model))
    text = None if config.text_sha256 is None else read_text_tokenizer(folder, config)
    return LoadedGenerator(model.to(device).eval(), config, folder, sha256, text)


def build_generator(config: LatentLMConfig | TransfusionConfig | DiTConfig) -> Generator:
    """The network of a configuration, with fresh weights."""
    if isinstance(config, DiTConfig):
        return DiT(config)
    return LatentLM(config) if isinstance(config, LatentLMConfig) else Transfusion(config)


def read_text_tokenizer(folder: Path, config: GeneratorExport) -> TextTokenizer:
    """Read the text tokenizer of a model that reads text.

    Raises:
        ArtifactError: it is not there, or not the one of the model.
        CorruptFileError: it is damaged.
        MissingExtraError: it needs a package that is not installed.
    """
    path = folder / TEXT_FILE
    text = TextTokenizer.from_json(read_text(path), str(path))
    if text.sha256 != config.text_sha256 or text.vocab_size != config.model.vocab_size:
        raise ArtifactError(
            f"{path} is not the text tokenizer of the model: it has {text.vocab_size} ids and the "
            f"sha256 {text.sha256[:12]}, the model {config.model.vocab_size} and "
            f"{str(config.text_sha256)[:12]}.",
            hint="Copy the one of the run that made it.",
        )
    return text


def differing_tensors(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the tensors that a file lacks, has beyond those of a module, or of another shape.

    Args:
        model: the module.
        shapes: of the tensors in the file, by name.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))


def _take_part(model: nn.Module) -> None:
    """Gather the weights of a shared-out model together with the main process, which writes."""
    for _ in whole_tensors(model.state_dict()):
        pass


def _write(folder: Path, model: nn.Module, config: Config) -> None:
    path = folder / WEIGHTS_FILE
    write_safetensors(path, model.state_dict(), {"format": "pt"})
    content = config.to_dict() | {"weights_sha256": sha256_file(path)}
    write_sealed_json(folder / CONFIG_FILE, content)


def _load(
    folder: Path, config: TokenizerExport | GeneratorExport, build_model: Callable[[], M]
) -> tuple[M, str]:
    """The network and the SHA-256 of its weights, which fit before memory is taken for it."""
    path = folder / WEIGHTS_FILE
    with open_weights(path) as file, torch.device("meta"):
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        names = differing_tensors(build_model(), shapes)
    if names:
        raise ArtifactError(
            f"{path} does not fit its {CONFIG_FILE}: {len(names)} tensors differ, "
            f"{', '.join(names[:3])} among them."
        )
    sha256 = sha256_file(path)
    if config.weights_sha256 not in (None, sha256):
        raise CorruptFileError(f"{path} is damaged: its SHA-256 is another one.", hint=AGAIN)
    model = build_model()
    model.load_state_dict(read_safetensors(path))
    return model, sha256
