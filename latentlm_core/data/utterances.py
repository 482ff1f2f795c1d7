"""From a latent set of speech to packed text-to-speech sequences.

    bos [prompt text, bod, prompt latents, eod] text, bod, latents, eod
    bos null, bod, latents, eod                      where the condition is dropped

The prompt is another utterance of the same speaker; null stands for its text where that is dropped,
so that a voice can be given without a transcript; a prompt that does not fit into the row is left
out. Text is read, never predicted; of every latent the model learns the latent itself and that the
latents go on, and after the last one that they end. So it learns where speech ends from the same
softmax that will write text in other models.

Which word belongs to which latents is not said anywhere, and a small model takes long to find out.
Two things help: text may stand where its latents are expected (for the rotary embedding, which sees
distances; compare the length-aware positions of text-to-speech models with cross-attention), and
batches may begin with the shortest utterances.

A batch is a function of (seed, its number) and of nothing else: order, prompts, dropped conditions
and sigma's noise are drawn anew for each, so resuming is starting at a number.

Axes: T latent positions, C latent channels.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.data.documents import Document, DocumentBuilder, pack
from latentlm_core.data.order import EpochOrder
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.data.shards import LatentRecord, LatentSet
from latentlm_core.draws import WHOLE, Share
from latentlm_core.errors import DataError
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer, has_content


class SpeechDataConfig(Config):
    """How batches are made of a latent set of speech."""

    kind: Literal["speech"] = "speech"
    """Text-to-speech sequences."""
    batch_size: int = Field(default=32, ge=1)
    """Utterances a batch (a micro-batch, where gradients are accumulated), prompts not counted."""
    row_length: int = Field(default=1024, ge=8)
    """Elements (tokens and latents) of a packed row at most."""
    curriculum_batches: int = Field(default=0, ge=0)
    """Batches over which utterances grow: for a third of them the shortest eighth alone, then more
    and more; short ones come in greater number, so that a batch has as many latents as ever. A
    model finds out what a word sounds like where there is one word to look at."""
    prompt_share: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of utterances that follow another one of their speaker, as a prompt."""
    prompt_text_drop: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the prompts whose transcript is dropped."""
    condition_drop: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of utterances without text and prompt, so that guidance works."""
    held_out: float = Field(default=0.02, ge=0.0, le=0.5)
    """Share of the utterances that is never trained on (at most 2,048): validation loss."""
    per_channel_stats: bool = False
    """Normalise each channel by its own statistics; the published code uses one scale for all."""
    paced_text: bool = True
    """Text stands where its latents are expected (``SpokenText``); false: in front of them."""
    text: TextConfig = TextConfig()
    """Bytes, or a BPE that is trained on the transcripts."""


NUM_MARKS = 3
"""Of an utterance without a prompt: ``bos``, ``bod``, ``eod``."""

SHORTEST = 0.125
"""Share of the utterances, the shortest ones, that a curriculum begins with."""
HOLD = 1 / 3
"""Share of a curriculum for which it stays with them."""

Voice = tuple[str | None, Tensor]
"""Transcript, if there is one, and normalised latents (T, C) of an utterance."""


