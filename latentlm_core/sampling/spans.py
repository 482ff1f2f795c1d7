"""Next-token diffusion of latents until the model says that they end: speech.

A state predicts the next latent and, through the softmax head, whether there is one: the mark
"latents go on" against the mark "end of data". Rows have prompts of different lengths, made of
tokens and latents; they are padded on the left, so that all of them write at one place of the
cache. A row that has ended takes the next request that waits, so spans of mixed lengths keep the
batch full; once none waits, it leaves the batch, or is idle where shapes must stay. Where the cache
is full, what its rows have left behind is dropped. A span is the same in any company.

Guidance holds for latents alone: whether they end is what the conditional row says. Conditional
and unconditional rows go through one batch, one cache and one head call per solver step.

Axes: B requests, P prompt positions, T latent positions, C latent channels, S solver steps.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import BOUND, END, LatentSampler, SamplerConfig
from latentlm_core.sampling.decoding import DecodeSteps, Mode
from latentlm_core.sampling.prompts import Prompt

COLUMNS = 128
"""Caches have multiples of it, so that other lengths seldom mean that a step is made anew."""


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """One span of latents to draw.

    Attributes:
        prompt: what conditions it.
        unconditional: what stands in its place in the guidance branch.
        num_latents: largest number of latents; the span ends there whatever the model says.
        seed: decides its noise.
    """

    prompt: Prompt
    unconditional: Prompt
    num_latents: int
    seed: int


@dataclass(frozen=True, slots=True)
class Span:
    """What was drawn for a request.

    Attributes:
        latents: (T, C) float32 normalised latents, at least one.
        ended_by: ``end``, ``bound``, or what the listener said.
    """

    latents: Tensor
    ended_by: str


Listener = Callable[[int, Tensor], str | None]
"""(index of the request, its newest latent (C,)) => why it ends here, None if it may go on."""


@dataclass(slots=True)
class _Row:
    """A span in the making; ``start`` (T, C) and ``fresh`` (S, T, C) are its noise."""

    index: int
    request: SpanRequest
    start: Tensor
    fresh: Tensor | None
    latents: list[Tensor] = field(default_factory=list)

    @property
    def place(self) -> int:
        """How many latents it has."""
        return len(self.latents)


class SpanEngine:
    """Draws spans with a LatentLM that predicts text.

    Args:
        model: the LatentLM.
        config: how latents are drawn.
        go_on: id of the mark for "latents go on".
        end: id of the mark for "end of data".
        batch_size: requests that are drawn side by side, at most; None: all.
        mode: how the decode step runs.
        num_steps: decode steps that are expected in all: what ``auto`` goes by on a CPU.
        progress: hears why a mode cannot be had.

    Raises:
        ConfigError: the guidance schedule needs to know the last latent.
    """

    def __init__(
        self,
        model: LatentLM,
        config: SamplerConfig,
        go_on: int,
        end: int,
        batch_size: int | None = None,
        mode: Mode = "auto",
        num_steps: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        config.require_constant_guidance(
            "Nobody knows beforehand which latent of speech is the last"
        )
        self.model = model
        self.config = config
        self.batch_size = batch_size
        self.sampler = LatentSampler(model, config)
        self.grid = self.sampler.grid
        self.go_on, self.end = go_on, end
        self.steps = DecodeSteps(self.sampler, mode, num_steps, progress, self._ends)

    @property
    def mode(self) -> Mode:
        """See ``DecodeSteps``."""
        return self.steps.mode

    def draw(
        self,
        requests: Sequence[SpanRequest],
        listener: Listener | None = None,
        on_end: Callable[[int, Span], None] | None = None,
    ) -> list[Span]:
        """Draw every span.

        Args:
            requests: of any lengths, and as many as one likes.
            listener: hears each latent as it is drawn, and may end its span.
            on_end: takes the index of a request and its span as soon as this has ended.

        Returns:
            a span for each request, on the host.
        """
        if not requests:
            return []
        spans: dict[int, Span] = {}
        with evaluating(self.model):
            batch = _Batch(self, requests)
            while batch.is_busy:
                for row, reason in batch.advance(listener):
                    spans[row.index] = Span(torch.stack(row.latents), reason)
                    if on_end is not None:
                        on_end(row.index, spans[row.index])
        return [spans[index] for index in range(len(requests))]

    def _ends(self, states: Tensor) -> Tensor:
        """Whether the latents end after each state, (B, D) => (B,)."""
        scores = self.model.logits(states)
        return scores[:, self.end] > scores[:, self.go_on]


class _Batch:
    """Rows on their way, None where one is idle, the step that draws them, and who waits."""

    def __init__(self, engine: SpanEngine, requests: Sequence[SpanRequest]) -> None:
        self.engine = engine
        self.sampler, self.is_guided = engine.sampler, engine.config.is_guided
        self.waiting = deque(enumerate(requests))
        size = min(engine.batch_size or len(requests), len(requests))
        longest = max(request.num_latents for request in requests)
        prompts = [p for one in requests for p in (one.prompt, one.unconditional)]
        behind = max(len(prompt.ids) for prompt in prompts)
        # of a queue, twice what a row needs at most, so that rows are seldom moved
        room = behind + (2 * longest if len(requests) > size else longest)
        room = COLUMNS * math.ceil(room / COLUMNS)
        self.step = engine.steps.get(2 if self.is_guided else 1, size, room)
        self.step.cache.reset()
        self.rows: list[_Row | None] = [None] * self.step.num_requests
        self._refill(list(range(size)))
        self.step.pin()

    @property
    def is_busy(self) -> bool:
        """Whether any row is."""
        return any(self.rows)

    def advance(self, listener: Listener | None) -> list[tuple[_Row, str]]:
        """Draw and feed a latent of every row; the rows that ended with it, and why."""
        if not self.step.cache.room:
            self._make_room()
        latents = self.step(*self._noise(), self.engine.config.guidance_scale).to("cpu", copy=True)
        assert self.step.decided is not None
        ends = self.step.decided.tolist()
        ended: dict[int, tuple[_Row, str]] = {}
        for place, row in enumerate(self.rows):
            if row is None:
                continue
            row.latents.append(latents[place])
            heard = listener(row.index, latents[place]) if listener else None
            is_bound = row.place == row.request.num_latents
            if reason := END if ends[place] else heard or (BOUND if is_bound else None):
                ended[place] = row, reason
        self._replace(list(ended))
        return list(ended.values())

    def _noise(self) -> tuple[Tensor, Tensor | None]:
        """What the next latents start from, (B, C), and fresh noise (S, B, C); idle rows: zero."""
        busy = next(row for row in self.rows if row is not None)
        none = torch.zeros_like(busy.start[0])
        start = torch.stack([none if row is None else row.start[row.place] for row in self.rows])
        if busy.fresh is None:
            return start, None
        no_fresh = torch.zeros_like(busy.fresh[:, 0])
        fresh = [
            no_fresh if row is None or row.fresh is None else row.fresh[:, row.place]
            for row in self.rows
        ]
        return start, torch.stack(fresh, dim=1)

    def _replace(self, places: list[int]) -> None:
        """Let the next requests take the places of what has ended; drop the places left over."""
        for place in places:
            self.rows[place] = None
        if taken := places[: len(self.waiting)]:
            self._refill(taken)
        going = [place for place, row in enumerate(self.rows) if row is not None]
        if self.step.mode == "eager" and len(going) < len(self.rows):
            self.rows = [self.rows[place] for place in going]
            self.step.keep(going)

    def _refill(self, places: list[int]) -> None:
        """Let the next requests begin at some places."""
        taken = [self._next_row() for _ in places]
        for place, row in zip(places, taken, strict=True):
            self.rows[place] = row
        prompts = [row.request.prompt for row in taken]
        if self.is_guided:
            prompts += [row.request.unconditional for row in taken]
        self.step.read(places, prompts)

    def _next_row(self) -> _Row:
        index, request = self.waiting.popleft()
        noise = self.sampler.noise([request])
        return _Row(
            index, request, noise.start[0], None if noise.fresh is None else noise.fresh[:, 0]
        )

    def _make_room(self) -> None:
        """Drop the columns that no row needs any more."""
        cache = self.step.cache
        idle = [place for place, row in enumerate(self.rows) if row is None]
        cache.forget(self.step.indices(idle))
        cache.move(-int(cache.bounds()[0].min()))
