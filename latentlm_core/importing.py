"""Published speech tokenizers as exports of ours: the acoustic tokenizer of VibeVoice.

A folder of VibeVoice's holds config.json, of a whole model or of the tokenizer alone, and weights
in model.safetensors or in shards that model.safetensors.index.json lists.

Notable choices:
    what config.json leaves out has the published defaults (configuration_vibevoice.py); what our
    networks cannot represent is refused by the name of its field;
    nothing is trusted: sizes are bounded, networks are compared with the weights before memory is
    taken for them, shards lie in the folder itself, and those without our tensors stay closed;
    weights become float32, as all exports have them, whatever they were published in.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from latentlm_core.artifacts import save_tokenizer
from latentlm_core.config import Config, build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.export_config import TokenizerExport
from latentlm_core.files import CONFIG_FILE, read_json, read_sealed_json, sha256_file
from latentlm_core.published import vibevoice_tokenizer_weights
from latentlm_core.runtime import versions
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig
from latentlm_core.tokenizers.speech import CausalConvConfig
from latentlm_core.weight_files import WeightFiles

MODEL_TYPE = "vibevoice_acoustic_tokenizer"
"""What the config.json of the tokenizer alone says of itself."""
NESTED = "acoustic_tokenizer_config"
"""Where the config.json of a whole model keeps the same."""

_HALVES = ("encoder", "decoder")
_PREFIXES = ("model.acoustic_tokenizer.", "acoustic_tokenizer.", "")
_WHOLE_HINT = "microsoft/VibeVoice-1.5B holds both halves, under the published names."
_KINDS = {
    "gaussian": PosteriorKind.GAUSSIAN,
    "fix": PosteriorKind.FIXED,
    "none": PosteriorKind.NONE,
}


def _parse_depths(value: Any) -> Any:
    return tuple(map(int, value.split("-"))) if isinstance(value, str) else value


def _mirrored(value: Any, expected: Any) -> Any:
    """The decoder's ``value``, if it is none or what the encoder, if it was readable, asks for."""
    if value is not None and expected and value != expected:
        raise ValueError(f"the decoder must mirror the encoder, which asks for {expected}")
    return value


Ratios = Annotated[
    tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=12)
]
Depths = Annotated[tuple[Annotated[int, Field(ge=0, le=99)], ...], BeforeValidator(_parse_depths)]
Width = Annotated[int, Field(ge=1, le=4096)]


