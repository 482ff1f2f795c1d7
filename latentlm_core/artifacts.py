"""Exports: what a run gives to the world, as JSON and safetensors and nothing else.

    EXPORT/config.json          what the weights are: kind, configuration, provenance
    EXPORT/model.safetensors    averaged weights
    EXPORT/text.json            of a model that reads text: its text tokenizer
    EXPORT/tokenizer/           of a generator: the export of its tokenizer
    EXPORT/README.md            of a pushed export: its model card

A generator's export holds all that sampling needs: normalisation, grid, classes, tokenizers. The
folder has the layout of a hub repository, so the two are read alike.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from annotated_types import Len
from pydantic import Field, model_validator
from torch import nn

from latentlm_core.config import C, Config, build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import (
    CONFIG_FILE,
    SEAL,
    TEXT_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    check_seal,
    read_json,
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
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig
from latentlm_core.tokenizers.text import TextTokenizer
from latentlm_core.weight_files import open_weights

Generator = LatentLM | Transfusion | DiT
M = TypeVar("M", bound=nn.Module)
SAMPLE_OPTIONS = {
    "classes": "--class, -n, --cfg, --cfg-schedule, --steps, --solver and --npz",
    "speech": "--text, --voice, --stream and --protocol",
    "multimodal": "--prompt, --caption, --ask, --text-only, --interleaved and --data",
}
"""What ``latentlm sample`` takes of a model, by its task."""
AGAIN = "Copy it anew, or remove the export and run its training command again."
"""What to do about a damaged file of an export."""


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
    weights_sha256: str | None = None
    """Of the weights; none where an earlier version wrote the file."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Data, recipe, steps, figures and versions of the training run."""


class SpeechBounds(Config):
    """How long the speech was that a model learned: what bounds the length of its own."""

    latents_per_character: float = Field(gt=0, allow_inf_nan=False)
    """Latents for a character of the transcript, on average."""
    slack: float = Field(ge=0, allow_inf_nan=False)
    """Most latents that an utterance had beyond what its characters take on average."""
    longest: int = Field(ge=1)
    """Latents of the longest utterance."""
    pace: float = Field(ge=0, allow_inf_nan=False)
    """Latents that a byte of text takes on average, 0 where text is not paced."""


class GeneratorExport(Config):
    """``config.json`` of a LatentLM or a baseline."""

    format: Literal["latentlm"] = "latentlm"
    """Marks our exports among all files of that name."""
    format_version: Literal[1] = 1
    """Of this file's layout."""
    kind: Literal["generator"] = "generator"
    """What the weights are."""
    model: LatentLMConfig | TransfusionConfig | DiTConfig = Field(discriminator="kind")
    """The network."""
    weights_sha256: str | None = None
    """Of the weights; none where an earlier version wrote the file."""
    stats: LatentStats
    """Normalisation of its latents."""
    grid: Annotated[tuple[Annotated[int, Field(ge=1, le=2**16)], ...], Len(1, 2)] | None
    """How its latent positions fold back; none where their number is for the model to say, or
    where there are none."""
    classes: tuple[str, ...]
    """Names of the classes, after whose tokens one stands for none; of a model that reads text
    the speakers that it learned from."""
    text_sha256: str | None = None
    """Of ``text.json``, where the model reads text."""
    speech: SpeechBounds | None = None
    """Of a text-to-speech model."""
    max_length: int | None = Field(default=None, ge=1)
    """Elements of a document at most, as a model of text and images has learned."""
    tokenizer_sha256: str | None
    """Of the weights of the tokenizer whose latents it learned; none of a model of text alone."""
    sampler: SamplerConfig = SamplerConfig()
    """Settings that sampling uses where the user says nothing."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Data, recipe, steps, figures and versions of the training run."""

    @property
    def task(self) -> Literal["classes", "speech", "multimodal"]:
        """What the model is for: images of classes, text to speech, or text and images."""
        if self.text_sha256 is None:
            return "classes"
        return "multimodal" if self.speech is None else "speech"

    @model_validator(mode="after")
    def _check(self) -> "GeneratorExport":
        if self.text_sha256 is None and self.speech is not None:
            raise ValueError("a text-to-speech model needs a text_sha256")
        if (self.task == "multimodal") != (self.max_length is not None):
            raise ValueError("max_length is that of a model of text and images")
        if isinstance(self.model, TransfusionConfig):
            if self.task != "multimodal":
                raise ValueError("a Transfusion is a model of text and images")
            if self.grid is not None and self.model.num_latents != self.num_latents:
                raise ValueError(f"num_latents {self.model.num_latents} is not that of the grid")
        if self.task != "classes":
            if isinstance(self.model, DiTConfig):
                raise ValueError("a DiT reads no text")
            if isinstance(self.model, LatentLMConfig) and not self.model.predicts_text:
                raise ValueError("a model that reads text is one that predicts text")
            if self.task == "multimodal" and (self.grid is None) != (self.tokenizer_sha256 is None):
                raise ValueError("grid and tokenizer_sha256 go together")
            return self
        if self.grid is None or self.tokenizer_sha256 is None:
            raise ValueError("a class-conditional model needs a grid and a tokenizer")
        if self.model.vocab_size != len(self.classes) + 1:
            raise ValueError(
                f"{len(self.classes)} classes and a null class need a vocabulary of "
                f"{len(self.classes) + 1}, not {self.model.vocab_size}"
            )
        return self

    def require_classes(self) -> None:
        """Refuse a model that is not class-conditional.

        Raises:
            ArtifactError: it is a model of speech, or of text and images.
        """
        if self.task == "speech":
            raise ArtifactError(
                "This is a text-to-speech model, which has no classes.",
                hint='Give it something to say: latentlm sample --text "three one four"',
            )
        if self.task == "multimodal":
            raise ArtifactError(
                "This is a model of text and images, which has no classes.",
                hint=f"It takes {SAMPLE_OPTIONS[self.task]}.",
            )

    @property
    def fixed_grid(self) -> tuple[int, ...]:
        """The grid of a model of images.

        Raises:
            ArtifactError: it is a model of speech, or of text alone.
        """
        if self.grid is None:
            raise ArtifactError("This model has learned no images.")
        return self.grid

    @property
    def num_latents(self) -> int:
        """T of a model of images."""
        return math.prod(self.fixed_grid)


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


def export_kind(folder: Path) -> str | None:
    """The kind of export that a folder holds, or None."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (ArtifactError, CorruptFileError):
        return None
    if not isinstance(config, dict) or config.get("format") != "latentlm":
        return None
    return str(config.get("kind"))


def read_config(folder: Path, kind: type[C]) -> C:
    """Read the ``config.json`` of an export of this kind.

    Raises:
        ArtifactError: it is not there, not one of ours, or of another kind.
        CorruptFileError: it is damaged.
    """
    path = folder / CONFIG_FILE
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != "latentlm":
        raise ArtifactError(f"{path} does not describe an export of latentlm.")
    expected = kind.model_fields["kind"].default
    if data.get("kind") != expected:
        told = f"{folder} holds a {data.get('kind')}, where a {expected} is wanted"
        raise ArtifactError(f"{told}, as its {CONFIG_FILE} says.")
    seal = data.pop(SEAL, None)
    try:
        config = build(kind, data, str(path))
    except ConfigError as error:
        raise CorruptFileError(str(error), hint=AGAIN) from None
    check_seal(path, data, seal)
    return config


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
