"""The decode step: feed every row one position, then draw its next latent.

The step is a function of buffers that stay where they are, so it can run in four ways. ``eager`` is
a loop over a cache that grows; ``static`` is the same with a pinned cache, whose shapes never
change; ``compile`` hands the static step to inductor, ``graph`` captures it on a GPU. All draw the
same latents (float32: 1e-4), and none waits for the device within a step.

Notable choices: compiled, the solver is one ``scan`` over its steps, so it costs the compilation of
a single one (unrolled, 20 steps took 140 s where this takes 30). A batch smaller than the compiled
one is filled up rather than compiled again. What cannot be compiled or captured runs eagerly, after
one warning.

Axes: R rows of the backbone, B requests, C latent channels, D hidden, S solver steps.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from latentlm_core.nn.matmul import MIN_ROWS, fast_linear
from latentlm_core.progress import Progress
from latentlm_core.sampling.base import LatentSampler

Mode = Literal["auto", "eager", "static", "compile", "graph"]
"""How the decode step runs; ``auto`` is resolved by ``resolve_mode``."""

COMPILE_STEPS = 20_000
"""Decode steps that repay 45 s of compilation, at the 2.3 ms that each saves with one request."""
COMPILE_STEPS_OF_MANY = 4_000
"""The same from ``MIN_ROWS`` rows on: each saves 12 ms with 64 requests (the demo's sizes)."""
WARM_UPS = 2


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
    """The buffers of B requests, and the step over them.

    Args:
        sampler: draws the latents.
        num_rows: R, B or 2 B for guidance.
        num_requests: B.
        max_length: positions of the cache.
        mode: how to run, not ``auto``.
        progress: hears why a mode cannot be had.
    """

    def __init__(
        self,
        sampler: LatentSampler,
        num_rows: int,
        num_requests: int,
        max_length: int,
        mode: Mode,
        progress: Progress,
    ) -> None:
        model, device = sampler.model, sampler.device
        channels, steps = model.config.latent_channels, sampler.grid.num_fresh
        dtype = model.latent_embedding.weight.dtype
        self.sampler = sampler
        self.max_length = max_length
        self.mode = mode
        self.cache = model.backbone.new_cache(num_rows, max_length)
        self.x = torch.zeros(
            num_rows, 1, model.config.backbone.hidden_size, dtype=dtype, device=device
        )
        self.noise = torch.zeros(num_requests, channels, device=device)
        self.fresh = torch.zeros(steps, num_requests, channels, device=device) if steps else None
        self.scale = torch.ones((), device=device)
        self.latents = torch.zeros(num_requests, channels, device=device)
        self._progress = progress
        self._run: Callable[[], None] | None = None

    @property
    def num_requests(self) -> int:
        """B."""
        return self.noise.shape[0]

    def begin(self, x: Tensor) -> None:
        """Forget all, read the prompts (R, P, D) but their last position, which the step feeds."""
        self.cache.reset()
        if x.shape[1] > 1:
            self.sampler.model.step(x[:, :-1], self.cache)
        if self.mode != "eager":
            self.cache.pin()
        self.x.copy_(x[:, -1:])

    def __call__(self, noise: Tensor, fresh: Tensor | None, guidance_scale: float) -> Tensor:
        """The next latents (B, C) float32, in a buffer that the next call writes again.

        Args:
            noise: (B, C) where the solver starts.
            fresh: (S, B, C) of a stochastic solver.
            guidance_scale: of this position.
        """
        self.noise.copy_(noise)
        if self.fresh is not None and fresh is not None:
            self.fresh.copy_(fresh)
        self.scale.fill_(guidance_scale)
        if self._run is None:
            self._run = self._make()
        self._run()
        return self.latents

    def _advance(self) -> None:
        """Feed and draw, from buffers to buffers."""
        self._step(self.sampler.draw)

    def _advance_scanned(self) -> None:
        self._step(self.sampler.draw_scanned)

    def _step(self, draw: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]) -> None:
        with fast_linear(self.x, self.x.shape[0]):
            state = self.sampler.model.step(self.x, self.cache)
            latents = draw(state, self.noise, self.fresh, self.scale)
            rows = self.sampler.embed(latents)
        self.latents.copy_(latents)
        self.x.copy_(rows.repeat(self.x.shape[0] // rows.shape[0], 1, 1))

    def _make(self) -> Callable[[], None]:
        """The step in its mode, or eagerly where that cannot be had."""
        make = {"compile": self._compile, "graph": self._capture}.get(self.mode)
        if make is None:
            return self._advance
        place, x = self.cache.place, self.x.clone()
        assert place is not None
        kept = place.clone()
        try:
            run = make()
        except (RuntimeError, ImportError, AssertionError) as error:
            self._progress.warn(
                f"The decode step could not be {'captured' if self.mode == 'graph' else 'compiled'}"
                f" ({_first_line(error)}), so it runs eagerly: small batches take two to four "
                "times as long."
            )
            self.mode, run = "static", self._advance
        place.copy_(kept)
        self.x.copy_(x)
        return run

    def _compile(self) -> Callable[[], None]:
        """The step by inductor, run once to make sure that it is there."""
        compiled = torch.compile(self._advance_scanned, dynamic=False, fullgraph=True)
        compiled()
        return compiled

    def _capture(self) -> Callable[[], None]:
        """The step as a CUDA graph; kernels are chosen beforehand, on a stream of their own."""
        place = self.cache.place
        assert place is not None
        kept = place.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._advance()
                place.copy_(kept)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph.replay


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
