"""Text-to-speech sequences out of latent sets of speech."""

from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from latentlm_core.data.base import Clip
from latentlm_core.data.documents import Document
from latentlm_core.data.order import EpochOrder
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.utterances import SpeechDataConfig, SpeechSequences, SpokenText, transcripts
from latentlm_core.errors import DataError
from latentlm_core.layout import Kind
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from tests.tiny_latents import SPEECH_NETWORK, Recordings, encode_recordings, export_tokenizer

BYTES = TextTokenizer(TextConfig())
MARKS = BYTES.marks
CONFIG = SpeechDataConfig(batch_size=6, row_length=160, held_out=0.2)
COUNT = 30


class Spoken(Recordings):
    """Recordings that all have a text, in which the clip's number stands; every 7th no speaker."""

    def __getitem__(self, index: int) -> Clip:
        clip = super().__getitem__(index)
        return Clip(clip.samples, clip.sample_rate, f"clip {index}", clip.speaker, clip.key)


def encode(folder: Path, kind: PosteriorKind, source: Recordings | None = None) -> LatentSet:
    """At 100 latents a second: 10 to 50 of them a clip."""
    tokenizer, export = export_tokenizer(kind, folder / "vae", SPEECH_NETWORK)
    encode_recordings(folder / "set", tokenizer, export, source or Spoken(count=COUNT))
    return LatentSet.open(folder / "set")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> LatentSet:
    return encode(tmp_path_factory.mktemp("utterances"), PosteriorKind.GAUSSIAN)


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> LatentSet:
    """Its latents are their means, so they can be told in a batch."""
    return encode(tmp_path_factory.mktemp("utterances"), PosteriorKind.NONE)


def sequences(latents: LatentSet, seed: int = 0, **changes) -> SpeechSequences:
    return SpeechSequences(latents, BYTES, CONFIG.model_copy(update=changes), seed)


def parts(batch: SequenceBatch) -> list[tuple[list[str | None], list[torch.Tensor]]]:
    """Texts and runs of latents of every document of a batch, a dropped text as None.

    The documents lie whole in ``ids``; their ends in a row are where ``bos`` stands.
    """
    found = []
    for ids, values in zip(batch.ids.tolist(), batch.latents, strict=True):
        starts = [place for place, token in enumerate(ids) if token == MARKS.bos] + [len(ids)]
        for start, end in pairwise(starts):
            texts: list[str | None] = []
            runs: list[torch.Tensor] = []
            place = start + 1
            while place < end and ids[place] != 0:
                stop = ids.index(MARKS.bod, place)
                words = ids[place:stop]
                texts.append(None if words == [MARKS.null] else BYTES.decode(words))
                eod = ids.index(MARKS.eod, stop)
                assert set(ids[stop + 1 : eod]) == {MARKS.go_on}
                runs.append(values[stop + 1 : eod])
                place = eod + 1
            found.append((texts, runs))
    return found


def number_of(text: str) -> int:
    return int(text.split()[1])


def many(stream: SpeechSequences, count: int) -> list:
    return [part for number in range(count) for part in parts(stream.batch(number))]


def test_a_batch_depends_on_seed_and_number_alone(latents):
    wanted = [sequences(latents, seed=3).batch(number) for number in (5, 6)]
    stream = sequences(latents, seed=3).batches(count(5))
    for batch in wanted:
        again = next(stream)
        assert again.keys == batch.keys
        assert torch.equal(again.ids, batch.ids)
        assert torch.equal(again.latents, batch.latents)
    assert sequences(latents, seed=4).batch(5).keys != wanted[0].keys


def test_each_epoch_has_an_order_of_its_own():
    order = EpochOrder(20, held_out=0.1, seed=0, batch_size=1, name="set")
    epochs = [[order[place] for place in range(start, start + 18)] for start in (0, 18, 36)]
    assert [sorted(epoch) for epoch in epochs] == [order.train.tolist()] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert not set(order.held_out.tolist()) & set(order.train.tolist())


def test_a_document_is_text_and_latents_behind_a_prompt_of_the_speaker(exact):
    stream = sequences(exact, prompt_share=1.0, prompt_text_drop=0.0, condition_drop=0.0)
    held_out = {key for batch in stream.held_out() for key in batch.keys}
    lonely = 0
    for texts, runs in many(stream, 8):
        own = number_of(texts[-1])
        for text, run in zip(texts, runs, strict=True):
            record = exact.read_one(number_of(text))
            torch.testing.assert_close(run, stream.stats.normalise(record.mean))
        assert f"{own}.wav" not in held_out
        if own % 7 == 6:  # whose speaker is not known
            assert len(texts) == 1
            lonely += 1
            continue
        heard = number_of(texts[0])
        assert len(texts) == 2
        assert heard != own
        assert (heard % 2, heard % 7 == 6) == (own % 2, False)
        assert f"{heard}.wav" not in held_out
    assert lonely


