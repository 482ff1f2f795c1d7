"""Words and images with a Transfusion: caches, batches of unequal pages, choices, ends."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentlm_core.data.documents import DocumentBuilder
from latentlm_core.diffusion import guided, solve
from latentlm_core.errors import ConfigError
from latentlm_core.layout import MaskRule
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.runtime import generator
from latentlm_core.sampling.base import BOUND, END, Noise, SamplerConfig, draw_noise
from latentlm_core.sampling.interleaved import ContinuationRequest
from latentlm_core.sampling.prompts import Prompt
from latentlm_core.sampling.spans import SpanRequest
from latentlm_core.sampling.words import TextSamplerConfig, choose_tokens
from tests.test_transfusion import (
    CHANNELS,
    MARKS,
    NUM_LATENTS,
    engine,
    image,
    layout_of,
    page,
    predicted,
    prompt,
    tiny,
)


def scores_after(model: Transfusion, given: Prompt) -> Tensor:
    """Scores (V,) of the next token by one pass over a page whose images are clean."""
    layout = layout_of(given.kind)
    times = model.timestep_embedding(torch.zeros(1, dtype=torch.int64))
    x = model.embed(given.ids[None], given.latents[None], layout.kind, times)
    states = model.backbone(x, layout.position, layout.mask(MaskRule.FREE_SPANS))
    return model.logits(states[0, -1])


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(num_inference_steps=3, guidance_scale=scale, solver=solver)
        for scale, solver in ((1.0, "dpmsolver++"), (2.0, "dpmsolver++"), (2.0, "ddpm"))
    ],
    ids=lambda config: f"cfg{config.guidance_scale:g}-{config.solver}",
)


def builders() -> list[Callable[[], DocumentBuilder]]:
    """Beginnings of different lengths, one with an image in it."""
    return [
        lambda: page([1, 2, 3]),
        lambda: page([MARKS.null]),
        lambda: page(image(7), [4, 0, 1]),
    ]


def free_prompt() -> Prompt:
    return prompt(page([MARKS.null]), draw=True)


@CONFIGS
def test_drawing_with_a_cache_equals_drawing_by_full_passes(config) -> None:
    model = tiny()
    ours = engine(model, config)
    prompts = [prompt(each(), draw=True) for each in builders()]
    shape = (len(prompts), NUM_LATENTS, CHANNELS)
    fresh = torch.randn(ours.grid.num_fresh, *shape) if ours.grid.num_fresh else None
    noise = Noise(torch.randn(shape), fresh)
    drawn = ours.draw_images(prompts, [free_prompt()] * len(prompts), noise)
    assert drawn.shape == shape
    for row, given in enumerate(prompts):
        branches = [given, free_prompt()] if ours.config.is_guided else [given]

        def predict(x_t: Tensor, i: int, branches: list[Prompt] = branches) -> Tensor:
            rows = zip(branches, x_t, strict=True)
            t = ours.grid.timesteps[i]
            return torch.stack([predicted(model, each, x, t) for each, x in rows])

        with torch.no_grad():
            again = solve(
                guided(predict, config.guidance_scale) if ours.config.is_guided else predict,
                noise.start[row : row + 1],
                ours.grid,
                None if fresh is None else lambda i, row=row: fresh[i, row : row + 1],
            )
        torch.testing.assert_close(drawn[row], again[0], rtol=1e-5, atol=1e-5)


def test_a_painted_image_stays_in_the_cache_and_words_go_on_from_it() -> None:
    """In both branches of guidance."""
    model = tiny()
    ours = engine(model, SamplerConfig(num_inference_steps=3, guidance_scale=2.0))
    first, second, third = builders()
    beginnings = [first, third, second, second]
    _, cache = ours.read([prompt(each(), draw=True) for each in beginnings], NUM_LATENTS + 2)
    images = ours.paint(cache, Noise(torch.randn(2, NUM_LATENTS, CHANNELS)))
    with torch.inference_mode():
        model.read_token(torch.full((4,), MARKS.eod), cache)
        found = model.logits(model.read_token(torch.full((4,), 5), cache))
        for row, each in enumerate(beginnings):
            builder = each().tokens([MARKS.bod]).latents(images[row % 2])
            wanted = scores_after(model, prompt(builder.tokens([MARKS.eod, 5])))
            torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)


def test_every_image_of_a_page_has_noise_of_its_own_and_sees_those_before() -> None:
    model = tiny()
    model.logits = lambda states: torch.eye(model.config.vocab_size)[MARKS.bod].repeat(
        len(states), 1
    )
    ours = engine(model)
    request = ContinuationRequest(prompt(page([1, 2]), draw=True), seed=3, num_images=2)
    first, second = ours.write([request])[0].pieces
    noise = draw_noise([SpanRequest(request.prompt, request.prompt, 2 * NUM_LATENTS, 3)], 3, 0)
    halves = [Noise(half) for half in noise.start.split(NUM_LATENTS, dim=1)]
    for image_found, half, given in (
        (first, halves[0], page([1, 2])),
        (second, halves[1], page([1, 2], first)),
    ):
        wanted = ours.draw_images([prompt(given, draw=True)], [free_prompt()], half)
        torch.testing.assert_close(image_found, wanted[0], rtol=1e-5, atol=1e-5)


def requests() -> list[ContinuationRequest]:
    """Of words alone, of images alone, and of both; of different lengths."""
    first, second, third = builders()
    return [
        ContinuationRequest(prompt(first(), draw=True), seed=1, num_images=1),
        ContinuationRequest(prompt(third()), seed=2, num_tokens=5),
        ContinuationRequest(prompt(second(), draw=True), seed=3, num_tokens=4, num_images=3),
        ContinuationRequest(prompt(third(), draw=True), seed=4, num_tokens=9, num_images=1),
        ContinuationRequest(prompt(second()), seed=5, num_tokens=12, num_images=2),
    ]


@CONFIGS
def test_a_batch_of_pages_is_each_of_them_alone(config) -> None:
    model = tiny()
    liking = torch.zeros(model.config.vocab_size)
    liking[MARKS.eos], liking[MARKS.bod] = -1.5, 1.5
    model.logits = lambda states: 4 * Transfusion.logits(model, states) + liking
    ours = engine(model, config, temperature=1.0, top_p=0.95)
    heard: list[tuple[int, int | Tensor]] = []
    together = ours.write(requests(), lambda index, made: heard.append((index, made)))
    alone = [ours.write([request])[0] for request in requests()]
    for index, (found, wanted) in enumerate(zip(together, alone, strict=True)):
        assert found.ended_by == wanted.ended_by
        assert len(found.pieces) == len(wanted.pieces)
        for piece, other in zip(found.pieces, wanted.pieces, strict=True):
            assert type(piece) is type(other)
            torch.testing.assert_close(
                torch.as_tensor(piece), torch.as_tensor(other), rtol=1e-4, atol=1e-4
            )
        made = [each for who, each in heard if who == index]
        sizes = [1 if isinstance(p, Tensor) else len(p) for p in found.pieces]
        assert len(made) == sum(sizes)
    assert any(len(found.pieces) > 2 for found in together)
    assert {found.ended_by for found in together} == {END, BOUND}


def test_greedy_words_are_the_likeliest_by_full_passes() -> None:
    """Marks that nobody writes are never chosen, nor images that nobody asked for."""
    model = tiny()
    model.text_head.weight.data[MARKS.bod] *= 50
    pages_found = engine(model).write(
        [ContinuationRequest(prompt(each()), seed=0, num_tokens=6) for each in builders()]
    )
    barred = [MARKS.bos, MARKS.bod, MARKS.eod, MARKS.go_on, MARKS.null]
    written = 0
    for each, found in zip(builders(), pages_found, strict=True):
        words: list[int] = [token for piece in found.pieces for token in piece]
        for place in range(len(words) + 1):
            with torch.no_grad():
                scores = scores_after(model, prompt(each().tokens(words[:place])))
            scores[barred] = -torch.inf
            if place < len(words):
                assert scores.argmax() == words[place]
            else:
                assert bool(scores.argmax() == MARKS.eos) == (found.ended_by == END)
        written += len(words)
    assert written > 0


def test_tokens_are_chosen_by_their_chances_within_the_nucleus() -> None:
    scores = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
    source = generator("choice")

    def counts(**config: float) -> Tensor:
        wide = torch.full((4000, MARKS.null + 1), -torch.inf)
        wide[:, :4] = scores
        sampler = TextSamplerConfig(**config)
        chosen = choose_tokens(wide, [True] * 4000, MARKS, sampler, [source] * 4000)
        return torch.tensor(chosen).bincount(minlength=4) / 4000

    assert counts()[0] == 1.0
    torch.testing.assert_close(counts(temperature=1.0), scores.exp(), rtol=0.0, atol=0.03)
    nucleus = torch.tensor([2 / 3, 0.0, 1 / 3, 0.0])
    torch.testing.assert_close(counts(temperature=1.0, top_p=0.6), nucleus, rtol=0.0, atol=0.03)
    cold = (scores / 0.5).softmax(0)
    torch.testing.assert_close(counts(temperature=0.5), cold, rtol=0.0, atol=0.03)


def test_a_guidance_schedule_by_position_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be constant"):
        engine(tiny(), SamplerConfig(guidance_schedule="linear", num_inference_steps=3))
