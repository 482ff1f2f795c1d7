"""Words and images in one go: the model writes, says itself when an image begins, and draws it.

Each step feeds every row one element: a token or a latent. A row writes tokens until ``bod``, then
draws the latents of an image (their number is known), is given ``eod``, and writes again. Rows do
so independently, in one batch and one cache, padded on the left.

Guidance: the unconditional branch of an image is ``bos null bod`` and the image alone, whatever
stands before it in the document. Its row is at hand all the time; when an image begins, the keys
and values of these marks, which never change, are put before it and all else is hidden.

What is drawn and what is chosen follows from a row's own seed alone.

Axes: B rows, T latents of an image, C latent channels, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import (
    BOUND,
    END,
    LatentSampler,
    Noise,
    SamplerConfig,
    SeededLatents,
)
from latentlm_core.sampling.continuation import (
    Continuation,
    ContinuationDraft,
    ContinuationListener,
    ContinuationRequest,
)
from latentlm_core.sampling.decoding import DecodeStep, DecodeSteps, Mode
from latentlm_core.sampling.prompts import Prompt, read_prompts, token_prompt
from latentlm_core.sampling.words import TextSamplerConfig, choose_tokens
from latentlm_core.tokenizers.text import Marks


class InterleavedEngine:
    """Writes and draws with a LatentLM that predicts text.

    Args:
        model: the LatentLM.
        config: how latents are drawn.
        text_config: how tokens are chosen.
        marks: ids that are no text.
        num_latents: T.
        mode: how the decode step runs.
        num_steps: decode steps that are expected in all: what ``auto`` goes by on a CPU.
        progress: hears why a mode cannot be had.

    Raises:
        ConfigError: the guidance schedule is not constant.
    """

    def __init__(
        self,
        model: LatentLM,
        config: SamplerConfig,
        text_config: TextSamplerConfig,
        marks: Marks,
        num_latents: int,
        mode: Mode = "auto",
        num_steps: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        config.require_constant_guidance("Images stand among text here")
        self.model = model
        self.config = config
        self.text_config = text_config
        self.marks = marks
        self.num_latents = num_latents
        self.sampler = LatentSampler(model, config)
        self.steps = DecodeSteps(self.sampler, mode, num_steps, progress, model.logits)

    @property
    def mode(self) -> Mode:
        """See ``DecodeSteps``."""
        return self.steps.mode

    def write(
        self, requests: Sequence[ContinuationRequest], listener: ContinuationListener | None = None
    ) -> list[Continuation]:
        """Go on with every document until it ends.

        Args:
            requests: of any lengths, each with something to write or to draw.
            listener: hears each token and each image as it is made.

        Returns:
            a document for each request, on the host.
        """
        with evaluating(self.model):
            batch = _Batch(self, requests, listener)
            while batch.is_busy:
                batch.advance()
        return [Continuation(tuple(row.pieces), row.ended_by) for row in batch.all_rows]


@dataclass(slots=True, kw_only=True)
class _Row(ContinuationDraft):
    """A document that is being made.

    ``place`` is the next latent of its image, T once all are fed, None among words.
    """

    place: int | None
    words: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    def finish_words(self) -> None:
        if self.words:
            self.pieces.append(tuple(self.words))
            self.words = []


class _Batch:
    """Rows on their way, and the step that draws and reads for them all."""

    def __init__(
        self,
        engine: InterleavedEngine,
        requests: Sequence[ContinuationRequest],
        listener: ContinuationListener | None,
    ) -> None:
        self.engine = engine
        self.model, self.marks, self.sampler = engine.model, engine.marks, engine.sampler
        self.listener = listener
        self.all_rows = [
            _Row(
                index=index,
                request=request,
                num_latents=engine.num_latents,
                place=0 if int(request.prompt.ids[-1]) == self.marks.bod else None,
            )
            for index, request in enumerate(requests)
        ]
        self.rows = list(self.all_rows)
        draws = any(request.num_images for request in requests)
        self.is_guided = draws and engine.config.is_guided
        self.noise: Noise = self.sampler.noise(
            [SeededLatents(engine.num_latents * one.num_images, one.seed) for one in requests]
        )
        marks, channels = self.marks, self.model.config.latent_channels
        free = token_prompt([marks.bos, marks.null, marks.bod], channels)
        self.free_block = self._block(free) if self.is_guided else None
        self.step = self._begin_step([request.prompt for request in requests], free)

    @property
    def is_busy(self) -> bool:
        """Whether any row goes on."""
        return not all(row.ended_by for row in self.rows)

    def advance(self) -> None:
        """Give every row its next element, drop the rows that ended, feed the others'."""
        latents, tokens = self._draw(), self._choose()
        elements: list[int | Tensor] = [0] * self.step.num_requests
        for place, row in self._going():
            if place in latents:
                elements[place] = self._take_latent(row, latents[place])
            else:
                elements[place] = self._take_token(row, tokens.get(place))
        going = [place for place, _ in self._going()]
        if self.step.mode == "eager" and len(going) < len(self.rows):
            self.rows = [self.rows[place] for place in going]
            elements = [elements[place] for place in going]
            self.step.keep(going)
        if going:
            self._feed(elements)

    def _going(self) -> list[tuple[int, _Row]]:
        """The rows that have not ended, and their places."""
        return [(place, row) for place, row in enumerate(self.rows) if not row.ended_by]

    def _block(self, free: Prompt) -> Tensor:
        """Keys and values of what stands before ``bod`` in the unconditional branch."""
        _, cache = read_prompts(self.model, [free], 0)
        return cache.read(0)[..., :-1, :]

    def _begin_step(self, prompts: list[Prompt], free: Prompt) -> DecodeStep:
        """The step, in which the prompts are read."""
        longest = max(len(free.ids), *(len(prompt.ids) for prompt in prompts))
        more = max(self._num_steps(row.request) for row in self.rows)
        branches = 2 if self.is_guided else 1
        step = self.engine.steps.get(branches, len(prompts), longest + more)
        step.cache.reset()
        unconditional = [free] * len(prompts) if self.is_guided else []
        step.read(list(range(len(prompts))), prompts + unconditional, least=len(free.ids))
        step.pin()
        return step

    def _num_steps(self, request: ContinuationRequest) -> int:
        count = request.num_tokens + request.num_images * (self.engine.num_latents + 2)
        return 1 + (count if request.room is None else min(count, request.room))

    def _draw(self) -> dict[int, Tensor]:
        """The next latent (C,) of every row that is in an image, by the row's place."""
        length = self.engine.num_latents
        drawing = {
            place: row
            for place, row in self._going()
            if row.place is not None and row.place < length
        }
        if not drawing:
            return {}
        columns = [row.num_images * length + (row.place or 0) for row in drawing.values()]
        indices = [row.index for row in drawing.values()]
        fresh = None if self.noise.fresh is None else self.noise.fresh[:, indices, columns]
        drawn = self.step.draw(
            list(drawing),
            self.noise.start[indices, columns],
            fresh,
            self.engine.config.guidance_scale,
        )
        return dict(zip(drawing, drawn, strict=True))

    def _choose(self) -> dict[int, int]:
        """What the model would write next in every row among words, by the row's place."""
        writing = {place: row for place, row in self._going() if row.place is None}
        if not writing:
            return {}
        assert self.step.decided is not None
        tokens = choose_tokens(
            self.step.decided[list(writing)],
            [row.may_draw for row in writing.values()],
            self.marks,
            self.engine.text_config,
            [row.source for row in writing.values()],
        )
        return dict(zip(writing, tokens, strict=True))

    def _take_latent(self, row: _Row, latent: Tensor) -> Tensor:
        row.latents.append(latent)
        row.place = len(row.latents)
        if row.place == self.engine.num_latents:
            image = torch.stack(row.latents).cpu()
            row.latents = []
            row.pieces.append(image)
            row.num_images += 1
            self._tell(row, image)
            if not row.may_write and not row.may_draw:
                row.ended_by = END
        return latent

    def _take_token(self, row: _Row, token: int | None) -> int:
        """The next token of a row: what the model chooses or, where it does not, ``eod``."""
        marks = self.marks
        if token is None:
            row.place = None
            return marks.eod
        if token == marks.eos:
            row.ended_by = END
        elif token == marks.bod:
            row.place = 0
        elif not row.may_write:
            row.ended_by = BOUND
        else:
            row.words.append(token)
            row.num_tokens += 1
            self._tell(row, token)
        if row.ended_by or token == marks.bod:
            row.finish_words()
        return token

    def _feed(self, elements: list[int | Tensor]) -> None:
        """Feed an element of every row, a token or a latent (C,), and of its unconditional twin."""
        device = self.sampler.device
        tokens = [0 if isinstance(element, Tensor) else element for element in elements]
        x = self.model.token_embedding(torch.tensor(tokens, device=device))
        drawn = {place: e for place, e in enumerate(elements) if isinstance(e, Tensor)}
        if drawn:
            places = torch.tensor(list(drawn), device=device)
            latents = self.sampler.embed(torch.stack(list(drawn.values())))
            x = x.index_copy(0, places, latents.squeeze(1).to(x.dtype))
        if self.is_guided:
            x = x.repeat(2, 1)
            self._begin([place for place, row in self._going() if row.place == 0])
        self.step.feed(x.unsqueeze(1))

    def _begin(self, places: list[int]) -> None:
        """Let the unconditional twins of some rows know nothing but that an image begins now."""
        if places and self.free_block is not None:
            twins = torch.tensor(places, device=self.sampler.device) + self.step.num_requests
            self.step.cache.begin(twins, self.free_block)

    def _tell(self, row: _Row, made: int | Tensor) -> None:
        if self.listener is not None:
            self.listener(row.index, made)
