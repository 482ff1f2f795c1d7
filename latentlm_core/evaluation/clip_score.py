"""How well images fit their prompts, by CLIP (Hessel et al. 2021): 100 max(cos, 0), the mean.

Notable choices:
- The score is that of text-to-image papers: cosines times 100, without CLIPScore's factor of 2.5.
- It belongs to its encoder, whose name and commit go into reports; encoders do not compare. The
  default is the one that most papers use.
- Only safetensors are loaded, and no code of the repository is run. Images are resized and
  normalised by the encoder's own preprocessor, and prompts are cut at its longest text (77 tokens).

Axes: N images, H W image, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from latentlm_core.data.base import Image
from latentlm_core.errors import ArtifactError, DataError, MissingExtraError
from latentlm_core.evaluation.image_sets import ImageSet
from latentlm_core.progress import SILENT, Progress

DEFAULT_CLIP = "openai/clip-vit-base-patch16"
BATCH_SIZE = 32


class ClipEncoder(Protocol):
    """What puts images and texts into one space."""

    @property
    def name(self) -> str:
        """The model and which version of it, for reports."""

    def embed_images(self, images: Image) -> Tensor:
        """Images uint8 (N, H, W, 3) => features (N, D), of unit length, on the CPU."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts => features (N, D), of unit length, on the CPU."""


@dataclass(frozen=True, slots=True)
class ClipScore:
    """How well N images fit their prompts.

    Attributes:
        encoder: which CLIP judged them.
        each: 100 max(cos, 0) of each image and its prompt.
    """

    encoder: str
    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The CLIP score, 0 to 100."""
        return sum(self.each) / len(self.each)


def clip_score(
    encoder: ClipEncoder, images: ImageSet, prompts: Sequence[str], progress: Progress = SILENT
) -> ClipScore:
    """Score images against the prompts that they were made from; processes share the batches.

    Raises:
        DataError: no images, not a prompt for each, or an image that cannot be read.
    """
    if not prompts or len(prompts) != len(images):
        raise DataError(
            f"{images.name} must have a prompt for each of its images, not {len(prompts)} "
            f"for {len(images)}."
        )

    def score(first: int, batch: Image) -> list[float]:
        asked = prompts[first : first + len(batch)]
        cosines = (encoder.embed_images(batch) * encoder.embed_texts(asked)).sum(1)
        found: list[float] = (100.0 * cosines.clamp(min=0.0)).tolist()
        return found

    each: list[float] = []
    with progress.bar("CLIP score", len(prompts), "images") as bar:
        for scores in images.map_batches(BATCH_SIZE, score):
            each.extend(scores)
            bar.advance(len(scores))
    return ClipScore(encoder.name, tuple(each))


def load_clip(
    name: str = DEFAULT_CLIP, *, offline: bool = False, device: torch.device | str = "cpu"
) -> ClipEncoder:
    """Load a CLIP of the transformers library.

    Args:
        name: ORG/NAME on the hub, or a folder.
        offline: use only what has been downloaded before.
        device: where it runs.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: its weights cannot be had as safetensors, or it is no CLIP.
    """
    return TransformersClip(name, offline, torch.device(device))


class TransformersClip:
    """A ``CLIPModel`` of the transformers library with its own preprocessor.

    Args:
        name: ORG/NAME on the hub, or a folder.
        offline: use only what has been downloaded before.
        device: where it runs.

    Raises:
        LatentLMError: as ``load_clip``.
    """

    def __init__(self, name: str, offline: bool, device: torch.device) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("transformers", "The CLIP score", "clip") from None
        transformers.utils.logging.disable_progress_bar()
        try:
            network: Any = transformers.CLIPModel.from_pretrained(
                name, use_safetensors=True, local_files_only=offline, dtype=torch.float32
            )
            self._pixels: Any = transformers.CLIPImageProcessor.from_pretrained(
                name, local_files_only=offline
            )
            self._tokens: Any = transformers.AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, local_files_only=offline
            )
        except Exception as error:  # the library, the hub and the transport share no base class
            reason = " ".join(str(error).split())[:160].rstrip(".")
            raise ArtifactError(
                f"The CLIP {name} cannot be loaded ({reason}).",
                hint="Give a folder that holds its safetensors, preprocessor and tokenizer.",
            ) from error
        if "CLIPModel" not in (network.config.architectures or ()):
            raise ArtifactError(f"{name} is no CLIP.")
        self._device = device
        self._network: Any = network.to(device).eval()
        commit = getattr(network.config, "_commit_hash", None)
        self.name = f"hf:{name}" + (f"@{commit[:8]}" if commit else "")

    @torch.inference_mode()
    def embed_images(self, images: Image) -> Tensor:
        """See ``ClipEncoder``."""
        inputs = self._pixels(images=list(images), return_tensors="pt").to(self._device)
        pooled = self._network.vision_model(**inputs).pooler_output
        return F.normalize(self._network.visual_projection(pooled), dim=1).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """See ``ClipEncoder``."""
        inputs = self._tokens(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        pooled = self._network.text_model(**inputs).pooler_output
        return F.normalize(self._network.text_projection(pooled), dim=1).cpu()
