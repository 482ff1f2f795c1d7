"""``latentlm doctor`` of an export: whether its files are whole and fit each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from latentlm_core.artifacts import build_generator, differing_tensors, read_text_tokenizer
from latentlm_core.errors import LatentLMError, MissingExtraError
from latentlm_core.export_config import (
    AGAIN,
    GeneratorExport,
    TokenizerExport,
    export_kind,
    read_config,
)
from latentlm_core.files import CONFIG_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, sha256_file
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.weight_files import open_weights
from latentlm_core.workflows.findings import Finding, fault, listed, ok, unread, within


@dataclass(frozen=True, slots=True)
class Weights:
    """What a file of tensors holds, read one at a time.

    Attributes:
        shapes: by name.
        not_finite: names of the tensors with a value that is NaN or infinite.
    """

    shapes: Mapping[str, tuple[int, ...]]
    not_finite: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Weights":
        """Read every tensor of a file.

        Raises:
            ArtifactError: the file is not there.
            CorruptFileError: it is truncated or no safetensors file.
        """
        shapes, not_finite = {}, []
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118, for it is no mapping
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not tensor.isfinite().all():
                    not_finite.append(name)
        return cls(shapes, tuple(not_finite))


def check_export(folder: Path) -> list[Finding]:
    """Examine the export of a tokenizer or a generator."""
    try:
        config = read_export(folder)
    except LatentLMError as error:
        return [unread("config", error)]
    if isinstance(config, TokenizerExport):
        network = config.tokenizer.network
        with torch.device("meta"):
            vae = build_tokenizer(config.tokenizer)
        made = f"sigma-VAE of {vae.modality}, {network.kind}, C = {vae.latent_channels}"
        return [ok("config", made), check_weights(folder, vae)]
    with torch.device("meta"):
        model = build_generator(config.model)
    return [
        _check_generator(config, folder),
        check_weights(folder, model),
        *_check_text(folder, config),
        *_check_tokenizer(folder, config),
    ]


def read_export(folder: Path) -> TokenizerExport | GeneratorExport:
    """Read ``config.json``, whichever kind of export it describes; errors as ``read_config``."""
    if export_kind(folder) == "sigma-vae":
        return read_config(folder, TokenizerExport)
    return read_config(folder, GeneratorExport)


def check_weights(folder: Path, model: nn.Module) -> Finding:
    """Whether the weights of an export are those of ``model``, and numbers."""
    path = folder / WEIGHTS_FILE
    try:
        weights = Weights.read(path)
    except LatentLMError as error:
        return fault("weights", f"{error} {AGAIN}")
    differing = differing_tensors(model, weights.shapes)
    if differing:
        return fault(
            "weights",
            f"{path} does not fit {CONFIG_FILE}: {listed(differing)} differ. {AGAIN}",
        )
    if weights.not_finite:
        return fault(
            "weights",
            f"{path} has values that are not finite in {listed(weights.not_finite)}. "
            "Go back to a checkpoint from before, with a lower learning rate.",
        )
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    return ok("weights", f"{count:,} values fit and are finite, sha256 {sha256_file(path)[:12]}")


def _check_generator(config: GeneratorExport, folder: Path) -> Finding:
    stats = config.stats
    channels = config.model.latent_channels
    numbers = torch.tensor([*stats.shift, *stats.scale])
    lengths = {len(stats.shift), len(stats.scale)}
    if not numbers.isfinite().all() or min(stats.scale) <= 0 or not lengths <= {1, channels}:
        return fault(
            "config",
            f"{folder / CONFIG_FILE} has no normalisation of {channels} channels: shift "
            f"{stats.shift[:3]}, scale {stats.scale[:3]}. Train on a latent set that is sound.",
        )
    step = config.provenance.get("step")
    trained = "" if step is None else f", trained for {step} steps"
    return ok("config", f"{config.model.kind} for {config.task}, C = {channels}{trained}")


def _check_text(folder: Path, config: GeneratorExport) -> list[Finding]:
    """The text tokenizer of a model that reads text."""
    if config.text_sha256 is None:
        return []
    try:
        text = read_text_tokenizer(folder, config)
    except MissingExtraError as error:
        return [unread("text", error, "warning")]
    except LatentLMError as error:
        return [unread("text", error)]
    return [ok("text", f"{text.vocab_size} ids, as the model has")]


def _check_tokenizer(folder: Path, config: GeneratorExport) -> list[Finding]:
    """The tokenizer whose latents a generator learned."""
    if config.tokenizer_sha256 is None:
        return []
    inside = folder / TOKENIZER_FOLDER
    findings = within("tokenizer", check_export(inside))
    if any(finding.state == "fault" for finding in findings):
        return findings
    return [*findings, _check_fit(inside, config)]


def _check_fit(inside: Path, config: GeneratorExport) -> Finding:
    export = read_export(inside)
    what = "tokenizer fit"
    if not isinstance(export, TokenizerExport):
        return fault(what, f"{inside} holds a {export.kind}. Copy the tokenizer's export there.")
    if sha256_file(inside / WEIGHTS_FILE) != config.tokenizer_sha256:
        return fault(
            what,
            f"{inside} is another tokenizer than the one whose latents the model learned "
            f"({str(config.tokenizer_sha256)[:12]}). Copy the one of its latent set.",
        )
    channels = export.tokenizer.latent_channels
    if channels != config.model.latent_channels:
        return fault(
            what,
            f"{inside} has {channels} latent channels, the model {config.model.latent_channels}. "
            "Train the model on latents of this tokenizer.",
        )
    return ok(what, "it is the one whose latents the model learned")