def test_all_latents_and_their_ends_are_learnt_and_no_text(exact):
    stream = sequences(exact, prompt_share=1.0, condition_drop=0.0, batch_size=1)
    wanted = {MARKS.go_on: int(Kind.TEXT | Kind.LATENT), MARKS.eod: int(Kind.TEXT)}
    found = set()
    for number in range(4):
        batch = stream.batch(number)
        targets = batch.ids[0, 1:].tolist()
        assert batch.layout.predict[0].tolist() == [wanted.get(token, 0) for token in targets]
        found.add(targets.count(MARKS.eod))
    assert found == {1, 2}


def test_all_others_of_a_speaker_are_heard_equally_often(exact):
    stream = sequences(exact, held_out=0.0, batch_size=30)
    source = torch.Generator().manual_seed(0)
    others = [n for n in range(0, COUNT, 2) if n % 7 != 6 and n != 4]
    drawn = [stream._other(4, source) for _ in range(2000)]
    counts = np.bincount(drawn, minlength=COUNT)
    assert counts[others].sum() == 2000
    assert counts[others].min() > 0.7 * 2000 / len(others)
    assert counts[others].max() < 1.4 * 2000 / len(others)


def test_conditions_are_dropped_at_the_rates_asked_for(exact):
    stream = sequences(
        exact, batch_size=20, prompt_share=0.5, prompt_text_drop=0.3, condition_drop=0.2
    )
    found = many(stream, 30)
    dropped = [texts for texts, _ in found if texts[-1] is None]
    assert all(len(texts) == 1 for texts in dropped)  # the prompt goes with the text
    assert len(dropped) / len(found) == pytest.approx(0.2, abs=0.05)
    kept = [texts for texts, _ in found if texts[-1] is not None and number_of(texts[-1]) % 7 != 6]
    prompted = [texts for texts in kept if len(texts) == 2]
    assert len(prompted) / len(kept) == pytest.approx(0.5, abs=0.06)
    silent = [texts for texts in prompted if texts[0] is None]
    assert len(silent) / len(prompted) == pytest.approx(0.3, abs=0.08)


def test_held_out_utterances_are_validated_whole_and_the_same_every_time(exact):
    stream = sequences(exact)
    batches, again = list(stream.held_out()), list(stream.held_out())
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == int(0.2 * COUNT)
    for batch, other in zip(batches, again, strict=True):
        assert torch.equal(batch.latents, other.latents)
        for texts, _ in parts(batch):
            assert texts[-1] is not None
            own = number_of(texts[-1])
            assert len(texts) == (1 if own % 7 == 6 else 2)
            assert len(texts) == 1 or f"{number_of(texts[0] or 'clip 0')}.wav" not in keys
    epoch = {key for number in range(4) for key in stream.batch(number).keys}
    assert len(epoch) == COUNT - len(keys)
    assert not epoch & set(keys)
    assert list(sequences(exact, held_out=0.0).held_out()) == []


def test_drawn_latents_have_zero_mean_and_unit_variance(latents):
    stream = sequences(latents, batch_size=20, held_out=0.0)
    values = torch.cat([torch.cat(runs) for _, runs in many(stream, 20)])
    assert values.mean().item() == pytest.approx(0.0, abs=0.03)
    assert values.std().item() == pytest.approx(1.0, abs=0.06)


def test_one_sigma_an_utterance_is_drawn_anew_at_each_read(latents):
    stream = sequences(latents, held_out=0.0, condition_drop=0.0, prompt_share=0.0, batch_size=30)
    scales = []
    for number in range(10):
        for texts, (run,) in parts(stream.batch(number)):
            mean = latents.read_one(number_of(texts[0])).mean
            noise = stream.stats.denormalise(run) - mean
            half = len(noise) // 2
            first, second = noise[:half].std(), noise[half:].std()
            assert 0.4 < float(first / second) < 2.5  # of one scale throughout
            scales.append(float(noise.square().mean().sqrt()))
    assert len(set(scales)) == len(scales)
    assert np.mean(scales) == pytest.approx(0.75, rel=0.1)