class SpokenText:
    """How text and latents of speech are written as sequences, in training and in sampling.

    Args:
        text: the text tokenizer.
        latent_channels: C.
        pace: latents that a byte of text takes on average: text stands, for the rotary embedding,
            where its latents are expected, so that a state finds its word nearby from the first
            step on. 0: text stands in front of the latents, one token after the other.
    """

    def __init__(self, text: TextTokenizer, latent_channels: int, pace: float) -> None:
        self.text = text
        self.latent_channels = latent_channels
        self.pace = pace

    def prefix(self, prompts: Sequence[Voice], text: str | None) -> DocumentBuilder:
        """What stands before the latents of an utterance, ``bod`` included.

        Args:
            prompts: utterances of the speaker, which are learned like the last one.
            text: what is said; None where the condition is dropped.
        """
        marks, builder = self.text.marks, DocumentBuilder(self.latent_channels)
        builder.tokens([marks.bos])
        for words, latents in prompts:
            self._say(builder, words).latents(latents, marks.go_on)
            builder.tokens([marks.eod], learn=True)
        return self._say(builder, text)

    def utterance(
        self, prompts: Sequence[Voice], text: str | None, latents: Tensor, key: str
    ) -> Document:
        """A whole document: the prefix, the latents (T, C) to learn, and their end."""
        builder = self.prefix(prompts, text).latents(latents, self.text.marks.go_on)
        return builder.tokens([self.text.marks.eod], learn=True).finish(key)

    def _say(self, builder: DocumentBuilder, text: str | None) -> DocumentBuilder:
        """Append a text, or the mark of a dropped one, and ``bod``."""
        marks = self.text.marks
        if text is None:
            return builder.tokens([marks.null, marks.bod])
        ids = self.text.encode(text)
        if self.pace:
            sizes = self.text.num_bytes(ids)
            ends = list(accumulate(sizes))
            middles = [end - size / 2 for end, size in zip(ends, sizes, strict=True)]
            builder.tokens(ids, ahead=[1 + self.pace * at for at in middles])
        else:
            builder.tokens(ids)
        return builder.tokens([marks.bod])


class SpeechSequences:
    """Text-to-speech sequences from one latent set (a ``training.tasks.BatchStream``).

    Args:
        latents: a ragged set with transcripts, and speakers where it has them.
        text: the text tokenizer.
        config: how batches are made.
        seed: of the run.

    Attributes:
        stats: normalisation of the latents.
        pace: latents that a byte of text takes on average, 0 where text is not paced.

    Raises:
        DataError: an utterance has no transcript or does not fit into a row, or there are too few
            for one batch.
    """

    def __init__(
        self,
        latents: LatentSet,
        text: TextTokenizer,
        config: SpeechDataConfig,
        seed: int,
    ) -> None:
        manifest = latents.manifest
        _check_lengths(latents, text, config.row_length)
        self.latents = latents
        self.config = config
        self.stats: LatentStats = manifest.stats(latents.posterior, config.per_channel_stats)
        self.pace = _pace(latents, text) if config.paced_text else 0.0
        self._layout = SpokenText(text, manifest.latent_channels, self.pace)
        self._seed = seed
        self._order = EpochOrder(
            len(latents), config.held_out, seed, config.batch_size, manifest.name, latents.blocks
        )
        train = self._order.train
        self._by_length = train[latents.lengths[train].argsort(stable=True)]
        self._speakers = latents.labels
        self._of_speaker = _by_label(self._speakers, self._order.train)

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[SequenceBatch]:
        """A share of the batches of these numbers."""
        return (self.batch(number).share(*share) for number in numbers)

    def batch(self, number: int) -> SequenceBatch:
        """Training batch ``number`` of the endless run."""
        size = self.config.batch_size
        source = generator(self._seed, "batch", number)
        if number < self.config.curriculum_batches:
            indices = self._short(number, source)
        else:
            indices = [self._order[place] for place in range(number * size, (number + 1) * size)]
        return self._draw(indices, source, self.config.prompt_share, self.config.condition_drop)

    def _short(self, number: int, source: torch.Generator) -> list[int]:
        """Utterances of a batch of the curriculum, as many as make a usual batch's latents."""
        lengths = self.latents.lengths[self._by_length]
        progress = number / self.config.curriculum_batches
        growth = max(0.0, (progress - HOLD) / (1.0 - HOLD))
        count = max(1, int((SHORTEST + (1.0 - SHORTEST) * growth) * len(lengths)))
        size = round(self.config.batch_size * float(lengths.sum() / len(lengths)) * count)
        size //= int(lengths[:count].sum())
        return self._by_length[torch.randint(count, (size,), generator=source)].tolist()

    def held_out(self) -> Iterator[SequenceBatch]:
        """The validation batches: all with a prompt where there is one, no dropped conditions."""
        if not len(self._order.held_out):
            return
        for number, indices in enumerate(torch.split(self._order.held_out, self.config.batch_size)):
            source = generator(self._seed, "held-out batch", number)
            yield self._draw(indices.tolist(), source, prompt_share=1.0, condition_drop=0.0)

    def _draw(
        self,
        indices: Sequence[int],
        source: torch.Generator,
        prompt_share: float,
        condition_drop: float,
    ) -> SequenceBatch:
        dropped = (torch.rand(len(indices), generator=source) < condition_drop).tolist()
        prompted = (torch.rand(len(indices), generator=source) < prompt_share).tolist()
        documents = [
            self._document(index, source, is_prompted, is_dropped)
            for index, is_prompted, is_dropped in zip(indices, prompted, dropped, strict=True)
        ]
        return pack(documents, self.config.row_length)

    def _document(
        self, index: int, source: torch.Generator, is_prompted: bool, is_dropped: bool
    ) -> Document:
        record = self.latents.read_one(index)
        other = self._other(index, source) if is_prompted and not is_dropped else None
        prompts: list[Voice] = []
        if other is not None:
            voice = self.latents.read_one(other)
            is_silent = bool(torch.rand((), generator=source) < self.config.prompt_text_drop)
            words = None if is_silent else _transcript(voice)
            prompts.append((words, self.latents.draw(voice, self.stats, source)))
        text = None if is_dropped else _transcript(record)
        own = self.latents.draw(record, self.stats, source)
        document = self._layout.utterance(prompts, text, own, record.key)
        if len(document) <= self.config.row_length:
            return document
        return self._layout.utterance([], text, own, record.key)

    def _other(self, index: int, source: torch.Generator) -> int | None:
        """Another training utterance of the same speaker, if there is one."""
        candidates = self._of_speaker.get(int(self._speakers[index]), [])
        num_others = len(candidates) - (index in candidates)
        if not num_others:
            return None
        other = candidates[int(torch.randint(num_others, (), generator=source))]
        return candidates[-1] if other == index else other


