"""The decode step: draw the next latent of every row, feed it, and read what the model says then.

The step is a function of buffers that stay where they are, so it can run in four ways. ``eager`` is
a loop over a cache that grows; ``static`` is the same with a pinned cache, whose shapes never
change; ``compile`` hands the static step to inductor, ``graph`` captures it on a GPU. All draw the
same latents (float32: 1e-4), and none waits for the device within a step.

Notable choices: compiled, the solver is one ``scan`` over its steps, so it costs the compilation of
a single one (unrolled, 20 steps took 140 s where this takes 15), and the whole step is one piece of
C++, where this PyTorch can make that of a scan. A GPU would wait for the host at each turn of a
scan, so there the head alone is compiled, one solver step of it, and the whole is captured. Buffers
outlive a batch: the next one, of as many rows or fewer, is drawn without compiling again. What
cannot be compiled or captured runs eagerly, after one warning.

Axes: R rows of the backbone, B requests, C latent channels, D hidden, S solver steps.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from latentlm_core.nn.matmul import MIN_ROWS, compiled_linear, fast_linear
from latentlm_core.progress import SILENT, Progress
from latentlm_core.sampling.base import LatentSampler
from latentlm_core.sampling.prompts import Prompt, read_prompts

Mode = Literal["auto", "eager", "static", "compile", "graph"]
"""How the decode step runs; ``auto`` is resolved by ``resolve_mode``."""

COMPILE_STEPS = 5_000
"""Decode steps that repay 15 s of compilation, at the 3 ms that each saves with one request."""
COMPILE_STEPS_OF_MANY = 2_500
"""The same from ``MIN_ROWS`` rows on: each saves 6 ms with 64 requests (the demo's sizes)."""
WARM_UPS = 2

Work = Callable[[], None]


def resolve_mode(mode: Mode, device: torch.device, num_rows: int, num_steps: int) -> Mode:
    """What ``auto`` is here.

    Args:
        mode: as asked.
        device: of the model.
        num_rows: R.
        num_steps: decode steps that are expected in all.
    """
    if mode != "auto":
        return mode
    if device.type == "cuda":
        return "graph"
    enough = COMPILE_STEPS_OF_MANY if num_rows >= MIN_ROWS else COMPILE_STEPS
    return "compile" if device.type == "cpu" and num_steps >= enough else "eager"


class DecodeStep:
    """The buffers of B requests, and what is done over them.

    Attributes:
        mode: how it runs.
        fell_back: whether that is eagerly because the mode asked for could not be had.
        state: (R, D) after the newest position of each row.
        cache: what stands before.
        decided: what ``decide`` made of the B conditional rows after the newest step.

    Args:
        sampler: draws the latents.
        num_rows: R, B or 2 B for guidance.
        num_requests: B.
        max_length: positions of the cache.
        mode: how to run, not ``auto``.
        progress: hears why a mode cannot be had.
        decide: of states (B, D), whether latents end or which tokens follow; None: nothing is to
            be decided.
    """

    def __init__(
        self,
        sampler: LatentSampler,
        num_rows: int,
        num_requests: int,
        max_length: int,
        mode: Mode,
        progress: Progress = SILENT,
        decide: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        model, device = sampler.model, sampler.device
        channels, num_fresh = model.config.latent_channels, sampler.grid.num_fresh
        dtype, width = model.latent_embedding.weight.dtype, model.config.backbone.hidden_size
        self.max_length = max_length
        self.mode = mode
        self.fell_back = False
        self.cache = model.backbone.new_cache(num_rows, max_length)
        self.state = torch.zeros(num_rows, width, dtype=dtype, device=device)
        self._sampler, self._progress, self._decide = sampler, progress, decide
        self._x = torch.zeros(num_rows, 1, width, dtype=dtype, device=device)
        self._noise = torch.zeros(num_requests, channels, device=device)
        self._fresh = (
            torch.zeros(num_fresh, num_requests, channels, device=device) if num_fresh else None
        )
        self._scale = torch.ones((), device=device)
        self._latents = torch.zeros(num_requests, channels, device=device)
        self.decided = None if decide is None else decide(self.state[:num_requests])
        self._made: dict[str, Work] = {}

    @property
    def num_requests(self) -> int:
        """B."""
        return self._noise.shape[0]

    @property
    def num_branches(self) -> int:
        """2 with guidance, else 1."""
        return self.state.shape[0] // self.num_requests

    def read(self, rows: list[int], prompts: Sequence[Prompt], least: int = 0) -> None:
        """Let some requests begin, the first or anew.

        Args:
            rows: (B',) their places.
            prompts: B' or, with guidance, 2 B', unconditional ones behind all others.
            least: see ``read_prompts``.
        """
        state, cache = read_prompts(self._sampler.model, prompts, 0, least)
        if self.cache.length < cache.length:
            self.cache.move(cache.length - self.cache.length)
        indices = self.indices(rows)
        self.cache.refill(indices, cache)
        self.state.index_copy_(0, indices, state)
        if self._decide is not None and self.decided is not None:
            self.decided[rows] = self._decide(state[: len(rows)])

    def pin(self) -> None:
        """The prompts are read: let every shape stay from here on, unless the mode is eager."""
        if self.mode != "eager":
            self.cache.pin()

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the requests, eagerly.

        Args:
            rows: (B',) their places.
        """
        indices = self.indices(rows)
        self.cache.keep(indices)
        self.state, self._x = self.state[indices], self._x[indices]
        self._noise, self._latents = self._noise[: len(rows)], self._latents[: len(rows)]
        self._fresh = None if self._fresh is None else self._fresh[:, : len(rows)]
        self.decided = None if self.decided is None else self.decided[rows]

    def indices(self, rows: list[int]) -> Tensor:
        """Indices (B' or 2 B') of some requests' rows and, behind all of them, of their twins."""
        twins = [row + self.num_requests for row in rows] if self.num_branches == 2 else []
        return torch.tensor([*rows, *twins], dtype=torch.int64, device=self._sampler.device)

    def __call__(self, noise: Tensor, fresh: Tensor | None, guidance_scale: float) -> Tensor:
        """Draw the next latents and feed them.

        Args:
            noise: (B, C) where the solver starts.
            fresh: (S, B, C) of a stochastic solver.
            guidance_scale: of this position.

        Returns:
            (B, C) float32, in a buffer that the next call writes again.
        """
        self._noise.copy_(noise)
        if self._fresh is not None and fresh is not None:
            self._fresh.copy_(fresh)
        self._scale.fill_(guidance_scale)
        self._run(self._advance)
        self._count()
        return self._latents

    def draw(
        self, rows: list[int], noise: Tensor, fresh: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Draw the next latents of some requests, and feed nothing.

        Args:
            rows: (B',) places of the requests.
            noise: (B', C) where the solver starts.
            fresh: (S, B', C) of a stochastic solver.
            guidance_scale: of these latents.

        Returns:
            (B', C) float32.
        """
        if self.mode == "eager":
            states = self.state[self.indices(rows)]
            with fast_linear(states, states.shape[0]):
                return self._sampler.draw(states, noise, fresh, guidance_scale)
        self._noise[rows] = noise.to(self._noise.device)
        if self._fresh is not None and fresh is not None:
            self._fresh[:, rows] = fresh.to(self._noise.device)
        self._scale.fill_(guidance_scale)
        self._run(self._draw)
        return self._latents[rows]

    def feed(self, x: Tensor) -> None:
        """Feed what is embedded already, (R, 1, D)."""
        self._x.copy_(x)
        self._run(self._feed)
        self._count()

    def _count(self) -> None:
        if self.cache.place is not None:
            self.cache.count(1)

    def _advance(self) -> None:
        self._draw()
        rows = self._sampler.embed(self._latents)
        self._x.copy_(rows.repeat(self.num_branches, 1, 1))
        self._feed()

    def _draw(self) -> None:
        is_scan = self.mode == "compile" and self._noise.device.type == "cpu"
        draw = self._sampler.draw_scanned if is_scan else self._sampler.draw
        self._latents.copy_(draw(self.state, self._noise, self._fresh, self._scale))

    def _feed(self) -> None:
        self.state.copy_(self._sampler.model.step(self._x, self.cache))
        if self._decide is not None and self.decided is not None:
            self.decided.copy_(self._decide(self.state[: self.num_requests]))

    def release(self) -> None:
        """Let go of what was prepared, which holds this step and its cache."""
        self._made.clear()

    def _run(self, work: Work) -> None:
        """Run a work in the step's mode, for which it is prepared once."""
        if self.mode in ("compile", "graph") and work.__name__ not in self._made:
            self._make(work)
        if run := self._made.get(work.__name__):
            run()
            return
        with fast_linear(self._x, self._x.shape[0]):
            work()

    def _make(self, work: Work) -> None:
        """Compile or capture a work; where that cannot be had, all runs eagerly from then on."""
        kept = self.state.clone()
        try:
            prepare = self._compile if self.mode == "compile" else self._capture
            self._made[work.__name__] = prepare(work)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, AssertionError) as error:
            self._progress.warn(
                f"The decode step could not be {'captured' if self.mode == 'graph' else 'compiled'}"
                f" ({_first_line(error)}), so it runs eagerly: small batches take two to four "
                "times as long."
            )
            self.mode, self.fell_back = "eager", True
            self.release()
            self.cache.unpin()
        self._restore(kept)

    def _restore(self, state: Tensor) -> None:
        """Take back a step that was run to see whether it runs."""
        self.state.copy_(state)
        if self.cache.place is not None:
            self.cache.pin()

    def _compile(self, work: Work) -> Work:
        """The work by inductor, run once to make sure that it is there."""
        if self._x.device.type == "cuda":
            self._sampler.compile_head()
            return self._capture(work)

        def compiled_work() -> None:
            with compiled_linear(self._x):
                work()

        try:
            return _compiled(compiled_work, {"cpp_wrapper": True})
        except RuntimeError:  # PyTorch 2.11 cannot do that with a scan
            return _compiled(compiled_work, {})

    def _capture(self, work: Work) -> Work:
        """The work as a CUDA graph; kernels are chosen beforehand, on a stream of their own."""
        state = self.state.clone()
        with torch.cuda.device_of(state):  # type: ignore[no-untyped-call]
            before, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        work()
                        self._restore(state)
                    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                        work()
            finally:
                before.wait_stream(stream)
        return graph.replay


class DecodeSteps:
    """The decode steps of an engine; the last one is kept, for it may fit again.

    Args:
        sampler: draws the latents.
        mode: how steps run.
        num_steps: decode steps that are expected in all: what ``auto`` goes by on a CPU.
        progress: hears why a mode cannot be had.
        decide: see ``DecodeStep``.
    """

    def __init__(
        self,
        sampler: LatentSampler,
        mode: Mode,
        num_steps: int,
        progress: Progress,
        decide: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._sampler, self._mode, self._num_steps = sampler, mode, num_steps
        self._progress, self._decide = progress, decide
        self._latest: DecodeStep | None = None

    @property
    def mode(self) -> Mode:
        """How the latest step ran; before there is one, what was asked for."""
        return self._mode if self._latest is None else self._latest.mode

    def get(self, num_branches: int, num_requests: int, max_length: int) -> DecodeStep:
        """A step with room for so much, or for more where one is compiled already.

        Args:
            num_branches: 2 for guidance, else 1.
            num_requests: B.
            max_length: positions of the cache.
        """
        latest = self._latest
        if latest is not None:
            fits = num_requests <= latest.num_requests and max_length <= latest.max_length
            if latest.mode != "eager" and fits and num_branches == latest.num_branches:
                return latest
            if latest.fell_back:
                self._mode = "eager"  # what could not be had is not tried again
            latest.release()
        self._latest = latest = None  # its cache goes before another one comes
        rows = num_branches * num_requests
        mode = resolve_mode(self._mode, self._sampler.device, rows, self._num_steps)
        self._latest = DecodeStep(
            self._sampler, rows, num_requests, max_length, mode, self._progress, self._decide
        )
        return self._latest


def _compiled(work: Work, options: dict[str, Any]) -> Work:
    """A work by inductor, run once to make sure that it is there."""
    compiled = torch.compile(work, dynamic=False, fullgraph=True, options=options)
    compiled()
    return compiled


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