def test_a_learned_posterior_is_drawn_with_its_own_variance(tmp_path):
    latents = encode(tmp_path, PosteriorKind.LEARNED)
    stream = sequences(latents, batch_size=20, held_out=0.0)
    values = torch.cat([torch.cat(runs) for _, runs in many(stream, 10)])
    assert values.std().item() == pytest.approx(1.0, abs=0.06)


def test_channels_have_their_own_statistics_where_that_is_asked_for(latents):
    assert len(sequences(latents).stats.shift) == 1
    assert len(sequences(latents, per_channel_stats=True).stats.shift) == 3


def test_a_prompt_that_does_not_fit_is_left_out(exact):
    longest = max(exact.lengths.tolist()) + len("clip 00") + 3
    stream = sequences(exact, row_length=longest, prompt_share=1.0, condition_drop=0.0)
    numbers = [len(texts) for texts, _ in many(stream, 8)]
    assert set(numbers) == {1, 2}


def test_an_utterance_longer_than_a_row_is_refused_before_anything_runs(exact):
    with pytest.raises(DataError, match=r"\.wav has \d+ elements, and a row") as caught:
        sequences(exact, row_length=40)
    assert "data.row_length=" in (caught.value.hint or "")


def test_a_set_smaller_than_a_batch_is_refused(exact):
    with pytest.raises(DataError, match="fewer than one batch of 31"):
        sequences(exact, batch_size=31)


def test_transcripts_must_all_be_there(tmp_path, exact):
    assert transcripts(exact) == [f"clip {index}" for index in range(COUNT)]
    silent = encode(tmp_path, PosteriorKind.GAUSSIAN, Recordings(count=8))
    with pytest.raises(DataError, match=r"no text for 4\.wav, and text-to-speech needs"):
        sequences(silent)


@pytest.mark.parametrize("pace", [0.0, 1.5])
def test_a_prefix_is_what_training_puts_before_the_latents(pace):
    layout, heard = SpokenText(BYTES, 3, pace), torch.ones(2, 3)
    prefix = layout.prefix([("ab", heard), (None, heard)], "c").finish("prefix")
    whole = layout.utterance([("ab", heard), (None, heard)], "c", torch.zeros(4, 3), "whole")
    for name in ("ids", "kind", "span", "position", "learn"):
        assert getattr(whole, name)[: len(prefix)].tolist() == getattr(prefix, name).tolist()
    m = MARKS
    assert prefix.ids.tolist() == [
        *(m.bos, ord("a"), ord("b"), m.bod, m.go_on, m.go_on, m.eod),
        *(m.null, m.bod, m.go_on, m.go_on, m.eod),
        *(ord("c"), m.bod),
    ]
    both, end = int(Kind.TEXT | Kind.LATENT), int(Kind.TEXT)
    assert prefix.learn.tolist() == [0] * 4 + [both, both, end, 0, 0, both, both, end, 0, 0]
    assert layout.prefix([], None).finish("none").ids.tolist() == [m.bos, m.null, m.bod]


# --- where text stands -----------------------------------------------------------------------


def positions(text: TextTokenizer, pace: float, words: str | None) -> list[float]:
    """Of bos, text, bod, three latents and eod."""
    return SpokenText(text, 3, pace).utterance([], words, torch.ones(3, 3), "").position.tolist()


def test_bytes_stand_where_their_latents_are_expected():
    assert positions(BYTES, 2.0, "ab") == [0, 3, 5, 1, 2, 3, 4, 5]
    assert positions(BYTES, 0.5, "é") == [0, 2.25, 2.75, 1, 2, 3, 4, 5]
    assert positions(BYTES, 2.0, None) == [0, 1, 2, 3, 4, 5, 6]


def test_a_token_of_several_bytes_stands_at_its_middle():
    pytest.importorskip("tokenizers", reason="a BPE needs tokenizers")
    bpe = TextTokenizer(TextConfig(kind="bpe"), [(ord(" "), ord("a")), (256, ord("b"))])
    assert bpe.encode("ab c") == [257, ord(" "), ord("c")]
    assert positions(bpe, 2.0, "ab c") == [0, 5, 9, 11, 1, 2, 3, 4, 5]


def test_text_without_a_pace_stands_before_its_latents():
    assert positions(BYTES, 0.0, "ab") == [0, 1, 2, 3, 4, 5, 6, 7]


def test_text_behind_a_prompt_is_counted_from_the_bod_of_its_own():
    prompts = [("ab", torch.ones(2, 3)), (None, torch.ones(1, 3))]
    document = SpokenText(BYTES, 3, 2.0).utterance(prompts, "c", torch.ones(2, 3), "")
    first, second = [0, 3, 5, 1, 2, 3, 4], [5, 6, 7, 8]
    assert document.position.tolist() == [*first, *second, 11, 9, 10, 11, 12]


