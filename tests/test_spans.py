"""Drawing latents until they end: caches, batches of unequal rows, ends, seeds."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentlm_core.data.documents import DocumentBuilder, pack
from latentlm_core.errors import ConfigError
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.nn.attention import KVCache
from latentlm_core.runtime import generator
from latentlm_core.sampling import (
    Prompt,
    SamplerConfig,
    Span,
    SpanEngine,
    SpanRequest,
    draw_noise,
)
from latentlm_core.sampling.base import LatentSampler
from tests.test_models import tiny_latent_lm

CHANNELS, GO_ON, END, NULL, BOD = 8, 7, 8, 9, 10
GUIDED = SamplerConfig(num_inference_steps=3, guidance_scale=2.0)
CONFIGS = pytest.mark.parametrize(
    "config",
    [
        GUIDED.model_copy(update={"guidance_scale": scale, "solver": solver})
        for scale in (1.0, 2.0)
        for solver in ("dpmsolver++", "ddpm")
    ],
    ids=lambda config: f"cfg{config.guidance_scale:g}-{config.solver}",
)
PACES = pytest.mark.parametrize("pace", [0.0, 1.7])


def prompt(tokens: list[int], heard: int = 0, seed: int = 0, pace: float = 0.0) -> DocumentBuilder:
    """[latents that are heard,] text, begin of data; a text with a pace stands ahead."""
    builder = DocumentBuilder(CHANNELS)
    if heard:
        latents = torch.randn(heard, CHANNELS, generator=generator("heard", seed))
        builder.tokens([BOD]).latents(latents, GO_ON, learn=False).tokens([END])
    ahead = [1 + pace * (place + 0.5) for place in range(len(tokens))] if pace else None
    return builder.tokens(tokens, ahead=ahead).tokens([BOD])


def finished(builder: DocumentBuilder) -> Prompt:
    document = builder.finish("prompt")
    return Prompt(document.ids, document.latents, document.kind, document.position)


def request(number: int, num_latents: int, pace: float = 0.0) -> SpanRequest:
    """Number k has a prompt of a length of its own, that of guidance included."""
    words = [n % 6 for n in range(1 + 2 * number)]
    return SpanRequest(
        finished(prompt(words, heard=number % 3, seed=number, pace=pace)),
        finished(prompt([NULL], heard=number % 2, seed=number)),
        num_latents,
        seed=40 + number,
    )


def speaker() -> LatentLM:
    """Never ends of itself: both marks have one score, and a tie goes on."""
    model = tiny_latent_lm(predicts_text=True)
    torch.nn.init.zeros_(model.text_head.weight)
    return model


def mute() -> LatentLM:
    """Ends wherever it may."""
    model = tiny_latent_lm(predicts_text=True)
    model.logits = lambda states: torch.eye(model.config.vocab_size)[END].expand(len(states), -1)
    return model


def engine(model: LatentLM, config: SamplerConfig = GUIDED) -> SpanEngine:
    return SpanEngine(model, config, GO_ON, END)


def close(span: Span, other: Span) -> None:
    assert span.ended_by == other.ended_by
    torch.testing.assert_close(span.latents, other.latents, rtol=1e-4, atol=1e-4)


@CONFIGS
@PACES
def test_cached_drawing_equals_drawing_by_full_forwards(config, pace):
    """Each latent is drawn again from full forwards over the prompt and what was drawn before."""
    model = speaker()
    ours = engine(model, config)
    asked = [request(number, 4, pace) for number in (2, 0, 3)]
    spans = ours.draw(asked)
    fresh_steps = len(ours.grid) if ours.grid.is_stochastic else 0
    noise = draw_noise(asked, CHANNELS, fresh_steps)
    times = model.head.timestep_embedding(torch.tensor(ours.grid.timesteps))
    with torch.no_grad():
        for row, place in itertools.product(range(len(asked)), range(4)):
            drawn = spans[row].latents
            states = [_state_after(model, p, drawn[:place]) for p in _prompts(asked[row])]
            if not ours.config.is_guided:
                del states[1]
            again = model.head.sample(
                model.head.condition(torch.stack(states)),
                noise.start[row : row + 1, place],
                ours.grid,
                times,
                config.guidance_scale,
                None if noise.fresh is None else noise.fresh[:, row : row + 1, place],
            )
            torch.testing.assert_close(again[0], drawn[place], rtol=1e-4, atol=1e-5)


def _prompts(asked: SpanRequest) -> tuple[Prompt, Prompt]:
    return asked.prompt, asked.unconditional


def _state_after(model: LatentLM, given: Prompt, drawn: Tensor) -> Tensor:
    """The last state of a prompt and latents, by the layout that training uses."""
    builder = DocumentBuilder(CHANNELS)
    for token, latent, kind in zip(given.ids.tolist(), given.latents, given.kind, strict=True):
        if kind == 1:
            builder.tokens([token])
        else:
            builder.latents(latent.unsqueeze(0), GO_ON)
    document = builder.latents(drawn, GO_ON).tokens([END]).finish("all")
    after = given.position[-1] + torch.arange(1, len(drawn) + 2)
    placed = replace(document, position=torch.cat([given.position, after]))
    batch = pack([placed], row_length=999)
    return model.states(batch.ids[:, :-1], batch.latents[:, :-1], batch.layout)[0, -1]


@CONFIGS
@PACES
def test_a_batch_of_unequal_rows_is_as_each_is_alone(config, pace):
    ours = engine(speaker(), config)
    asked = [request(number, 3 + 4 * number % 6, pace) for number in range(4)]
    assert len({len(one.prompt.ids) for one in asked}) == 4
    assert len({one.num_latents for one in asked}) > 2
    together = ours.draw(asked)
    assert [len(span.latents) for span in together] == [one.num_latents for one in asked]
    for one, span in zip(asked, together, strict=True):
        close(span, ours.draw([one])[0])
    backwards = ours.draw(asked[::-1])[::-1]
    for span, other in zip(together, backwards, strict=True):
        close(span, other)


@CONFIGS
@PACES
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_that_end_are_refilled_and_each_span_is_as_alone(
    monkeypatch, config, pace, batch_size
):
    """Prompts grow, so that later ones need more room than the first; the cache is moved, too."""
    monkeypatch.setattr("latentlm_core.sampling.spans.COLUMNS", 1)
    ours = engine(speaker(), config)
    asked = [request(number, 1 + 5 * number % 7, pace) for number in range(5)]
    asked += [request(number % 5, 6 - number % 3, pace) for number in range(5, 9)]
    asked = [replace(one, seed=seed) for seed, one in enumerate(asked)]
    queued = SpanEngine(ours.model, config, GO_ON, END, batch_size).draw(asked)
    for one, span in zip(asked, queued, strict=True):
        (alone,) = ours.draw([one])
        assert span.ended_by == alone.ended_by
        torch.testing.assert_close(span.latents, alone.latents, rtol=1e-4, atol=1e-5)


def test_a_queue_keeps_the_batch_full(monkeypatch):
    """And its cache no longer than two of its longest rows and a prompt."""
    rows, lengths = [], []
    draw = LatentSampler.draw

    def counted(self: LatentSampler, states: Tensor, *rest: object) -> Tensor:
        rows.append(len(states) // 2)
        return draw(self, states, *rest)

    advance = KVCache.advance
    monkeypatch.setattr("latentlm_core.sampling.spans.COLUMNS", 1)
    monkeypatch.setattr(LatentSampler, "draw", counted)
    monkeypatch.setattr(
        KVCache, "advance", lambda self, n: (advance(self, n), lengths.append(self.length))
    )
    asked = [replace(request(0, 1 + 3 * number % 8), seed=number) for number in range(24)]
    heard: list[int] = []
    SpanEngine(speaker(), GUIDED, GO_ON, END, 4).draw(
        asked, lambda index, latent: heard.append(index)
    )
    assert len(heard) == sum(one.num_latents for one in asked) == sum(rows)
    assert set(rows[:-8]) == {4}
    assert max(lengths) <= 2 * 8 + 2 * len(asked[0].prompt.ids)


def test_nothing_asked_is_nothing_drawn():
    assert engine(speaker()).draw([]) == []


def test_where_text_stands_changes_what_is_drawn():
    ours = engine(speaker())
    spans = [ours.draw([request(2, 3, pace)])[0] for pace in (1.7, 1.7, 1.2, 0.0)]
    close(spans[0], spans[1])
    assert not torch.allclose(spans[0].latents, spans[2].latents, atol=1e-3)
    assert not torch.allclose(spans[0].latents, spans[3].latents, atol=1e-3)


def test_guidance_changes_what_is_drawn_and_one_is_no_guidance():
    model, asked = speaker(), [request(1, 3)]
    spans = [
        engine(model, GUIDED.model_copy(update={"guidance_scale": scale})).draw(asked)[0]
        for scale in (1.0, 1.0 + 1e-6, 3.0)
    ]
    close(spans[0], spans[1])
    assert not torch.allclose(spans[0].latents, spans[2].latents, atol=1e-2)


@pytest.mark.parametrize("num_latents", [1, 2, 9])
def test_a_span_ends_at_its_bound_whatever_the_model_says(num_latents):
    (span,) = engine(speaker()).draw([request(0, num_latents)])
    assert (span.latents.shape, span.ended_by) == ((num_latents, CHANNELS), "bound")


def test_the_model_ends_a_span_after_its_first_latent_at_the_earliest():
    spans = engine(mute()).draw([request(0, 5), request(1, 1)])
    assert [(len(span.latents), span.ended_by) for span in spans] == [(1, "end"), (1, "end")]


def test_the_end_follows_the_two_marks_of_the_conditional_row_alone():
    """Scores of a real head, with a third token far above both; each end is read again."""
    model = tiny_latent_lm(predicts_text=True)
    with torch.no_grad():
        model.text_head.weight[3] *= 50
    asked = [request(number % 5, 3) for number in range(12)]
    asked = [replace(one, seed=seed) for seed, one in enumerate(asked)]
    spans = engine(model).draw(asked)
    for one, span in zip(asked, spans, strict=True):
        with torch.no_grad():
            for place in range(1, len(span.latents) + 1):
                scores = model.logits(_state_after(model, one.prompt, span.latents[:place]))
                is_end = bool(scores[END] > scores[GO_ON])
                assert is_end == (span.ended_by == "end" and place == len(span.latents))
    assert {(span.ended_by, len(span.latents)) for span in spans} >= {("end", 1), ("bound", 3)}


def listener_at(index: int, count: int, word: str) -> Callable[[int, Tensor], str | None]:
    """Ends span ``index`` with its ``count``-th latent."""
    heard: dict[int, int] = {}

    def listen(which: int, latent: Tensor) -> str | None:
        assert latent.shape == (CHANNELS,)
        heard[which] = heard.get(which, 0) + 1
        return word if (which, heard[which]) == (index, count) else None

    return listen


@pytest.mark.parametrize("config", [GUIDED, SamplerConfig(num_inference_steps=3)])
def test_a_listener_ends_a_span_and_the_others_go_on_unchanged(config):
    ours = engine(speaker(), config)
    asked = [request(number, 6) for number in range(3)]
    undisturbed = ours.draw(asked)
    spans = ours.draw(asked, listener_at(1, 2, "boredom"))
    assert spans[1].ended_by == "boredom"
    torch.testing.assert_close(spans[1].latents, undisturbed[1].latents[:2], rtol=1e-4, atol=1e-4)
    close(spans[0], undisturbed[0])
    close(spans[2], undisturbed[2])


def test_a_listener_hears_all_latents_in_order_and_none_after_the_end():
    heard: list[list[Tensor]] = [[], []]
    spans = engine(speaker()).draw(
        [request(0, 4), request(1, 2)], lambda index, latent: heard[index].append(latent)
    )
    for span, latents in zip(spans, heard, strict=True):
        assert torch.equal(span.latents, torch.stack(latents))


def test_an_end_of_the_model_s_own_comes_before_what_a_listener_says():
    (span,) = engine(mute()).draw([request(0, 4)], lambda *_: "boredom")
    assert span.ended_by == "end"
    (span,) = engine(speaker()).draw([request(0, 1)], lambda *_: "boredom")
    assert span.ended_by == "boredom"


def test_the_seed_decides_a_span():
    ours, asked = engine(speaker()), request(1, 3)
    first, again = ours.draw([asked])[0], ours.draw([asked])[0]
    assert torch.equal(first.latents, again.latents)
    other = ours.draw([replace(asked, seed=9)])[0]
    assert not torch.allclose(first.latents, other.latents, atol=1e-2)


def test_the_model_keeps_its_mode_and_its_gradients():
    model = speaker()
    model.train()
    engine(model).draw([request(0, 2)])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_guidance_ramp_is_refused_for_nobody_knows_the_last_latent():
    with pytest.raises(ConfigError, match="constant"):
        engine(speaker(), GUIDED.model_copy(update={"guidance_schedule": "linear"}))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_what_the_cpu_draws():
    model, asked = speaker(), [request(number, 3 + number) for number in range(3)]
    wanted = engine(model).draw(asked)
    for span, other in zip(engine(model.cuda()).draw(asked), wanted, strict=True):
        torch.testing.assert_close(span.latents, other.latents, rtol=1e-3, atol=1e-4)
