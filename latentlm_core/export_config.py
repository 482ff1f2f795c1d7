"""``config.json`` of an export: what its weights are, and whether that can be.

A tokenizer's says how its networks are built; a generator's holds, beside its network, all that
sampling needs to know: normalisation, grid, classes, bounds. Both say what run they come from.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import Field, model_validator

from latentlm_core.config import C, Config, build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import CONFIG_FILE, SEAL, check_seal, read_json
from latentlm_core.models.dit import DiTConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transfusion import TransfusionConfig
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig

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


def export_kind(folder: Path) -> str | None:
    """The kind of export that a folder holds, or None."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (ArtifactError, CorruptFileError):
        return None
    if not isinstance(config, dict) or config.get("format") != "latentlm":
        return None
    return str(config.get("kind"))