@pytest.mark.parametrize("paced", [False, True])
def test_all_but_paced_text_stands_one_after_the_other(exact, paced):
    stream = sequences(exact, paced_text=paced, prompt_share=1.0, condition_drop=0.2)
    places = [index for index in range(COUNT) for _ in range(3)]
    source = torch.Generator().manual_seed(0)
    for index in places:
        document: Document = stream._document(index, source, True, index % 5 == 0)
        steady = document.ids >= BYTES.num_text_ids if paced else document.ids >= 0
        assert document.position[steady].tolist() == list(range(int(steady.sum())))
        assert bool((document.position.diff() != 1).any()) == (paced and index % 5 != 0)


def test_the_pace_is_of_the_bytes_that_the_model_reads(exact):
    pytest.importorskip("tokenizers", reason="a BPE needs tokenizers")
    total = int(exact.lengths.sum())
    read = sum(len(text.encode()) for text in transcripts(exact))
    assert sequences(exact).pace == pytest.approx(total / read)
    bpe = TextTokenizer(TextConfig(kind="bpe"), [(ord("c"), ord("l"))])
    stream = SpeechSequences(exact, bpe, CONFIG, seed=0)
    assert stream.pace == pytest.approx(total / (read + COUNT))  # the space before each text
    assert sequences(exact, paced_text=False).pace == 0.0


# --- a curriculum ----------------------------------------------------------------------------

GROWING = 8
"""Batches of the curriculum."""


def training_lengths(latents: LatentSet, stream: SpeechSequences) -> list[int]:
    """Of all utterances that are trained on, the shortest first."""
    held_out = {key for batch in stream.held_out() for key in batch.keys}
    numbers = [n for n in range(COUNT) if f"{n}.wav" not in held_out]
    return sorted(latents.lengths[numbers].tolist())


def lengths_of(latents: LatentSet, batch: SequenceBatch) -> list[int]:
    return [int(latents.lengths[int(key.removesuffix(".wav"))]) for key in batch.keys]


def test_the_first_batches_are_of_the_shortest_utterances(exact):
    """For a third of the curriculum the shortest eighth, then more; as many latents as ever."""
    streams = [sequences(exact, seed, curriculum_batches=GROWING) for seed in range(20)]
    longest = []
    for number in range(GROWING):
        found = []
        for stream in streams:
            lengths = training_lengths(exact, stream)
            growth = max(0.0, (number / GROWING - 1 / 3) * 3 / 2)
            pool = lengths[: int((1 + 7 * growth) / 8 * len(lengths))]
            usual = CONFIG.batch_size * np.mean(lengths)
            batch = stream.batch(number)
            assert len(batch) == int(round(usual * len(pool)) // sum(pool))
            assert max(lengths_of(exact, batch)) <= pool[-1]
            found.append(max(lengths_of(exact, batch)))
        longest.append(np.mean(found))
    assert longest[0] < 0.6 * longest[-1]
    assert longest[GROWING // 2] < longest[-1]


def test_nothing_held_out_is_in_a_curriculum(exact):
    stream = sequences(exact, curriculum_batches=99)
    held_out = {key for batch in stream.held_out() for key in batch.keys}
    assert not held_out & {key for number in range(99) for key in stream.batch(number).keys}


def test_after_a_curriculum_batches_are_as_without_one(exact):
    growing, plain = sequences(exact, curriculum_batches=GROWING), sequences(exact)
    assert growing.batch(GROWING - 1).keys != plain.batch(GROWING - 1).keys
    for number in (GROWING, GROWING + 5):
        ours, other = growing.batch(number), plain.batch(number)
        assert ours.keys == other.keys
        assert torch.equal(ours.latents, other.latents)


@pytest.mark.parametrize("start", [0, 3, GROWING - 1, GROWING, GROWING + 2])
def test_a_curriculum_can_be_resumed_at_any_batch(latents, start):
    settings = CONFIG.model_copy(update={"curriculum_batches": GROWING})
    stream = SpeechSequences(latents, BYTES, settings, seed=3).batches(count(start))
    for number in (start, start + 1):
        again = sequences(latents, seed=3, curriculum_batches=GROWING).batch(number)
        batch = next(stream)
        assert batch.keys == again.keys
        assert torch.equal(batch.ids, again.ids)
        assert torch.equal(batch.latents, again.latents)
        other = sequences(latents, seed=4, curriculum_batches=GROWING).batch(number)
        assert (other.keys, other.ids.shape) != (batch.keys, batch.ids.shape)
    stream.close()
