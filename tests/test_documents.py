"""Documents of tokens and latents, and the rows that they are packed into."""

import pytest
import torch

from latentlm_core.data.documents import Document, DocumentBuilder, pack
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.draws import Draws
from latentlm_core.errors import DataError
from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.runtime import generator
from tests.test_models import tiny_latent_lm

CHANNELS = 8
BOS, GO_ON, END = 8, 9, 10
TEXT, LATENT, BOTH = int(Kind.TEXT), int(Kind.LATENT), int(Kind.TEXT | Kind.LATENT)


def spoken(number: int, num_latents: int, num_prompt: int = 0) -> Document:
    """A text, a prompt of latents that is read alone, and latents to learn with their end."""
    source = generator("document", number)
    words = torch.randint(BOS, (1 + number % 4,), generator=source).tolist()
    builder = DocumentBuilder(CHANNELS).tokens([BOS, *words])
    if num_prompt:
        heard = torch.randn(num_prompt, CHANNELS, generator=source)
        builder.latents(heard, GO_ON, learn=False).tokens([END])
    said = torch.randn(num_latents, CHANNELS, generator=source)
    return builder.latents(said, GO_ON).tokens([END], learn=True).finish(f"utterance {number}")


def documents() -> list[Document]:
    return [spoken(n, 2 + 3 * n % 7, num_prompt=n % 3) for n in range(7)]


def predictor() -> LatentLM:
    return tiny_latent_lm(predicts_text=True)


def test_what_is_predicted_where_in_a_small_document() -> None:
    heard, said = torch.full((1, CHANNELS), 5.0), torch.full((2, CHANNELS), 7.0)
    document = (
        DocumentBuilder(CHANNELS)
        .tokens([BOS, 3])
        .latents(heard, GO_ON, learn=False)
        .tokens([4])
        .latents(said, GO_ON)
        .tokens([END], learn=True)
        .finish("a")
    )
    assert document.ids.tolist() == [BOS, 3, GO_ON, 4, GO_ON, GO_ON, END]
    assert document.latents[:, 0].tolist() == [0, 0, 5, 0, 7, 7, 0]
    assert document.kind.tolist() == [TEXT, TEXT, LATENT, TEXT, LATENT, LATENT, TEXT]
    assert document.learn.tolist() == [0, 0, 0, 0, BOTH, BOTH, TEXT]
    assert document.span.tolist() == [-1, -1, 0, -1, 1, 1, -1]
    assert document.position.tolist() == [0, 1, 2, 3, 4, 5, 6]
    batch = pack([document], row_length=9)
    layout = batch.layout
    assert batch.ids.tolist() == [document.ids.tolist()]
    assert torch.equal(batch.latents[0], document.latents)
    assert layout.kind.tolist() == [[TEXT, TEXT, LATENT, TEXT, LATENT, LATENT]]
    assert layout.predict.tolist() == [[0, 0, 0, BOTH, BOTH, TEXT]]
    assert layout.latent_targets.tolist() == [3, 4]
    assert layout.text_targets.tolist() == [3, 4, 5]
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert layout.span.tolist() == [[-1, -1, 0, -1, 1, 1]]
    assert not layout.is_packed


def test_tokens_that_stand_ahead_take_no_positions() -> None:
    """Each is counted from where the next element stands, which is where the first would."""
    document = (
        DocumentBuilder(CHANNELS)
        .tokens([BOS])
        .tokens([3, 4], ahead=[1.5, 2.25])
        .tokens([5])
        .latents(torch.ones(2, CHANNELS), GO_ON)
        .tokens([4], ahead=[0.5])
        .tokens([END])
        .finish("a")
    )
    assert document.position.dtype == torch.float32
    assert document.position.tolist() == [0, 2.5, 3.25, 1, 2, 3, 4.5, 4]
    whole = spoken(0, 12)
    layout = pack([document, whole], row_length=99).layout
    assert layout.position.dtype == torch.float32
    wanted = [*range(len(whole)), *document.position.tolist()[:-1]]
    assert layout.position[0].tolist() == wanted


