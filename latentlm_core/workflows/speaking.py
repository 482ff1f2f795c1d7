"""From a text-to-speech model's export to audio: prompts, requests, latents, samples.

Audio comes out of the streaming decoder in any case, a latent at a time where somebody listens and
eight at a time otherwise; both give the same samples, up to the rounding of kernels.

Axes: S samples, T latent positions, C latent channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from latentlm_core.artifacts import LoadedGenerator
from latentlm_core.data.audio import ClipLimits, check_clip, prepare
from latentlm_core.data.base import Clip
from latentlm_core.data.utterances import SpokenText, Voice
from latentlm_core.draws import Draws
from latentlm_core.errors import ArtifactError, DataError
from latentlm_core.export_config import SAMPLE_OPTIONS, GeneratorExport, SpeechBounds
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import derive_seed, evaluating, generator
from latentlm_core.sampling import Mode, Prompt, SamplerConfig, Span, SpanEngine, SpanRequest
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.tokenizers.streaming import StreamingDecoder
from latentlm_core.tokenizers.text import TextTokenizer, has_content
from latentlm_core.workflows.drawing import matching_tokenizer
from latentlm_core.workflows.watch import (
    LOOK_BACK_SECONDS,
    REPETITION,
    SILENCE,
    WATCH_EVERY,
    is_repeating,
    is_silent,
    max_latents,
)

MAX_VOICE_SECONDS = 3600.0
"""Recordings of a speaker that are longer are a mistake."""

Sink = Callable[[Tensor], None]
"""Takes audio (S,) as it is made."""


@dataclass(frozen=True, slots=True)
class Line:
    """Something to say.

    Attributes:
        text: what.
        voice: recording of the speaker, None for whatever voice comes.
        original: the recording of this very text, where there is one.
        continues: the voice is the beginning of this utterance, whose text ``text`` is the whole.
    """

    text: str
    voice: Clip | None = None
    original: Clip | None = None
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Spoken:
    """A line that was said.

    Attributes:
        audio: (S,) float32 in [-1, 1].
        num_latents: T, those of the prompt not counted.
        ended_by: ``end`` (the model), ``bound``, ``silence`` or ``repetition``.
    """

    audio: Tensor
    num_latents: int
    ended_by: str


@dataclass(frozen=True, slots=True)
class Speaking:
    """A text-to-speech model with the tokenizer whose latents it learned.

    Attributes:
        loaded: the export.
        model: the LatentLM in it.
        tokenizer: the sigma-VAE of speech.
        text: the text tokenizer.
        bounds: how long the speech was that it learned.
    """

    loaded: LoadedGenerator
    model: LatentLM
    tokenizer: SigmaVAE
    text: TextTokenizer
    bounds: SpeechBounds

    @classmethod
    def of(
        cls, loaded: LoadedGenerator, vae: str | None, device: torch.device, progress: Progress
    ) -> Self:
        """With the tokenizer in the model's export, or with another copy of it.

        Raises:
            ArtifactError: it is no text-to-speech model, or the tokenizer is not its own.
        """
        model, text, bounds = loaded.model, loaded.text, loaded.config.speech
        require_speech(loaded.config, loaded.folder)
        assert text is not None
        assert bounds is not None
        assert isinstance(model, LatentLM)
        tokenizer = matching_tokenizer(loaded, vae, device, progress)
        return cls(loaded, model, tokenizer, text, bounds)

    @property
    def sample_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.tokenizer.speech.sample_rate

    @property
    def frame_rate(self) -> float:
        """Latents a second."""
        return self.sample_rate / self.tokenizer.speech.hop_length

    def engine(
        self,
        config: SamplerConfig,
        batch_size: int = 1,
        mode: Mode = "auto",
        num_lines: int = 1,
        progress: Progress = SILENT,
    ) -> SpanEngine:
        """An engine.

        Args:
            config: how latents are drawn.
            batch_size: lines that are said side by side.
            mode: how the decode step runs.
            num_lines: to be said in all.
            progress: hears why a mode cannot be had.
        """
        marks = self.text.marks
        num_steps = math.ceil(num_lines / batch_size) * self.bounds.longest // 2  # on average
        return SpanEngine(
            self.model, config, marks.go_on, marks.eod, batch_size, mode, num_steps, progress
        )

    @property
    def voice_limits(self) -> ClipLimits:
        """What a recording of a speaker must be like."""
        return ClipLimits(min_seconds=1.0 / self.frame_rate, max_seconds=MAX_VOICE_SECONDS)

    def check(self, line: Line) -> None:
        """Refuse what cannot be said.

        Raises:
            DataError: there is nothing to say, or the voice is too short, too quiet or broken.
        """
        if not has_content(line.text):
            raise DataError(f"There is nothing to say in {line.text!r}: it has no letter or digit.")
        if line.voice is not None:
            check_clip(line.voice, self.voice_limits)

    def fit(self, voice: Clip, progress: Progress) -> Clip:
        """A voice no longer than any utterance that the model learned.

        A longer one is cut, and its transcript, which is of the whole, is left out.
        """
        seconds = self.bounds.longest / self.frame_rate
        if len(voice.samples) <= seconds * voice.sample_rate:
            return voice
        progress.note(
            f"{voice.key} is cut to {seconds:.1f} s, the longest that the model has learned"
            f"{', and its transcript is left out' if voice.text else ''}."
        )
        return replace(
            voice, samples=voice.samples[: round(seconds * voice.sample_rate)], text=None
        )

    def say(
        self,
        engine: SpanEngine,
        lines: Sequence[Line],
        indices: Sequence[int],
        seed: int,
        on_end: Callable[[int, Spoken], None],
        sink: Sink | None = None,
    ) -> None:
        """Say lines, as many side by side as the engine takes.

        Args:
            engine: from ``engine``.
            lines: what to say.
            indices: the index of each within the whole set of samples.
            seed: of the whole set; a sample's own follows from it and its index.
            on_end: takes the place of a line among ``lines``, and the line as soon as it was said.
            sink: takes the audio of a single line while it is made.

        Raises:
            ArtifactError: the model drew values that are not finite.
        """
        seeds = [derive_seed(seed, "sample", index) for index in indices]
        voices = [self._encode(line, own) for line, own in zip(lines, seeds, strict=True)]
        requests = [
            self._request(line, voice, own)
            for line, voice, own in zip(lines, voices, seeds, strict=True)
        ]
        going: dict[int, _Utterance] = {}

        def hear(place: int, latent: Tensor) -> str | None:
            if place not in going:
                beginning = voices[place] if lines[place].continues else None
                going[place] = _Utterance(self, beginning, sink)
            return going[place].hear(latent)

        def end(place: int, span: Span) -> None:
            on_end(place, self._finish(going.pop(place), span))

        engine.draw(requests, hear, end)

    def _request(self, line: Line, voice: Tensor | None, seed: int) -> SpanRequest:
        layout = SpokenText(self.text, self.tokenizer.latent_channels, self.bounds.pace)
        bound = max_latents(line.text, self.bounds)
        if line.continues and voice is not None:
            beginning = voice
            prompt = layout.prefix([], line.text).latents(beginning, self.text.marks.go_on)
            free = layout.prefix([], None).latents(beginning, self.text.marks.go_on)
            bound = max(bound - len(beginning), 1)
        else:
            words = None if line.voice is None else line.voice.text
            prompts: list[Voice] = [] if voice is None else [(words, voice)]
            prompt, free = layout.prefix(prompts, line.text), layout.prefix([], None)
        made = [builder.finish("prompt") for builder in (prompt, free)]
        conditional, unconditional = (
            Prompt(one.ids, one.latents, one.kind, one.position) for one in made
        )
        return SpanRequest(conditional, unconditional, bound, seed)

    def _encode(self, line: Line, seed: int) -> Tensor | None:
        """Normalised latents (T, C) of the voice; what fills no latent is cut off."""
        if line.voice is None:
            return None
        samples = torch.from_numpy(prepare(line.voice, self.sample_rate))
        hop = self.tokenizer.speech.hop_length
        whole = samples[: len(samples) // hop * hop]
        device = next(self.tokenizer.parameters()).device
        with evaluating(self.tokenizer):
            posterior = self.tokenizer.encode(whole.to(device)[None, None])
        drawn = posterior.one(0).sample(Draws(generator(seed, "prompt"))).squeeze(0)
        return self.loaded.config.stats.normalise(drawn)

    def _finish(self, utterance: "_Utterance", span: Span) -> Spoken:
        if not span.latents.isfinite().all():
            raise ArtifactError(f"{self.loaded.folder} drew latents that are not finite.")
        return Spoken(utterance.finish(), len(span.latents), span.ended_by)


class _Utterance:
    """One line on its way from latents to audio, and the watches over it."""

    def __init__(self, speaking: Speaking, beginning: Tensor | None, sink: Sink | None) -> None:
        self._speaking = speaking
        self._decoder = StreamingDecoder(speaking.tokenizer)
        self._device = next(speaking.tokenizer.parameters()).device
        self._sink = sink
        self._audio: list[Tensor] = []
        self._heard: list[Tensor] = []
        self._waiting: list[Tensor] = []
        if beginning is not None:
            self._waiting += beginning.unbind(0)
            self._decode()
        self._num_given = len(self._audio)

    def hear(self, latent: Tensor) -> str | None:
        """Take a latent (C,); why the utterance should end, None if it may go on."""
        self._waiting.append(latent)
        self._heard.append(latent)
        is_due = len(self._heard) % WATCH_EVERY == 0
        if is_due or self._sink is not None:
            self._decode()
        return self._verdict() if is_due else None

    def finish(self) -> Tensor:
        """All of the audio, (S,)."""
        self._decode()
        self._take(self._decoder.finish())
        return torch.cat(self._audio)

    def _decode(self) -> None:
        if self._waiting:
            stats = self._speaking.loaded.config.stats
            raw = stats.denormalise(torch.stack(self._waiting)).to(self._device)
            self._waiting.clear()
            self._take(self._decoder.push(raw.unsqueeze(0)))

    def _take(self, audio: Tensor) -> None:
        samples = audio[0, 0].clamp(-1.0, 1.0).cpu()
        self._audio.append(samples)
        if self._sink is not None and len(samples):
            self._sink(samples)

    def _verdict(self) -> str | None:
        rate = self._speaking.sample_rate
        said = _end_of(self._audio[self._num_given :], round(LOOK_BACK_SECONDS * rate))
        if is_silent(said, rate):
            return SILENCE
        recent = math.ceil(LOOK_BACK_SECONDS * self._speaking.frame_rate)
        if is_repeating(torch.stack(self._heard[-recent:]), self._speaking.frame_rate):
            return REPETITION
        return None


def require_speech(config: GeneratorExport, folder: Path) -> None:
    """Refuse what is no text-to-speech model.

    Raises:
        ArtifactError: saying what it is, and what it takes.
    """
    if config.task != "speech":
        is_of_pages = config.task == "multimodal"
        what = "a model of text and images" if is_of_pages else "class-conditional"
        raise ArtifactError(
            f"{folder} is {what}, so it cannot read a text aloud.",
            hint=f"It takes {SAMPLE_OPTIONS[config.task]}.",
        )


def _end_of(pieces: Sequence[Tensor], length: int) -> Tensor:
    """The last pieces of audio that make ``length`` samples, or all there are."""
    taken: list[Tensor] = []
    for piece in reversed(pieces):
        taken.append(piece)
        length -= len(piece)
        if length <= 0:
            break
    return torch.cat(taken[::-1])
