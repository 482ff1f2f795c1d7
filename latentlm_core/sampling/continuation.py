"""Documents to go on with, what is added to them, and what engines know of one in the making.

Axes: T latents of an image, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentlm_core.runtime import generator
from latentlm_core.sampling.prompts import Prompt


@dataclass(frozen=True, slots=True)
class ContinuationRequest:
    """A document to go on with.

    Attributes:
        prompt: what is there; it ends in ``bod`` where an image is to begin at once.
        seed: decides noise and choices.
        num_tokens: tokens to write at most, marks not counted; with 0 the document ends with its
            images.
        num_images: images to draw at most.
        room: tokens, latents and the marks around these to add at most, where there is a bound.
    """

    prompt: Prompt
    seed: int
    num_tokens: int = 0
    num_images: int = 0
    room: int | None = None

    def allows(self, num_tokens: int, num_images: int, num_latents: int) -> bool:
        """Whether so many tokens and images, of T latents, may be added in all."""
        num_elements = num_tokens + num_images * (num_latents + 2)
        is_room = self.room is None or num_elements <= self.room
        return is_room and num_tokens <= self.num_tokens and num_images <= self.num_images


@dataclass(frozen=True, slots=True)
class Continuation:
    """What was added to a document.

    Attributes:
        pieces: runs of text ids, and images (T, C) float32 of normalised latents, in their order.
        ended_by: ``end``, of the model or with the last image, or ``bound``, of tokens.
    """

    pieces: tuple[tuple[int, ...] | Tensor, ...]
    ended_by: str


ContinuationListener = Callable[[int, int | Tensor], None]
"""(index of the request, its newest token or image)."""


@dataclass(slots=True, kw_only=True)
class ContinuationDraft:
    """A document in the making.

    Attributes:
        index: of its request.
        request: what is asked.
        num_latents: T.
        num_tokens: written so far.
        num_images: drawn so far.
        pieces: made so far, see ``Continuation``.
        ended_by: empty until it has ended, see ``Continuation``.
        source: of the choice of its tokens.
    """

    index: int
    request: ContinuationRequest
    num_latents: int
    num_tokens: int = 0
    num_images: int = 0
    pieces: list[tuple[int, ...] | Tensor] = field(default_factory=list)
    ended_by: str = ""
    source: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.source = generator(self.request.seed, "words")

    @property
    def may_draw(self) -> bool:
        """Whether another image may begin."""
        return self.request.allows(self.num_tokens, self.num_images + 1, self.num_latents)

    @property
    def may_write(self) -> bool:
        """Whether another token may follow."""
        return self.request.allows(self.num_tokens + 1, self.num_images, self.num_latents)