def test_two_documents_of_a_row_by_hand() -> None:
    """The second is not predicted from the first, begins at 0 and has spans of its own."""
    first = spoken(1, num_latents=3, num_prompt=1)
    second = DocumentBuilder(CHANNELS).tokens([BOS, 2], learn=True).latents(torch.ones(1, 8), GO_ON)
    batch = pack([second.finish("b"), first], row_length=len(first) + 3)
    layout, size = batch.layout, len(first)
    assert batch.keys == ("b", "utterance 1")
    assert batch.ids.shape == (1, size + 3)
    assert layout.document[0].tolist() == [0] * size + [1] * 2
    assert layout.position[0].tolist() == [*range(size), 0, 1]
    assert layout.predict[0, size - 1 :].tolist() == [0, TEXT, BOTH]
    assert layout.span[0, : size - 1].tolist() == first.span[:-1].tolist()
    assert batch.layout.is_packed
    third = pack([first, spoken(2, 4, num_prompt=2)], row_length=99).layout
    assert third.span[0].unique().tolist() == [-1, 0, 1, 2, 3]


def test_rows_are_filled_first_fit_longest_first_and_no_longer_than_needed() -> None:
    sizes = (3, 9, 5, 4, 2)
    given = [DocumentBuilder(1).tokens([size] * size).finish(str(size)) for size in sizes]
    batch = pack(given, row_length=11)
    assert batch.keys == ("3", "9", "5", "4", "2")
    assert len(batch) == 5
    assert batch.ids.tolist() == [
        [9] * 9 + [2] * 2,
        [5] * 5 + [4] * 4 + [0] * 2,
        [3] * 3 + [0] * 8,
    ]
    assert pack(given, row_length=50).ids.shape == (1, 23)


def test_a_document_learns_packed_what_it_learns_alone() -> None:
    """States and losses, with several documents in a row and several rows."""
    model, whole = predictor(), documents()
    batch = pack(whole, row_length=40)
    num_rows = batch.ids.shape[0]
    assert num_rows > 1
    assert int(batch.layout.document.max()) > 0
    with torch.no_grad():
        states = model.states(batch.ids[:, :-1], batch.latents[:, :-1], batch.layout)
        found = 0
        for document in whole:
            alone = pack([document], row_length=40)
            wanted = model.states(alone.ids[:, :-1], alone.latents[:, :-1], alone.layout)[0]
            row, start = _place(batch, document)
            ours = states[row, start : start + len(document) - 1]
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
            targets = alone.layout.predict[0]
            theirs = batch.layout.predict[row, start : start + len(document) - 1]
            assert theirs.tolist() == targets.tolist()
            found += int((targets > 0).sum())
    assert found == int((batch.layout.predict > 0).sum())


def test_the_loss_of_a_batch_is_that_of_its_documents() -> None:
    model, whole = predictor(), documents()
    batch = pack(whole, row_length=40)
    with torch.no_grad():
        packed = (
            model(batch.ids, batch.latents, batch.layout, Draws(generator(0))).text.sort().values
        )
        texts = []
        for document in whole:
            alone = pack([document], row_length=40)
            texts.append(model(alone.ids, alone.latents, alone.layout, Draws(generator(0))).text)
    wanted = torch.cat(texts).sort().values
    torch.testing.assert_close(packed, wanted, rtol=1e-4, atol=1e-5)


def test_another_document_of_the_row_changes_nothing() -> None:
    model = predictor()
    shared, other = spoken(0, 9), spoken(4, 3)
    changed = DocumentBuilder(CHANNELS).tokens([7] * len(other), learn=True).finish("c")
    with torch.no_grad():
        states = []
        for company in (other, changed):
            batch = pack([shared, company], row_length=60)
            states.append(model.states(batch.ids[:, :-1], batch.latents[:, :-1], batch.layout))
    size = len(shared)
    assert torch.equal(states[0][:, :size], states[1][:, :size])
    assert not torch.allclose(states[0][:, size:], states[1][:, size:])


def _place(batch: SequenceBatch, document: Document) -> tuple[int, int]:
    """Row and first element of a document."""
    size = len(document)
    for row in range(batch.ids.shape[0]):
        for start in range(batch.ids.shape[1] - size + 1):
            if torch.equal(batch.latents[row, start : start + size], document.latents):
                return row, start
    raise AssertionError(f"{document.key} is in no row")


def test_padding_is_no_document_and_predicts_nothing() -> None:
    batch = pack([spoken(0, 12), spoken(1, 3)], row_length=15)
    row = batch.layout.document[1]
    assert (row == -1).any()
    padding = row == -1
    assert (batch.layout.predict[1][padding] == 0).all()
    assert (batch.layout.kind[1][padding] == 0).all()
    assert not batch.layout.is_packed


def test_a_document_longer_than_a_row_is_named() -> None:
    whole = spoken(3, 6)
    assert pack([whole], row_length=len(whole)).ids.shape == (1, len(whole))
    with pytest.raises(DataError, match=rf"utterance 3 has {len(whole)} elements, more than the"):
        pack([whole], row_length=len(whole) - 1)
