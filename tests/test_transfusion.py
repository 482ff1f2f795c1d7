"""Transfusion: who sees whom, packing, gradients, drawing with a cache, and that it learns."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.data.documents import Document, DocumentBuilder, pack
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.layout import Kind, MaskRule, SequenceLayout
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.models.transfusion import (
    Transfusion,
    TransfusionConfig,
    TransfusionSize,
    matching,
    num_parameters,
)
from latentlm_core.runtime import generator
from latentlm_core.sampling.base import END, SamplerConfig
from latentlm_core.sampling.interleaved import ContinuationRequest
from latentlm_core.sampling.prompts import Prompt
from latentlm_core.sampling.transfusion import TransfusionEngine
from latentlm_core.sampling.words import TextSamplerConfig
from latentlm_core.tokenizers.text import Marks
from tests.test_models import wake

CHANNELS, NUM_LATENTS = 3, 4
MARKS = Marks(*range(6, 12))


def tiny_config(head_layers: int = 2, hidden_size: int = 32) -> TransfusionConfig:
    backbone = TransformerConfig(
        hidden_size=hidden_size, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48
    )
    size = TransfusionSize(backbone=backbone, head_layers=head_layers)
    return size.with_text(CHANNELS, len(MARKS) + MARKS.bos, NUM_LATENTS)


def tiny() -> Transfusion:
    """With nothing at zero, so that every weight matters."""
    return wake(Transfusion(tiny_config()))


def image(seed: int) -> Tensor:
    return torch.randn(NUM_LATENTS, CHANNELS, generator=generator("image", seed))


def page(*pieces: Sequence[int] | Tensor, learn: Sequence[bool] = ()) -> DocumentBuilder:
    """bos, then words, learned, and images between their marks, learned as ``learn`` says."""
    builder, plans = DocumentBuilder(CHANNELS).tokens([MARKS.bos]), iter(learn)
    for piece in pieces:
        if isinstance(piece, Tensor):
            builder.tokens([MARKS.bod]).latents(piece, learn=next(plans, True))
            builder.tokens([MARKS.eod])
        else:
            builder.tokens(piece, learn=True)
    return builder


def finished(builder: DocumentBuilder) -> Document:
    return builder.tokens([MARKS.eos], learn=True).finish("page")


def prompt(builder: DocumentBuilder, draw: bool = False) -> Prompt:
    document = (builder.tokens([MARKS.bod]) if draw else builder).finish("prompt")
    return Prompt(document.ids, document.latents, document.kind, document.position)


def pages() -> list[Document]:
    """Captions before and after their images, two images in one page, and words alone."""
    return [
        finished(page([1, 2, 3], image(0))),
        finished(page(image(1), [4, 2], learn=[False])),
        finished(page([5], image(2), [0, 1], image(3), [2])),
        finished(page([3, 3, 1, 0, 2])),
        finished(page(image(4), [1], image(5), learn=[False, True])),
    ]


def draws(document: Document) -> tuple[Tensor, Tensor]:
    """Timesteps and noise of the learned images of a page: a function of the page alone."""
    num_images = int((document.learn == int(Kind.LATENT)).sum()) // NUM_LATENTS
    source = generator("draws", *document.ids.tolist())
    t = torch.randint(1000, (num_images,), generator=source)
    return t, torch.randn(num_images, NUM_LATENTS, CHANNELS, generator=source)


def errors_of(model: Transfusion, documents: Sequence[Document], t: Tensor, noise: Tensor):
    batch = pack(documents, row_length=sum(map(len, documents)))
    return model.errors(batch.ids, batch.latents, batch.layout, t, noise)


def predicted(model: Transfusion, given: Prompt, x_t: Tensor, t: int) -> Tensor:
    """The output (T, C) for a noisy image after a prompt, by one pass over all of it."""
    is_new = torch.arange(len(given.ids) + len(x_t)) >= len(given.ids)
    ids = torch.cat([given.ids, torch.zeros(len(x_t), dtype=torch.int64)])[None]
    latents = torch.cat([given.latents, x_t])[None]
    times = model.timestep_embedding(torch.where(is_new, t, 0))[None]
    layout = layout_of(torch.cat([given.kind, torch.full((len(x_t),), int(Kind.LATENT))]))
    x = model.embed(ids, latents, layout.kind, times)
    states = model.backbone(x, layout.position, layout.mask(MaskRule.FREE_SPANS))
    return model.denoise(states[:, -len(x_t) :], times[:, -1])[0]


def layout_of(kind: Tensor) -> SequenceLayout:
    """Of one page whose images are apart from each other."""
    span, number = [], -1
    for place, each in enumerate(kind.tolist()):
        number += each == Kind.LATENT and kind[place - 1].item() != Kind.LATENT
        span.append(number if each == Kind.LATENT else -1)
    zeros = torch.zeros_like(kind)
    position = torch.arange(len(kind), dtype=torch.float32)
    return SequenceLayout.make(
        *(part[None] for part in (kind, zeros, position, torch.tensor(span), zeros))
    )


def engine(
    model: Transfusion, config: SamplerConfig | None = None, **text: float
) -> TransfusionEngine:
    sampler = config or SamplerConfig(num_inference_steps=3)
    return TransfusionEngine(model, sampler, TextSamplerConfig(**text), MARKS)


def test_packed_pages_are_learned_as_each_is_alone() -> None:
    model, documents = tiny(), pages()
    assert len({len(document) for document in documents}) == len(documents)
    longest_first = sorted(documents, key=len, reverse=True)  # the order in which they are packed
    alone = [errors_of(model, [document], *draws(document)) for document in longest_first]
    t, noise = (torch.cat(parts) for parts in zip(*(draws(d) for d in longest_first), strict=True))
    assert len(t) == 4
    packed = errors_of(model, documents, t, noise)
    for part, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(parts, dim=-1), rtol=1e-5, atol=1e-5)


def test_spans_of_a_packed_row_are_free_in_themselves_alone() -> None:
    """By hand: two pages in a row, of which the first has two images."""
    two = finished(page(torch.ones(2, CHANNELS), [1], torch.ones(2, CHANNELS)))
    one = finished(page(torch.ones(2, CHANNELS)))
    layout = pack([two, one], row_length=99).layout
    assert layout.span[0].tolist() == [-1, -1, 0, 0, -1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2, -1]
    seen = layout.mask(MaskRule.FREE_SPANS).allowed
    assert seen is not None
    length = layout.kind.shape[1]
    wanted = torch.ones(length, length, dtype=torch.bool).tril()
    wanted[11:, :11] = False
    for first in (2, 7, 13):
        wanted[first, first + 1] = True
    assert torch.equal(seen[0, 0], wanted)


def test_each_state_sees_what_it_may_and_nothing_else() -> None:
    """A change of the last latent reaches its whole image and later words, not those before."""
    model = tiny()
    document = finished(page([1, 2], image(0), [3, 4]))
    t, noise = torch.tensor([300]), torch.randn(1, NUM_LATENTS, CHANNELS)
    other = noise.clone()
    other[0, -1] += 1.0
    before, after = (errors_of(model, [document], t, each) for each in (noise, other))
    changed = (before.latent != after.latent)[0].tolist()
    assert changed == [True] * NUM_LATENTS
    assert (before.text != after.text).tolist() == [False, False, True, True, True]
    words = document.ids.clone()
    words[-2] = 5
    other_word = replace(document, ids=words)
    assert torch.equal(errors_of(model, [other_word], t, noise).latent, before.latent)


def test_an_image_that_is_only_read_is_fed_clean() -> None:
    """No draw decides what a caption after it costs; were the image learned, the draw would."""
    model, words = tiny(), [4, 2]
    read = pack([finished(page(image(1), words, learn=[False]))], 99)
    learned = pack([finished(page(image(1), words))], 99)
    costs = {}
    for name, batch in (("read", read), ("learned", learned)):
        for seed in (0, 1):
            losses = model(batch.ids, batch.latents, batch.layout, Draws(generator(seed)))
            costs[name, seed] = losses.text
            assert losses.latent.shape == (1, NUM_LATENTS if name == "learned" else 0)
    assert torch.equal(costs["read", 0], costs["read", 1])
    assert not torch.allclose(costs["learned", 0], costs["learned", 1])
    clean = torch.zeros(1, dtype=torch.int64), torch.zeros(1, NUM_LATENTS, CHANNELS)
    at_zero = errors_of(model, [finished(page(image(1), words))], *clean).text
    torch.testing.assert_close(at_zero, costs["read", 0], rtol=1e-3, atol=1e-3)


def test_one_timestep_for_an_image_and_a_draw_for_each() -> None:
    model, batch = tiny(), pack(pages(), 99)
    first, again, other = (
        model(batch.ids, batch.latents, batch.layout, Draws(generator(seed))) for seed in (0, 0, 1)
    )
    assert first.latent.shape == first.timesteps.shape == (1, 4 * NUM_LATENTS)
    by_image = first.timesteps.view(4, NUM_LATENTS)
    assert (by_image == by_image[:, :1]).all()
    assert by_image[:, 0].unique().numel() == 4
    assert torch.equal(first.latent, again.latent)
    assert not torch.equal(first.timesteps, other.timesteps)


def test_the_error_is_that_of_the_state_at_the_latent_itself() -> None:
    """``errors`` against the same prediction made from the noisy page, step by step."""
    model, document = tiny(), finished(page([1, 2], image(0), [3]))
    t, noise = torch.tensor([400]), torch.randn(1, NUM_LATENTS, CHANNELS)
    x_t = model.schedule.add_noise(image(0), noise[0], t.expand(NUM_LATENTS))
    output = predicted(model, prompt(page([1, 2]), draw=True), x_t, 400)
    target = model.schedule.target(image(0), noise[0], t.expand(NUM_LATENTS))
    found = errors_of(model, [document], t, noise).latent[0]
    torch.testing.assert_close(found, (output - target).square().sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "builder",
    [page([3, 1, 2]), page(image(0)).tokens([MARKS.eos])],
    ids=["words", "image"],
)
def test_every_weight_has_a_gradient_whatever_the_batch(builder) -> None:
    model, batch = tiny(), pack([builder.finish("page")], 99)
    losses = model(batch.ids, batch.latents, batch.layout, Draws(generator(0)))
    is_text = losses.text.numel() > 0
    assert (losses.latent.numel() > 0) is not is_text
    (losses.latent.sum() + losses.text.sum()).backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad.any()}
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    heads = ("text_head.", "text_norm."), ("head.", "final.", "latent_", "timestep_embedding.")
    wanted, idle = heads if is_text else heads[::-1]
    assert not [name for name in moved if name.startswith(idle)]
    asked = [n for n, _ in model.named_parameters() if n.startswith(("backbone.", *wanted))]
    assert set(asked) <= moved


def test_matching_takes_the_depth_that_comes_nearest() -> None:
    """At the paper's size: 24 layers 2,048 wide, a head of 6 layers."""
    backbone = TransformerConfig(
        hidden_size=2048, num_layers=24, num_heads=16, intermediate_size=6144
    )
    head = DiffusionHeadConfig(num_layers=6, intermediate_size=6144)
    reference = LatentLMConfig(
        backbone=backbone, head=head, latent_channels=16, vocab_size=100_000, predicts_text=True
    )
    found = matching(reference, num_latents=256)
    assert (found.backbone, found.num_latents, found.vocab_size) == (backbone, 256, 100_000)
    sizes = {
        layers: num_parameters(found.model_copy(update={"head_layers": layers}))
        for layers in range(1, 9)
    }
    wanted = num_parameters(reference)
    assert found.head_layers == min(sizes, key=lambda layers: abs(sizes[layers] - wanted))
    assert abs(sizes[found.head_layers] / wanted - 1) < 0.02
    tiny_model = tiny()
    counted = sum(weight.numel() for weight in tiny_model.parameters())
    assert num_parameters(tiny_model.config) == counted


