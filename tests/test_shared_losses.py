"""Losses of a batch whose rows are shared: terms and gradients add up to those of the whole."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentlm_core.data.documents import Document, DocumentBuilder, pack, pad
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.data.utterances import SpokenText
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.processes import current
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from latentlm_core.training import vae_task
from latentlm_core.training.lm_task import LMLossConfig, LMTask
from latentlm_core.training.tasks import Batch, Task, Terms
from tests import tiny_speech_task, tiny_vae_task
from tests.crew import crew
from tests.test_lm_task import make_batch, make_task
from tests.test_models import tiny_latent_lm, wake
from tests.test_transfusion import CHANNELS, MARKS, finished, image, page, pages, tiny

FIGURES = {"std_mean", "std_latent", "noise_to_signal"}
"""Of a share alone: they average."""
TEXT = TextTokenizer(TextConfig())
NUM_IDS = len(MARKS) + MARKS.bos


def writer(vocab_size: int = NUM_IDS) -> LMTask:
    """A LatentLM of text and latents."""
    model = tiny_latent_lm(predicts_text=True, latent_channels=CHANNELS, vocab_size=vocab_size)
    return LMTask(model, LMLossConfig())


def painter() -> LMTask:
    return LMTask(tiny(), LMLossConfig())


def utterances() -> list[Document]:
    """Of 2 to 7 latents, the last with a prompt."""
    layout = SpokenText(TEXT, CHANNELS, pace=1.5)
    voices = [torch.randn(2 + n, CHANNELS, generator=generator("voice", n)) for n in range(6)]
    alone = [layout.utterance([], f"say {n}", voice, str(n)) for n, voice in enumerate(voices)]
    return [*alone, layout.utterance([("hi", voices[0])], None, voices[3], "prompted")]


def loss_and_gradients(
    task: Task, batch: Batch, whole: Batch, turn_index: int = 0
) -> tuple[Terms, list[Tensor | None]]:
    """Terms of a turn, and gradients of its objective over the counts of the whole batch."""
    turn = task.turns(0)[turn_index]
    assert turn.counts is not None
    counts = turn.counts(whole)
    for module in task.modules.values():
        module.zero_grad()
    terms = turn.loss(batch, generator("loss"))
    weighted = [
        turn.weights[name] * term.total / max(counts[name], 1)
        for name, term in terms.items()
        if name in turn.weights
    ]
    torch.stack(weighted).sum().backward()
    assert {name: term.count for name, term in terms.items() if name in turn.weights} == {
        name: count for name, count in turn.counts(batch).items() if name in turn.weights
    }
    return terms, [parameter.grad for parameter in turn.module.parameters()]


def assert_shares_add_up(
    whole: tuple[Terms, list[Any]], shares: Sequence[tuple[Terms, list[Any]]]
) -> None:
    terms, gradients = whole
    assert all(gradient is not None for _, part in shares for gradient in part)
    for name in terms.keys() - FIGURES:
        total = sum(part[name].total.detach() for part, _ in shares)
        torch.testing.assert_close(total, terms[name].total.detach(), rtol=1e-5, atol=1e-5)
        assert sum(part[name].count for part, _ in shares) == terms[name].count
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for gradient, *parts in zip(gradients, *(part for _, part in shares), strict=True):
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-4, atol=5e-5 * scale)


SEQUENCES: dict[str, tuple[Callable[[], Any], Callable[[], SequenceBatch]]] = {
    "classes": (lambda: make_task("latent-lm"), make_batch),
    "dit": (lambda: make_task("dit"), make_batch),
    "pages": (writer, lambda: pad(pages())),
    "packed pages": (writer, lambda: pack([*pages(), *pages()], 24)),
    "speech": (lambda: writer(TEXT.vocab_size), lambda: pack([*utterances(), *utterances()], 36)),
    "transfusion": (painter, lambda: pad(pages())),
    "packed transfusion": (painter, lambda: pack([*pages(), *pages()], 24)),
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_shares_of_sequences_add_up(kind, count):
    make, batch = SEQUENCES[kind]
    task, whole = make(), batch()
    wake(task.modules["model"])
    shares = [loss_and_gradients(task, whole.share(index, count), whole) for index in range(count)]
    assert_shares_add_up(loss_and_gradients(task, whole, whole), shares)


def test_the_shares_above_include_some_without_latents():
    counts = [len(pad(pages()).share(index, 4).layout.latent_targets) for index in range(4)]
    assert 0 in counts
    assert sum(counts) > 0


def no_latents() -> list[Document]:
    return [finished(page([1, 2])), finished(page(image(0), [3], learn=[False]))]


def no_text() -> list[Document]:
    builder = DocumentBuilder(CHANNELS).tokens([MARKS.bos, MARKS.bod])
    return [builder.latents(image(0)).tokens([MARKS.eod]).finish("mute")]


def nothing() -> list[Document]:
    return [DocumentBuilder(CHANNELS).tokens([MARKS.bos, 1, 2]).finish("read")]


@pytest.mark.parametrize("documents", [no_latents, no_text, nothing])
@pytest.mark.parametrize("make", [writer, painter])
def test_what_is_not_there_has_no_gradient_but_is_in_the_graph(make, documents):
    """Else processes would wait for a gradient that one of them does not have."""
    task, batch = make(), pad(documents())
    _, gradients = loss_and_gradients(task, batch, batch)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    model, head = task.model, "text_head" if documents is no_text else "final"
    if isinstance(model, Transfusion) or head == "text_head":
        idle = getattr(model, head)
    else:
        idle = model.head.final
    assert isinstance(idle, nn.Module)
    assert not any(parameter.grad.any() for parameter in idle.parameters())


# Tokenizers


class Together:
    """The processes that share a batch, as threads."""

    def __init__(self, count: int) -> None:
        self._given: list[Tensor] = []
        self._met = Barrier(count, self._add, timeout=60)

    def sharing(self, count: int) -> "Together":
        assert count == self._met.parties
        return self

    def sum(self, tensor: Tensor) -> Tensor:
        self._given.append(tensor)
        self._met.wait()
        return self._total

    def _add(self) -> None:
        self._total = torch.stack(self._given).sum(0)
        self._given = []


def images_task(kind: PosteriorKind) -> vae_task.VAETask:
    task = tiny_vae_task.task(kind, gan_weight=0.5, gan_start_step=0)
    wake(task.vae)
    return task


@pytest.mark.parametrize("kind", [PosteriorKind.GAUSSIAN, PosteriorKind.LEARNED])
@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_images_add_up(count, kind, monkeypatch):
    task, batch = images_task(kind), tiny_vae_task.batch(6)
    wanted = [loss_and_gradients(task, batch, batch, turn) for turn in range(2)]
    together = Together(count)
    monkeypatch.setattr(vae_task, "current", lambda: together)
    for turn in range(2):

        def share(index: int, turn: int = turn) -> tuple[Terms, list[Tensor | None]]:
            return loss_and_gradients(deepcopy(task), batch.share(index, count), batch, turn)

        with ThreadPoolExecutor(count) as threads:
            assert_shares_add_up(wanted[turn], list(threads.map(share, range(count))))
    assert float(wanted[0][0]["gan_pull"].total) > 0


def test_a_share_that_pulls_for_itself_would_not_add_up(monkeypatch):
    """The adaptive weight is a ratio, so that of a share is another one."""
    task, batch = images_task(PosteriorKind.GAUSSIAN), tiny_vae_task.batch(6)
    terms, _ = loss_and_gradients(task, batch, batch)
    monkeypatch.setattr(vae_task, "current", lambda: Together(1))
    monkeypatch.setattr(Together, "sharing", lambda self, count: self)
    share, _ = loss_and_gradients(task, batch.share(0, 2), batch)
    ours, theirs = (t["gan_pull"].total / t["gan_pull"].count for t in (share, terms))
    assert abs(float(ours - theirs)) > 1e-3 * float(theirs)


@pytest.mark.parametrize("loss", ["least_squares", "hinge"])
@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_recordings_add_up(count, loss):
    critic = tiny_speech_task.SMALL_CRITIC.model_copy(update={"loss": loss})
    task = tiny_speech_task.task(waveform_weight=1.0)
    task.config = task.config.model_copy(update={"critic": critic})
    batch = tiny_speech_task.noises(6)
    for turn in range(2):
        shares = [
            loss_and_gradients(task, batch.share(index, count), batch, turn)
            for index in range(count)
        ]
        assert_shares_add_up(loss_and_gradients(task, batch, batch, turn), shares)


def test_four_processes_share_two_batches():
    """Ranks 0 and 1 share a batch of 6 images, 2 and 3 one of 5."""
    for terms, wanted in crew().run(4, pull_together):
        for name in ("gan", "gan_pull", "reconstruction", "kl"):
            assert terms[name] == pytest.approx(wanted[name], rel=1e-5)


def pull_together() -> tuple[dict[str, float], dict[str, float]]:
    """Sums over the shares of this process's batch, and the terms of the whole."""
    processes = current()
    assert processes.sharing(4) is processes
    assert processes.sharing(1).size == 1
    pair, first = processes.sharing(2), processes.rank // 2 * 2
    assert processes.sharing(2) == pair
    assert (pair.rank, pair.size) == (processes.rank % 2, 2)
    assert (pair.gather(processes.rank), pair.agree(first)) == ([first, first + 1], first)
    torch.manual_seed(0)
    task, batch = images_task(PosteriorKind.GAUSSIAN), tiny_vae_task.batch(6 - processes.rank // 2)
    whole, _ = loss_and_gradients(task, batch, batch)
    own, _ = loss_and_gradients(task, batch.share(pair.rank, 2), batch)
    names = sorted(own.keys() - FIGURES)
    return (
        {name: float(pair.sum(own[name].total.detach())) for name in names},
        {name: float(whole[name].total.detach()) for name in names},
    )
