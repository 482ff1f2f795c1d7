"""Next-token diffusion of latents until the model says that they end: speech.

A state predicts the next latent and, through the softmax head, whether there is one: the mark
"latents go on" against the mark "end of data". Rows have prompts of different lengths, made of
tokens and latents; they are padded on the left, so that all of them write at one place of the
cache. A row that has ended takes the next request that waits, so spans of mixed lengths keep the
batch full; once none waits, it leaves the batch. Where the cache is full, what its rows have left
behind is dropped. A span is the same in any company.

Guidance holds for latents alone: whether they end is what the conditional row says. Conditional
and unconditional rows go through one batch, one cache and one head call per solver step.

Axes: B requests, P prompt positions, T latent positions, C latent channels, S solver steps.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.nn.attention import KVCache
from latentlm_core.sampling.base import BOUND, END, LatentSampler, SamplerConfig
from latentlm_core.sampling.prompts import Prompt, read_prompts


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
    ) -> None:
        config.require_constant_guidance(
            "Nobody knows beforehand which latent of speech is the last"
        )
        self.model = model
        self.config = config
        self.batch_size = batch_size
        self.sampler = LatentSampler(model, config)
        self.grid = self.sampler.grid
        self.marks = [go_on, end]

    def draw(self, requests: Sequence[SpanRequest], listener: Listener | None = None) -> list[Span]:
        """Draw every span.

        Args:
            requests: of any lengths, and as many as one likes.
            listener: hears each latent as it is drawn, and may end its span.

        Returns:
            a span for each request, on the host.
        """
        spans: dict[int, Span] = {}
        size = min(self.batch_size or len(requests), len(requests))
        branches = 2 if self.config.is_guided else 1
        with self.sampler.drawing(size * branches):
            batch = _Batch(self, requests, size)
            while batch.rows:
                for row, reason in batch.step(listener):
                    spans[row.index] = Span(torch.stack(row.latents), reason)
        return [spans[index] for index in range(len(requests))]


class _Batch:
    """Rows on their way, their states (B or 2 B, D), the cache behind these, and who waits."""

    def __init__(self, engine: SpanEngine, requests: Sequence[SpanRequest], size: int) -> None:
        self.engine = engine
        self.model, self.sampler = engine.model, engine.sampler
        self.is_guided = engine.config.is_guided
        self.waiting = deque(enumerate(requests))
        self.rows = [self._next_row() for _ in range(size)]
        longest = max(request.num_latents for request in requests)
        prompts = [p for one in requests for p in (one.prompt, one.unconditional)]
        behind = max(len(prompt.ids) for prompt in prompts)
        is_queue = bool(self.waiting)
        # of a queue, twice what a row needs at most, so that rows are seldom moved
        self.state, self.cache = self._read(
            self.rows, (2 * longest + behind) if is_queue else longest
        )

    def step(self, listener: Listener | None) -> list[tuple[_Row, str]]:
        """Draw and feed a latent of every row; the rows that ended with it, and why."""
        latents = self.sampler.draw(self.state, *self._noise(), self.engine.config.guidance_scale)
        if not self.cache.room:
            self.cache.move(-self._least_padding())
        rows = self.sampler.embed(latents).repeat(2 if self.is_guided else 1, 1, 1)
        self.state = self.model.step(rows, self.cache)
        ends = self._ends(self.state[: len(self.rows)])
        ended: dict[int, str] = {}
        for place, (row, latent) in enumerate(zip(self.rows, latents.cpu(), strict=True)):
            row.latents.append(latent)
            heard = listener(row.index, latent) if listener else None
            is_bound = row.place == row.request.num_latents
            if reason := END if ends[place] else heard or (BOUND if is_bound else None):
                ended[place] = reason
        done = [(self.rows[place], reason) for place, reason in ended.items()]
        self._replace(list(ended))
        return done

    def _next_row(self) -> _Row:
        index, request = self.waiting.popleft()
        noise = self.sampler.noise([request])
        return _Row(
            index, request, noise.start[0], None if noise.fresh is None else noise.fresh[:, 0]
        )

    def _noise(self) -> tuple[Tensor, Tensor | None]:
        """What the next latents start from, (B, C), and fresh noise (S, B, C)."""
        start = torch.stack([row.start[row.place] for row in self.rows])
        fresh = [row.fresh[:, row.place] for row in self.rows if row.fresh is not None]
        return start, torch.stack(fresh, dim=1) if fresh else None

    def _ends(self, state: Tensor) -> list[bool]:
        """Whether the latents end after each conditional state (B, D)."""
        go_on, end = self.model.logits(state)[:, self.engine.marks].unbind(1)
        return (end > go_on).tolist()

    def _replace(self, places: list[int]) -> None:
        """Let the next requests take the places of what has ended; drop the places left over."""
        taken = places[: len(self.waiting)]
        if taken:
            for place in taken:
                self.rows[place] = self._next_row()
            self._refill(taken)
        left = set(places[len(taken) :])
        if left:
            going = [place for place in range(len(self.rows)) if place not in left]
            indices = self._with_twins(going)
            self.rows = [self.rows[place] for place in going]
            self.cache.keep(indices)
            self.state = self.state[indices]

    def _refill(self, places: list[int]) -> None:
        """Read the prompts of new rows into the cache."""
        state, cache = self._read([self.rows[place] for place in places], 0)
        if self.cache.length < cache.length:
            self.cache.move(cache.length - self.cache.length)
        indices = self._with_twins(places)
        self.cache.refill(indices, cache)
        self.state = self.state.index_copy(0, indices, state)

    def _read(self, rows: Sequence[_Row], num_more: int) -> tuple[Tensor, KVCache]:
        """The last state of every prompt, (B or 2 B, D), and the cache behind it."""
        prompts = [row.request.prompt for row in rows]
        if self.is_guided:
            prompts += [row.request.unconditional for row in rows]
        return read_prompts(self.model, prompts, num_more)

    def _with_twins(self, places: list[int]) -> Tensor:
        """Indices of rows and of their unconditional ones."""
        twins = [place + len(self.rows) for place in places] if self.is_guided else []
        return torch.tensor([*places, *twins], dtype=torch.int64, device=self.sampler.device)

    def _least_padding(self) -> int:
        """Columns that no row needs any more."""
        assert self.cache.padding is not None
        return int(self.cache.padding.min())
