"""Writing and drawing in one batch: caches, guidance anew for each image, seeds, ends."""

import pytest
import torch
from torch import Tensor

from latentlm_core.data.document_format import DocumentFormat, ImageSpan, TextSpan
from latentlm_core.data.documents import pack
from latentlm_core.errors import ConfigError
from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import generator
from latentlm_core.sampling import (
    Continuation,
    ContinuationRequest,
    InterleavedEngine,
    Prompt,
    SamplerConfig,
    TextSamplerConfig,
    draw_noise,
)
from latentlm_core.sampling.words import choose_tokens
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from tests.test_models import tiny_latent_lm

TEXT = TextTokenizer(TextConfig())
MARKS = TEXT.marks
CHANNELS, LENGTH = 8, 3
FORMAT = DocumentFormat(TEXT, CHANNELS)
GUIDED = SamplerConfig(num_inference_steps=3, guidance_scale=2.0)
HOT = TextSamplerConfig(temperature=1.0)


def image(seed: int) -> Tensor:
    return torch.randn(LENGTH, CHANNELS, generator=generator("image", seed))


def asked(pieces, seed=0, draw=False, **limits) -> ContinuationRequest:
    document = FORMAT.prompt(pieces, draw)
    prompt = Prompt(document.ids, document.latents, document.kind, document.position)
    return ContinuationRequest(prompt, seed, **limits)


def words(text: str) -> TextSpan:
    return TextSpan(TEXT.encode(text))


def writer(favour: int | None = None) -> LatentLM:
    """A random model, which likes the mark ``favour`` about as much as all else."""
    model = tiny_latent_lm(vocab_size=TEXT.vocab_size, predicts_text=True)
    torch.nn.init.normal_(model.text_head.weight, std=0.1, generator=generator("head"))
    plain = model.logits

    def logits(states: Tensor) -> Tensor:
        scores = plain(states).clone()
        if favour is not None:
            scores[..., favour] += 4.5
        return scores

    model.logits = logits
    return model


def engine(model: LatentLM, config=GUIDED, text=HOT) -> InterleavedEngine:
    return InterleavedEngine(model, config, text, MARKS, LENGTH)


REQUESTS = [
    asked([words("a red seven")], seed=1, draw=True, num_images=1),
    asked([ImageSpan(image(0))], seed=2, num_tokens=6),
    asked([], seed=3, num_tokens=8, num_images=2),
    asked([words("x"), ImageSpan(image(1)), words("and then")], seed=4, num_tokens=9, num_images=2),
    asked([], seed=5, draw=True, num_tokens=5, num_images=2),
]