class PublishedConfig(Config):
    """What of ``VibeVoiceAcousticTokenizerConfig`` decides the networks, as far as ours go."""

    channels: Literal[1] = 1
    """Of the audio."""
    corpus_normalize: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Must be off."""
    causal: Literal[True] = True
    """Whether outputs see the past alone."""
    mixer_layer: Literal["depthwise_conv"] = "depthwise_conv"
    """Of the blocks."""
    conv_norm: Literal["none"] = "none"
    """Norm of the convolutions' weights or outputs."""
    conv_bias: Literal[True] = True
    """Of all convolutions and Linears."""
    pad_mode: Literal["constant"] = "constant"
    """What stands before the first sample."""
    kernel_size: Literal[7] = 7
    """Of the stem."""
    last_kernel_size: Literal[7] = 7
    """Of the head."""
    layernorm: Literal["RMSNorm"] = "RMSNorm"
    """Norm of the blocks."""
    layernorm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    """Added to the mean square."""
    disable_last_norm: Literal[True] = True
    """Whether there is none before the head."""
    layer_scale_init_value: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Where the residuals' factors start; without any, at 0."""
    vae_dim: Width = 64
    """C."""
    fix_std: Annotated[float, Field(ge=0, lt=1e6)] = 0.5
    """C_sigma."""
    std_dist_type: Literal["gaussian", "fix", "none"] = "gaussian"
    """How sigma is drawn."""
    encoder_n_filters: Width = 32
    """Width of the level nearest to the samples."""
    encoder_ratios: Ratios = (8, 5, 5, 4, 2, 2)
    """Strides, from the latents on."""
    encoder_depths: Depths = Field(default=(3, 3, 3, 3, 3, 3, 8), validate_default=True)
    """Blocks, from the samples on; published as "3-3-3-3-3-3-8"."""
    decoder_n_filters: Width = Field(default=32, validate_default=True)
    """As the encoder's."""
    decoder_ratios: Ratios | None = None
    """As the encoder's."""
    decoder_depths: Depths | None = None
    """As the encoder's, reversed."""

    @field_validator("encoder_depths")
    @classmethod
    def _fit_the_ratios(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        ratios = info.data.get("encoder_ratios", value[1:])
        if len(value) != len(ratios) + 1:
            raise ValueError(f"there must be one more than encoder_ratios {list(ratios)}")
        return value

    @field_validator("decoder_n_filters", "decoder_ratios")
    @classmethod
    def _is_as_the_encoder(cls, value: Any, info: ValidationInfo) -> Any:
        return _mirrored(value, info.data.get(str(info.field_name).replace("decoder", "encoder")))

    @field_validator("decoder_depths")
    @classmethod
    def _is_reversed(cls, value: Any, info: ValidationInfo) -> Any:
        return _mirrored(value, info.data.get("encoder_depths", ())[::-1])

    def ours(self) -> SigmaVAEConfig:
        """The same tokenizer as we write it."""
        return SigmaVAEConfig(
            latent_channels=self.vae_dim,
            posterior=LatentPosteriorConfig(kind=_KINDS[self.std_dist_type], std=self.fix_std),
            network=CausalConvConfig(
                base_channels=self.encoder_n_filters,
                strides=self.encoder_ratios[::-1],
                num_blocks=self.encoder_depths,
                layer_scale=self.layer_scale_init_value,
                norm_eps=self.layernorm_eps,
            ),
        )


def is_vibevoice(folder: Path) -> bool:
    """Whether a folder's config.json describes an acoustic tokenizer of VibeVoice's."""
    try:
        return _acoustic_part(read_json(folder / CONFIG_FILE)) is not None
    except (ArtifactError, CorruptFileError):
        return False


def import_vibevoice(folder: Path, export: Path) -> None:
    """Write an export, whole or not at all, of the acoustic tokenizer that a folder holds.

    Args:
        folder: config.json and weights, of a whole model or of the tokenizer alone.
        export: is replaced where it exists.

    Raises:
        ArtifactError: our networks cannot represent it, or weights are missing or do not fit.
        CorruptFileError: a file is damaged.
    """
    config = _read_config(folder)
    files, tensors = _read_weights(folder)
    with torch.device("meta"):
        model = build_tokenizer(config)
    _assign(model, vibevoice_tokenizer_weights(tensors), folder)
    provenance = {
        "imported": "acoustic tokenizer of VibeVoice",
        "source": str(folder),
        "sha256": {name: sha256_file(folder / name) for name in (CONFIG_FILE, *files)},
        "versions": versions(),
    }
    save_tokenizer(export, model, TokenizerExport(tokenizer=config, provenance=provenance))


def is_import_of(export: Path, folder: Path) -> bool:
    """Whether an export was imported from files with the content that ``folder`` has now.

    Raises:
        ArtifactError: the export cannot be read.
        ConfigError: it is not one of a tokenizer.
        CorruptFileError: its config.json is damaged.
    """
    path = export / CONFIG_FILE
    files = build(TokenizerExport, read_sealed_json(path), str(path)).provenance.get("sha256", {})
    return bool(files) and all(
        (folder / name).is_file() and sha256_file(folder / name) == sha256
        for name, sha256 in files.items()
    )


def _acoustic_part(config: Any) -> dict[str, Any] | None:
    if not isinstance(config, dict):
        return None
    part = config if config.get("model_type") == MODEL_TYPE else config.get(NESTED)
    return part if isinstance(part, dict) else None


def _read_config(folder: Path) -> SigmaVAEConfig:
    path = folder / CONFIG_FILE
    data = _acoustic_part(read_json(path))
    if data is None:
        raise ArtifactError(f"{path} does not describe an acoustic tokenizer of VibeVoice.")
    if "downsampling_ratios" in data:
        raise ArtifactError(
            f"{path}: downsampling_ratios is a field of the Transformers library's version, whose "
            "weights have other names than the published ones.",
            hint=_WHOLE_HINT,
        )
    known = {name: data[name] for name in data.keys() & PublishedConfig.model_fields.keys()}
    try:
        return build(PublishedConfig, known, str(path)).ours()
    except ConfigError as error:
        raise ArtifactError(str(error)) from None


def _read_weights(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the files that were read, and the tokenizer's tensors without their prefix."""
    weights = WeightFiles.in_folder(folder)
    own = _own_names(weights.places)
    for half in _HALVES:
        if not any(name.startswith(f"{half}.") for name in own.values()):
            raise ArtifactError(
                f"{folder} holds no {half} of the acoustic tokenizer.", hint=_WHOLE_HINT
            )
    tensors = {own[name]: tensor for name, tensor in weights.tensors(own)}
    return weights.files(own), tensors


def _own_names(names: Collection[str]) -> dict[str, str]:
    """Names of the tokenizer's tensors without their prefix, by those in the files."""
    for prefix in _PREFIXES:
        starts = tuple(f"{prefix}{half}." for half in _HALVES)
        own = {name: name.removeprefix(prefix) for name in names if name.startswith(starts)}
        if own:
            return own
    return {}


def _assign(model: SigmaVAE, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a network without memory its weights."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        raise ArtifactError(
            f"The weights in {folder} do not fit its {CONFIG_FILE}: {len(wrong)} tensors of the "
            f"acoustic tokenizer differ, {', '.join(wrong[:3])} among them."
        )
    model.load_state_dict(weights, assign=True)