def transcripts(latents: LatentSet) -> list[str]:
    """The transcript of every utterance of a set.

    Raises:
        DataError: one has none, or one with nothing to say.
    """
    texts = [latents.caption(index) or "" for index in range(len(latents))]
    for index, text in enumerate(texts):
        if not has_content(text):
            raise DataError(
                f"{latents.manifest.name} has no text for {latents.read_one(index).key}, and "
                "text-to-speech needs the transcript of every utterance.",
                hint="Tokenize data with transcripts: latentlm tokenize --data ...",
            )
    return texts


def _check_lengths(latents: LatentSet, text: TextTokenizer, row_length: int) -> None:
    """Refuse what would stop a run in its midst."""
    texts, lengths = transcripts(latents), latents.lengths.tolist()
    sizes = [
        NUM_MARKS + len(text.encode(words)) + length
        for words, length in zip(texts, lengths, strict=True)
    ]
    longest = max(sizes)
    if longest > row_length:
        key = latents.read_one(sizes.index(longest)).key
        raise DataError(
            f"{key} has {longest} elements, and a row (data.row_length) {row_length}.",
            hint=f"Say --set data.row_length={2 * longest}, so that a prompt fits in as well.",
        )


def _transcript(record: LatentRecord) -> str:
    return record.caption or ""


def _by_label(labels: Tensor, indices: Tensor) -> dict[int, list[int]]:
    """Indices by label; those without one (-1) have none to share."""
    found: dict[int, list[int]] = {}
    for index in indices.tolist():
        label = int(labels[index])
        if label >= 0:
            found.setdefault(label, []).append(index)
    return found


def _pace(latents: LatentSet, text: TextTokenizer) -> float:
    """Latents that a byte of text, as the tokenizer reads it, takes on average over a set."""
    num_bytes = sum(sum(text.num_bytes(text.encode(words))) for words in transcripts(latents))
    return float(latents.lengths.sum()) / num_bytes