def close(one: Continuation, other: Continuation) -> None:
    assert one.ended_by == other.ended_by
    assert len(one.pieces) == len(other.pieces)
    for mine, theirs in zip(one.pieces, other.pieces, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert mine == theirs


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
def test_a_batch_of_unlike_pages_is_its_pages_alone(scale, solver):
    config = GUIDED.model_copy(update={"guidance_scale": scale, "solver": solver})
    ours = engine(writer(MARKS.bod), config)
    together = ours.write(REQUESTS)
    for request, page in zip(REQUESTS, together, strict=True):
        close(ours.write([request])[0], page)
    assert sum(isinstance(piece, Tensor) for page in together for piece in page.pieces) >= 5


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_every_element_is_that_of_a_full_forward(scale):
    """TextSpan that are likeliest and latents that are drawn, from forwards without a cache."""
    model = writer(MARKS.bod)
    ours = engine(model, GUIDED.model_copy(update={"guidance_scale": scale}), TextSamplerConfig())
    request = asked([words("so")], seed=7, num_tokens=12, num_images=3)
    (page,) = ours.write([request])
    noise = draw_noise([_Noise(7, 3 * LENGTH)], CHANNELS, 0).start[0]
    pieces: list[TextSpan | ImageSpan] = [words("so")]
    num_images = 0
    for piece in page.pieces:
        if isinstance(piece, Tensor):
            for place in range(LENGTH):
                states = [_state(model, FORMAT.prompt(pieces, draw=True), piece[:place])]
                if scale != 1.0:
                    free = FORMAT.prompt([FORMAT.nothing], draw=True)
                    states.append(_state(model, free, piece[:place]))
                start = noise[num_images * LENGTH + place][None]
                with torch.no_grad():
                    drawn = ours.sampler.draw(torch.stack(states), start, None, scale)
                torch.testing.assert_close(drawn[0], piece[place], rtol=1e-4, atol=1e-4)
            pieces.append(ImageSpan(piece))
            num_images += 1
        else:
            for place, token in enumerate(piece):
                before = FORMAT.prompt([*pieces, TextSpan(piece[:place])])
                assert token == _likeliest(model, before, num_images < 3)
            pieces.append(TextSpan(piece))
    assert num_images == 3


class _Noise:
    def __init__(self, seed, num_latents):
        self.seed, self.num_latents = seed, num_latents


def _state(model: LatentLM, prompt, drawn: Tensor) -> Tensor:
    """The state after a prompt and some latents."""
    count = len(drawn)
    ids = torch.cat([prompt.ids, torch.zeros(count, dtype=torch.int64)])[None]
    latents = torch.cat([prompt.latents, drawn])[None]
    kind = torch.cat([prompt.kind, torch.full((count,), int(Kind.LATENT))])[None]
    position = torch.arange(float(ids.shape[1]))[None]
    with torch.no_grad():
        x = model.embed(ids, latents, kind)
        return model.step(x, model.backbone.new_cache(1, ids.shape[1]), position)[0]


def _likeliest(model: LatentLM, prompt, may_draw: bool) -> int:
    with torch.no_grad():
        scores = model.logits(_state(model, prompt, torch.zeros(0, CHANNELS)))
    never = [MARKS.bos, MARKS.eod, MARKS.go_on, MARKS.null, *([] if may_draw else [MARKS.bod])]
    scores[never] = -torch.inf
    return int(scores.argmax())


def test_a_page_ends_where_the_model_says_so():
    (page,) = engine(writer(MARKS.eos), text=TextSamplerConfig()).write([REQUESTS[1]])
    assert page == Continuation((), "end")


def test_a_page_ends_at_its_bound():
    (page,) = engine(writer(), text=TextSamplerConfig()).write([REQUESTS[1]])
    assert page.ended_by == "bound"
    assert len(page.pieces[0]) == 6


def test_a_prompt_that_asks_for_an_image_gets_it_and_no_word():
    (page,) = engine(writer()).write([REQUESTS[0]])
    (drawn,) = page.pieces
    assert drawn.shape == (LENGTH, CHANNELS)
    assert page.ended_by == "end"


def test_marks_are_never_written():
    model = writer(MARKS.null)
    (page,) = engine(model).write([asked([], seed=9, num_tokens=50)])
    assert all(token < TEXT.num_text_ids for token in page.pieces[0])


def test_a_low_share_takes_the_likeliest():
    model = writer()
    request = asked([words("a")], seed=3, num_tokens=10)
    greedy = engine(model, text=TextSamplerConfig()).write([request])
    narrow = engine(model, text=TextSamplerConfig(temperature=1.0, top_p=1e-6)).write([request])
    wide = engine(model, text=HOT).write([request])
    assert greedy == narrow != wide


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    model = writer()
    request = asked([words("a")], seed=3, num_tokens=10)
    greedy = engine(model, text=TextSamplerConfig()).write([request])
    assert engine(model, text=TextSamplerConfig(temperature=temperature)).write([request]) == greedy


def test_scores_that_are_rounded_otherwise_change_few_draws():
    """As those of a batch in bfloat16 are."""
    changed = 0
    for seed in range(200):
        exact, noise = torch.randn(2, TEXT.vocab_size, generator=generator("scores", seed))
        chosen = [
            choose_tokens(scores[None].bfloat16(), [True], MARKS, HOT, [generator(seed)])
            for scores in (exact, exact + 0.02 * noise)
        ]
        changed += chosen[0] != chosen[1]
    assert changed < 10


def test_a_cache_is_no_longer_than_the_room(monkeypatch):
    model, lengths = writer(MARKS.bod), []
    make = model.backbone.new_cache
    monkeypatch.setattr(
        model.backbone, "new_cache", lambda rows, size: lengths.append(size) or make(rows, size)
    )
    request = asked([words("ab")], seed=1, num_tokens=20, num_images=20, room=20)
    (page,) = engine(model).write([request])
    sizes = [LENGTH + 2 if isinstance(piece, Tensor) else len(piece) for piece in page.pieces]
    assert max(lengths) == len(request.prompt.ids) + 20 + 1
    assert 20 - LENGTH - 2 < sum(sizes) <= 20


def test_words_are_chosen_by_their_chances():
    """Of two tokens with odds 3 : 1 the first comes three times as often."""
    model = writer()
    scores = torch.full((TEXT.vocab_size,), -30.0)
    scores[[65, 66]] = torch.tensor([3.0, 1.0]).log()
    model.logits = lambda states: scores.expand(len(states), -1).clone()
    requests = [asked([], seed=seed, num_tokens=1) for seed in range(400)]
    first = sum(page.pieces[0] == (65,) for page in engine(model).write(requests))
    assert 270 < first < 330


def test_the_listener_hears_everything_in_order():
    heard: dict[int, list[int | Tensor]] = {}
    ours = engine(writer(MARKS.bod))
    pages = ours.write(REQUESTS, lambda index, made: heard.setdefault(index, []).append(made))
    for index, page in enumerate(pages):
        flat: list[int | Tensor] = []
        for piece in page.pieces:
            flat += [piece] if isinstance(piece, Tensor) else list(piece)
        assert len(flat) == len(heard[index])
        assert all(a is b or a == b for a, b in zip(flat, heard[index], strict=True))


def test_a_ramp_of_guidance_is_refused():
    with pytest.raises(ConfigError, match="constant"):
        engine(writer(), GUIDED.model_copy(update={"guidance_schedule": "linear"}))


def test_what_is_learned_of_each_kind_of_document():
    """Where the loss is: words, beginnings that words foretell, latents after words, the end."""
    marks, drawn = MARKS, image(0)
    caption = words("ab")
    a, b = caption.ids
    cases = [
        ([caption], [a, b, marks.eos], 0),
        ([caption, ImageSpan(drawn)], [a, b, marks.bod, marks.eos], LENGTH),
        ([ImageSpan(drawn, learn=False), caption], [a, b, marks.eos], 0),
        ([ImageSpan(drawn, learn=False), FORMAT.question("q"), caption], [a, b, marks.eos], 0),
        ([FORMAT.nothing, ImageSpan(drawn)], [marks.eos], LENGTH),
        (
            [ImageSpan(drawn, learn=False), *FORMAT.answered([("q", "a"), ("r", "b")])],
            [a, marks.eos, b, marks.eos],
            0,
        ),
    ]
    for pieces, targets, num_latents in cases:
        batch = pack([FORMAT.document(pieces, "key")], 64)
        assert batch.ids[:, 1:].flatten()[batch.layout.text_targets].tolist() == targets
        assert batch.layout.latent_targets.numel() == num_latents
