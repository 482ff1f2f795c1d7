"""From the export of a model of text and images to documents: prompts, requests, words, images.

Axes: T latents of an image, C latent channels, S image size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from latentlm_core.artifacts import LoadedGenerator
from latentlm_core.data.base import Image
from latentlm_core.data.document_format import DocumentFormat, ImageSpan, TextSpan
from latentlm_core.data.documents import Document
from latentlm_core.data.media import center_crop, to_tensor
from latentlm_core.draws import Draws
from latentlm_core.errors import ArtifactError, DataError
from latentlm_core.export_config import SAMPLE_OPTIONS, GeneratorExport
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import derive_seed, evaluating, generator
from latentlm_core.sampling import (
    Continuation,
    ContinuationListener,
    ContinuationRequest,
    InterleavedEngine,
    Mode,
    Prompt,
    SamplerConfig,
    TextSamplerConfig,
    TransfusionEngine,
)
from latentlm_core.tokenizers.base import LatentPosterior
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.tokenizers.text import TextTokenizer
from latentlm_core.workflows.drawing import decode_images, matching_tokenizer

Engine = InterleavedEngine | TransfusionEngine


class Question(NamedTuple):
    """A question about the images before it."""

    text: str


@dataclass(frozen=True, slots=True)
class Task:
    """A document to go on with.

    Attributes:
        pieces: what is there: words, questions and images uint8 (H, W, 3).
        name: what it is called in messages.
        label: a few words for the names of folders.
        draw: whether an image is to begin at once.
        num_tokens: tokens to write at most.
        num_images: images to draw at most.
    """

    pieces: tuple[str | Question | Image, ...]
    name: str
    label: str = ""
    draw: bool = False
    num_tokens: int = 0
    num_images: int = 0

    @property
    def images(self) -> list[Image]:
        """Those among the pieces."""
        return [piece for piece in self.pieces if not isinstance(piece, str | Question)]


@dataclass(frozen=True, slots=True)
class Writing:
    """A model of text and images with its tokenizers.

    Attributes:
        loaded: the generator.
        model: its network.
        text: its text tokenizer.
        tokenizer: of images; None of a model of text alone.
    """

    loaded: LoadedGenerator
    model: LatentLM | Transfusion
    text: TextTokenizer
    tokenizer: SigmaVAE | None

    @classmethod
    def of(
        cls, loaded: LoadedGenerator, vae: str | None, device: torch.device, progress: Progress
    ) -> Self:
        """With the tokenizer in the generator's export, or with another copy of it.

        Raises:
            ArtifactError: it is another kind of model, or the tokenizer is not there, or its
                weights are other ones.
        """
        config, text, model = loaded.config, loaded.text, loaded.model
        require_pages(config, loaded.folder)
        assert text is not None
        assert not isinstance(model, DiT)
        tokenizer = None
        if config.tokenizer_sha256 is not None:
            tokenizer = matching_tokenizer(loaded, vae, device, progress)
        return cls(loaded, model, text, tokenizer)

    @property
    def format(self) -> DocumentFormat:
        """How documents are written."""
        return DocumentFormat(self.text, self.model.config.latent_channels)

    @property
    def max_length(self) -> int:
        """Elements of a document at most."""
        return self.loaded.config.max_length or 0

    @property
    def num_latents(self) -> int:
        """T; 0 of a model of text alone."""
        return 0 if self.tokenizer is None else self.loaded.config.num_latents

    def engine(
        self,
        config: SamplerConfig,
        text_config: TextSamplerConfig,
        mode: Mode = "auto",
        num_steps: int = 0,
        progress: Progress = SILENT,
    ) -> Engine:
        """An engine.

        Args:
            config: how latents are drawn.
            text_config: how tokens are chosen.
            mode: how the decode step of a LatentLM runs.
            num_steps: decode steps that are expected in all.
            progress: hears why a mode cannot be had.
        """
        marks = self.text.marks
        if isinstance(self.model, Transfusion):
            return TransfusionEngine(self.model, config, text_config, marks)
        return InterleavedEngine(
            self.model, config, text_config, marks, self.num_latents, mode, num_steps, progress
        )

    def num_steps(self, task: Task) -> int:
        """Elements that a task adds to its document at most."""
        num_elements = task.num_tokens + task.num_images * (self.num_latents + 2)
        return min(num_elements, self.max_length)

    def check(self, task: Task) -> None:
        """Refuse what cannot be written.

        Raises:
            ArtifactError: it is about images, and the model knows none.
            DataError: an image is too small, or the document is longer than the model's.
        """
        if self.tokenizer is None and (
            task.num_images or any(not isinstance(piece, str) for piece in task.pieces)
        ):
            raise ArtifactError(
                f"{self.loaded.folder} is a model of text alone, so it has no images.",
                hint="It takes --text-only.",
            )
        for image in task.images:
            self._check_size(image, task.name)
        blank = torch.zeros(self.num_latents, self.model.config.latent_channels)
        self._room(task, self._document(task, [blank] * len(task.images)))

    def write(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        indices: Sequence[int],
        seed: int,
        listener: ContinuationListener | None = None,
    ) -> list[Continuation]:
        """Go on with some documents of a set, all in one batch.

        Args:
            engine: from ``engine``.
            tasks: the documents.
            indices: the index of each within the whole set.
            seed: of the whole set; a document's own follows from it and its index.
            listener: hears each token and each image as it is made.

        Raises:
            ArtifactError: the model drew values that are not finite, or as ``check``.
            DataError: as ``check``.
        """
        for task in tasks:
            self.check(task)
        posteriors = self._encode([image for task in tasks for image in task.images])
        requests = [
            self._request(task, derive_seed(seed, "sample", index), posteriors)
            for task, index in zip(tasks, indices, strict=True)
        ]
        continuations = engine.write(requests, listener)
        drawn = [
            piece for one in continuations for piece in one.pieces if isinstance(piece, Tensor)
        ]
        if not all(piece.isfinite().all() for piece in drawn):
            raise ArtifactError(f"{self.loaded.folder} drew latents that are not finite.")
        return continuations

    def show(self, latents: Sequence[Tensor]) -> Sequence[Image]:
        """Latents (T, C) of images => uint8 (S, S, 3) each."""
        if self.tokenizer is None or not latents:
            return []
        return list(decode_images(self.loaded, self.tokenizer, torch.stack(list(latents))))

    def _request(
        self, task: Task, seed: int, posteriors: Mapping[int, LatentPosterior]
    ) -> ContinuationRequest:
        """The request of a task, its images' latents drawn as they were in training."""
        stats, draws = self.loaded.config.stats, Draws(generator(seed, "image"))
        latents = [
            stats.normalise(posteriors[id(image)].sample(draws).squeeze(0)) for image in task.images
        ]
        document = self._document(task, latents)
        room = self._room(task, document)
        prompt = Prompt(document.ids, document.latents, document.kind, document.position)
        return ContinuationRequest(prompt, seed, min(task.num_tokens, room), task.num_images, room)

    def _document(self, task: Task, latents: Sequence[Tensor]) -> Document:
        """The prompt of a task, given the latents (T, C) of its images."""
        drawn = iter(latents)
        pieces = [self._piece(piece, drawn) for piece in task.pieces]
        if task.draw and not pieces:
            pieces = [self.format.nothing]
        return self.format.prompt(pieces, task.draw)

    def _piece(
        self, piece: str | Question | Image, drawn: Iterator[Tensor]
    ) -> TextSpan | ImageSpan:
        if isinstance(piece, str):
            return TextSpan(self.text.encode(piece))
        if isinstance(piece, Question):
            return self.format.question(piece.text)
        return ImageSpan(next(drawn))

    def _room(self, task: Task, document: Document) -> int:
        """Elements that a document may still grow by."""
        room = self.max_length - len(document)
        if room < (self.num_latents + 1 if task.draw else 1):
            raise DataError(
                f"{task.name} has {len(document)} elements"
                f"{f' and an image {self.num_latents} more' if task.draw else ''}, and the model "
                f"knows documents of {self.max_length} at most.",
                hint="Shorten the prompt, or train with a longer data.row_length.",
            )
        return room

    def _check_size(self, image: Image, name: str) -> None:
        assert self.tokenizer is not None
        size = self.tokenizer.image_size
        if min(image.shape[:2]) < size:
            raise DataError(
                f"An image of {name} is {image.shape[1]}x{image.shape[0]}, and the tokenizer takes "
                f"{size}x{size}; larger ones are cropped."
            )

    def _encode(self, images: Sequence[Image]) -> dict[int, LatentPosterior]:
        """Posteriors by the identity of the image, each of which is encoded once."""
        once = {id(image): image for image in images}
        if self.tokenizer is None or not once:
            return {}
        size, device = self.tokenizer.image_size, next(self.tokenizer.parameters()).device
        crops = np.stack([center_crop(image, size) for image in once.values()])
        with evaluating(self.tokenizer):
            posterior = self.tokenizer.encode(to_tensor(crops).to(device))
        return {key: posterior.one(place) for place, key in enumerate(once)}


def require_pages(config: GeneratorExport, folder: Path) -> None:
    """Refuse what is no model of text and images.

    Raises:
        ArtifactError: saying what it is, and what it takes.
    """
    if config.task != "multimodal":
        what = "class-conditional" if config.task == "classes" else "a text-to-speech model"
        raise ArtifactError(
            f"{folder} is {what}, and this needs a model of text and images.",
            hint=f"Of that model, latentlm sample takes {SAMPLE_OPTIONS[config.task]}.",
        )
