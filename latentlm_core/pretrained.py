"""Language models that exist, as the start of a LatentLM: Llama, Mistral, Qwen2 and Qwen3.

A folder of theirs, here or on the hub, holds config.json and safetensors.

Notable choices:
    names and shapes of all tensors are compared with config.json before one is read;
    published heads turn the halves of a vector against each other, ours its neighbours: the rows
    of queries and keys, their biases and the weights of their norms are reordered;
    the final norm and the softmax head are ``text_norm`` and ``text_head``; where the published
    head is tied to the embedding, both of ours start from it and then go their own ways;
    tensors go into the model one at a time, so that no second copy of it is held.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import CONFIG_FILE, read_json, sha256_file
from latentlm_core.hub import download, is_hub_id
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.published_lm import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    Part,
    PublishedLMConfig,
    expected_tensors,
)
from latentlm_core.weight_files import WeightFiles

PATTERNS = (
    CONFIG_FILE,
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What is fetched of a repository; some hold their weights a second time under other names."""

_BUFFER = "rotary_emb.inv_freq"
"""Old files hold the wavelengths, which follow from rope_theta."""


@dataclass(frozen=True, slots=True)
class PretrainedBackbone:
    """A language model that was found whole; its weights are still on disk.

    Attributes:
        folder: where it lies; its tokenizer.json lies there too, if it has one.
        config: of the backbone.
        vocab_size: rows of its embedding.
        context_length: the longest context that it learned.
        tied: whether its embedding was its softmax head too.
        weights: where its tensors lie.
    """

    folder: Path
    config: TransformerConfig
    vocab_size: int
    context_length: int
    tied: bool
    weights: WeightFiles

    @torch.no_grad()
    def load_into(self, model: LatentLM, num_text_ids: int) -> None:
        """Give a new model the backbone, the final norm, and the rows of the text ids.

        Rows of the embedding and of the softmax head from ``num_text_ids`` on (marks), the
        embedding of latents and the diffusion head stay as they are.

        Args:
            model: predicts text, with this ``config``.
            num_text_ids: of the text tokenizer.

        Raises:
            ConfigError: the model is another, or the tokenizer has more ids than the checkpoint.
            ArtifactError: a file is no longer there.
            CorruptFileError: a file is damaged.
        """
        self._check(model, num_text_ids)
        own = model.state_dict()
        targets = expected_tensors(self.config, self.vocab_size, self.tied)
        for name, tensor in self.weights.tensors(targets):
            count = num_text_ids if name in (EMBEDDING, HEAD) else len(tensor)
            for part in targets[name]:
                rows = _neighbours(tensor, self.config.head_dim) if part.is_turned else tensor
                own[part.target][part.start : part.start + count].copy_(rows[:count])

    def provenance(self) -> dict[str, Any]:
        """Where the weights came from, with the SHA-256 of each file: what a run writes down."""
        names = expected_tensors(self.config, self.vocab_size, self.tied)
        files = (CONFIG_FILE, *self.weights.files(names))
        return {
            "source": str(self.folder),
            "sha256": {name: sha256_file(self.folder / name) for name in files},
        }

    def _check(self, model: LatentLM, num_text_ids: int) -> None:
        theirs, ours = model.config.backbone.to_dict(), self.config.to_dict()
        other = [name for name in ours if ours[name] != theirs[name]]
        if other:
            raise ConfigError(
                f"The model's backbone is not that of {self.folder}: {', '.join(other[:3])} differ."
            )
        if not model.config.predicts_text:
            raise ConfigError(
                f"{self.folder} can only start a model that predicts text, which this one does not."
            )
        if num_text_ids > self.vocab_size:
            raise ConfigError(
                f"The text tokenizer has {num_text_ids} ids, but {self.folder} has an embedding "
                f"for {self.vocab_size} only."
            )


def read_backbone(spec: str | Path) -> PretrainedBackbone:
    """Find a language model and hold its weights to its config.json; no tensor is read yet.

    Args:
        spec: a folder, or a hub id (``hf:ORG/NAME`` says that it is one).

    Raises:
        ArtifactError: there is none, our networks cannot represent it, or weights are missing, too
            many or of other shapes.
        CorruptFileError: a file is damaged.
    """
    folder = Path(spec)
    if not folder.exists() and is_hub_id(str(spec)):
        folder = download(str(spec), patterns=PATTERNS)
    published, config = _read_config(folder / CONFIG_FILE)
    tied = published.tie_word_embeddings
    weights = WeightFiles.in_folder(folder)
    _compare(weights, expected_tensors(config, published.vocab_size, tied))
    return PretrainedBackbone(
        folder, config, published.vocab_size, published.max_position_embeddings, tied, weights
    )


def _read_config(path: Path) -> tuple[PublishedLMConfig, TransformerConfig]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path} must hold an object, not a {type(data).__name__}.")
    names = data.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES):
        raise ArtifactError(
            f"{path} describes {_shown(names)}, where one of {', '.join(ARCHITECTURES)} is wanted."
        )
    known = {name: data[name] for name in data.keys() & PublishedLMConfig.model_fields.keys()}
    try:
        published = build(PublishedLMConfig, known | {"architecture": names[0]}, str(path))
        return published, published.ours()
    except ConfigError as error:
        raise ArtifactError(str(error)) from None


def _shown(architectures: Any) -> str:
    return ascii(architectures)[:80] if architectures else "no architecture"


def _compare(weights: WeightFiles, expected: dict[str, list[Part]]) -> None:
    """Refuse weights that are not those of the configuration, by their names."""
    found = {name for name in weights.places if not name.endswith(_BUFFER)}
    shapes = weights.shapes(expected.keys() & found)
    faults = {
        "missing": expected.keys() - found,
        "unknown": found - expected.keys() - {HEAD},
        "of another shape": {n for n, shape in shapes.items() if shape != expected[n][0].shape},
    }
    told = [
        f"{len(names)} {fault} ({', '.join(ascii(name)[:80] for name in sorted(names)[:3])})"
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise ArtifactError(
            f"The tensors in {weights.folder} do not fit its {CONFIG_FILE}: {', '.join(told)}."
        )


def _neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of heads (N * H, ...), so that i and i + H / 2 become neighbours."""
    halves = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).flatten(0, 2)