def test_a_width_that_the_head_cannot_have_is_refused() -> None:
    backbone = {"hidden_size": 30, "num_layers": 1, "num_heads": 5, "intermediate_size": 8}
    with pytest.raises(ConfigError, match="multiple of 4"):
        build(TransfusionSize, {"backbone": backbone, "head_layers": 1}, "here")


def test_it_learns_four_captioned_images_in_both_directions() -> None:
    model = Transfusion(tiny_config(hidden_size=64))
    captions = [[number, 4, (number * 3) % 4] for number in range(4)]
    images = [image(number) for number in range(4)]
    documents = [
        finished(page(words, pixels)) for words, pixels in zip(captions, images, strict=True)
    ]
    documents += [
        finished(page(pixels, words, learn=[False]))
        for words, pixels in zip(captions, images, strict=True)
    ]
    batch = pack(documents * 2, row_length=2 * max(map(len, documents)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        losses = model(batch.ids, batch.latents, batch.layout, Draws(generator("step", step)))
        loss = losses.text.mean() + 5 * losses.latent.mean() / CHANNELS
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ours = engine(model, SamplerConfig(num_inference_steps=20))
    drawn = ours.write(
        [
            ContinuationRequest(prompt(page(words), draw=True), seed=1, num_images=1)
            for words in captions
        ]
    )
    for number, found in enumerate(drawn):
        distances = torch.stack([(found.pieces[0] - each).square().mean() for each in images])
        assert distances.argmin() == number
        assert distances[number] < 0.05
    told = ours.write(
        [ContinuationRequest(prompt(page(pixels)), seed=1, num_tokens=6) for pixels in images]
    )
    assert [(found.pieces, found.ended_by) for found in told] == [
        ((tuple(words),), END) for words in captions
    ]
