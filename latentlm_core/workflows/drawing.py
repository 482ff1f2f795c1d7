"""From a generator's export to images: requests, latents, raw latents, media.

Notable choices: a decoder takes a bounded number of pixels at once, for it needs more memory than
what was drawn with. Its weights are float32; beside a generator in bfloat16 on a GPU it multiplies
in bfloat16, which an image of 8 bits hardly shows.

Axes: B images, T latent positions, C latent channels, S image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentlm_core.artifacts import LoadedGenerator, load_tokenizer
from latentlm_core.data.media import to_images
from latentlm_core.errors import ArtifactError
from latentlm_core.files import TOKENIZER_FOLDER
from latentlm_core.progress import Progress
from latentlm_core.runtime import derive_seed, evaluating
from latentlm_core.sampling import Engine, Request
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.workflows.workspace import find_export

Images = npt.NDArray[np.uint8]

MAX_PIXELS = 1 << 20
"""That are decoded at once: 16 images of 256x256."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A generator with the tokenizer whose latents it learned.

    Attributes:
        loaded: the generator.
        tokenizer: its decoder is used.
    """

    loaded: LoadedGenerator
    tokenizer: SigmaVAE

    @classmethod
    def of(
        cls, loaded: LoadedGenerator, vae: str | None, device: torch.device, progress: Progress
    ) -> Self:
        """With the tokenizer in the generator's export, or with another copy of it.

        Raises:
            ArtifactError: it is a text-to-speech model, or the tokenizer is not there, or its
                weights are other ones.
        """
        loaded.config.require_classes()
        return cls(loaded, matching_tokenizer(loaded, vae, device, progress))

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.tokenizer.image_size

    def images(
        self, engine: Engine, labels: Sequence[int], indices: Sequence[int], seed: int
    ) -> Images:
        """Some samples of a set.

        Args:
            engine: of the generator.
            labels: the class of each sample.
            indices: the index of each.
            seed: of the whole set; a sample's own follows from it and its index.

        Returns:
            uint8 (len(indices), H, W, 3).

        Raises:
            ArtifactError: the model drew values that are not finite.
        """
        config = self.loaded.config
        requests = [
            Request(
                prompt=(label,),
                unconditional=(len(config.classes),),
                num_latents=config.num_latents,
                seed=derive_seed(seed, "sample", index),
            )
            for label, index in zip(labels, indices, strict=True)
        ]
        latents = engine.generate(requests)
        if not latents.isfinite().all():
            raise ArtifactError(f"{self.loaded.folder} drew latents that are not finite.")
        return decode_images(self.loaded, self.tokenizer, latents)


def decode_images(loaded: LoadedGenerator, tokenizer: SigmaVAE, latents: Tensor) -> Images:
    """Normalised latents (B, T, C) of a generator => images uint8 (B, S, S, 3)."""
    config = loaded.config
    device = next(tokenizer.parameters()).device
    is_half = next(loaded.model.parameters()).dtype == torch.bfloat16 and device.type == "cuda"
    raw = config.stats.denormalise(latents).to(device)
    with evaluating(tokenizer), torch.autocast(device.type, torch.bfloat16, enabled=is_half):
        parts = [
            to_images(tokenizer.decode(part, config.fixed_grid).float())
            for part in torch.split(raw, max(1, MAX_PIXELS // tokenizer.image_size**2))
        ]
    return np.concatenate(parts)


def matching_tokenizer(
    loaded: LoadedGenerator, vae: str | None, device: torch.device, progress: Progress
) -> SigmaVAE:
    """The tokenizer in a generator's export, or another copy of it.

    Raises:
        ArtifactError: it is not there, or its weights are other ones.
    """
    inside = loaded.folder / TOKENIZER_FOLDER
    folder = find_export(vae, "sigma-vae", progress) if vae else inside
    found = load_tokenizer(folder, device)
    if found.sha256 != loaded.config.tokenizer_sha256:
        raise ArtifactError(
            f"{folder} is not the tokenizer that {loaded.folder} learned with: its weights "
            f"have the sha256 {found.sha256[:12]}, not {str(loaded.config.tokenizer_sha256)[:12]}."
        )
    return found.model
