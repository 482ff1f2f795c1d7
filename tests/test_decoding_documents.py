"""Speech and pages by decode steps of fixed shapes: rows refilled, ended, begun anew in place."""

from dataclasses import replace

import pytest

from latentlm_core.nn.attention import KVCache
from latentlm_core.sampling import InterleavedEngine, SpanEngine
from latentlm_core.sampling.base import LatentSampler
from latentlm_core.sampling.decoding import DecodeStep, Work
from tests.test_decoding import Ear
from tests.test_interleaved import GUIDED as PAGE
from tests.test_interleaved import HOT, LENGTH, MARKS, REQUESTS, writer
from tests.test_interleaved import close as close_page
from tests.test_spans import CONFIGS, END, GO_ON, GUIDED, close, listener_at, request, speaker

ASKED = [replace(request(n % 5, 1 + 5 * n % 7), seed=n) for n in range(9)]


@CONFIGS
@pytest.mark.parametrize("batch_size", [2, None])
def test_spans_in_fixed_shapes_are_those_of_a_growing_cache(config, batch_size):
    """The second time fewer of them, in buffers that were used."""
    model = speaker()
    static = SpanEngine(model, config, GO_ON, END, batch_size, mode="static")
    for asked in (ASKED, ASKED[2:7]):
        eager = SpanEngine(model, config, GO_ON, END, mode="eager").draw(asked)
        for span, other in zip(static.draw(asked), eager, strict=True):
            close(span, other)


def test_a_cache_that_is_full_is_moved_in_fixed_shapes_too(monkeypatch):
    """One long span beside many short ones, whose prompts are taken in one after the other."""
    asked = [replace(request(0, 12), seed=0)]
    asked += [replace(request(n % 3, 1), seed=n) for n in range(1, 40)]
    model, moves = speaker(), []
    engine = SpanEngine(model, GUIDED, GO_ON, END, 2, mode="static")
    plain = SpanEngine(model, GUIDED, GO_ON, END, mode="eager").draw(asked)
    monkeypatch.setattr("latentlm_core.sampling.spans.COLUMNS", 1)
    move = KVCache.move
    monkeypatch.setattr(KVCache, "move", lambda self, n: (moves.append(n), move(self, n)))
    for span, other in zip(engine.draw(asked), plain, strict=True):
        close(span, other)
    assert min(moves) < 0


def test_a_listener_ends_a_row_that_is_idle_from_then_on():
    model, asked = speaker(), [request(number, 6) for number in range(3)]
    static = SpanEngine(model, GUIDED, GO_ON, END, mode="static")
    wanted = static.draw(asked)
    spans = static.draw(asked, listener_at(1, 2, "boredom"))
    assert (spans[1].ended_by, len(spans[1].latents)) == ("boredom", 2)
    close(spans[0], wanted[0])
    close(spans[2], wanted[2])


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
def test_pages_in_fixed_shapes_are_those_of_a_growing_cache(scale, solver):
    config = PAGE.model_copy(update={"guidance_scale": scale, "solver": solver})
    model = writer(MARKS.bod)
    eager, static = (
        InterleavedEngine(model, config, HOT, MARKS, LENGTH, mode=mode)
        for mode in ("eager", "static")
    )
    for asked in (REQUESTS, REQUESTS[1:4]):
        for page, other in zip(static.write(asked), eager.write(asked), strict=True):
            close_page(page, other)


def test_compiled_spans_and_pages_are_those_of_eager_steps():
    ear, model, pages = Ear(), speaker(), writer(MARKS.bod)
    for each in (model, pages):
        del each.backbone.blocks[1:], each.head.blocks[1:]
    eager = SpanEngine(model, GUIDED, GO_ON, END, mode="eager")
    compiled = SpanEngine(model, GUIDED, GO_ON, END, 2, mode="compile", progress=ear)
    for span, other in zip(compiled.draw(ASKED), eager.draw(ASKED), strict=True):
        close(span, other)
    eager, compiled = (
        InterleavedEngine(pages, PAGE, HOT, MARKS, LENGTH, mode=mode, progress=ear)
        for mode in ("eager", "compile")
    )
    for page, other in zip(compiled.write(REQUESTS), eager.write(REQUESTS), strict=True):
        close_page(page, other)
    assert (ear.warnings, compiled.mode) == ([], "compile")


def test_without_a_gpu_a_graph_of_spans_is_drawn_eagerly_after_one_warning():
    ear, model = Ear(), speaker()
    engine = SpanEngine(model, GUIDED, GO_ON, END, 2, mode="graph", progress=ear)
    wanted = SpanEngine(model, GUIDED, GO_ON, END, mode="eager").draw(ASKED)
    for _ in range(2):
        for span, other in zip(engine.draw(ASKED), wanted, strict=True):
            close(span, other)
    assert (len(ear.warnings), engine.mode) == (1, "eager")


@pytest.mark.parametrize("failing", ["_draw", "_feed"])
def test_what_was_prepared_is_let_go_where_its_other_half_cannot_be_had(monkeypatch, failing):
    """Feeding and drawing are prepared apart: a cache is never half pinned."""

    def compile_or_fail(self: DecodeStep, work: Work) -> Work:
        if work.__name__ == failing:
            raise RuntimeError("not this one")

        def captured() -> None:  # what was captured knows a pinned cache alone
            place, self.cache.place = self.cache.place, self.cache._place
            work()
            self.cache.place = place

        return captured

    monkeypatch.setattr(DecodeStep, "_compile", compile_or_fail)
    monkeypatch.setattr(LatentSampler, "draw_scanned", LatentSampler.draw)
    ear, model = Ear(), writer(MARKS.bod)
    eager, falling = (
        InterleavedEngine(model, PAGE, HOT, MARKS, LENGTH, mode=mode, progress=ear)
        for mode in ("eager", "compile")
    )
    for asked in (REQUESTS[2:3], REQUESTS):  # one that feeds before it draws
        for page, other in zip(falling.write(asked), eager.write(asked), strict=True):
            close_page(page, other)
    assert (len(ear.warnings), falling.mode) == (1, "eager")
