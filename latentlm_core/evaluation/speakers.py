"""Encoders of speakers: what makes two voices comparable.

    resemblyzer    the GE2E encoder in the package Resemblyzer, with weights in its wheel
    hf:ORG/NAME    an x-vector model of transformers, such as hf:microsoft/wavlm-base-plus-sv

Notable choices:
- Resemblyzer hears what its own preprocessing makes of a recording: -30 dBFS, long silences cut
  out by a voice detector. ``preprocess_wav`` makes quiet recordings louder only, and twice the
  volume then took a voice 0.05 away from itself; here loud ones are made quieter too.
- Its embeddings have no negative elements, so its similarities lie in [0, 1]; they are not
  comparable with those of another encoder.
- Audio without a voice has no embedding. Left to itself Resemblyzer gives silence a unit vector,
  and two silences a similarity of 1.

Axes: S samples, D features.
"""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from latentlm_core.data.audio import resample
from latentlm_core.data.base import Samples
from latentlm_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptFileError,
    MissingExtraError,
    did_you_mean,
)
from latentlm_core.evaluation.spoken_items import is_silent
from latentlm_core.files import sha256_file

ENCODERS = ("resemblyzer", "hf:ORG/NAME")
RESEMBLYZER_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
"""Of ``pretrained.pt`` in Resemblyzer 0.1.4."""
MIN_VOICE_SECONDS = 0.4
"""Less than this tells no speaker: it fills no context of an x-vector."""

Embedding = npt.NDArray[np.float32]
"""A voice (D,), of unit length."""


class SpeakerEncoder(Protocol):
    """What tells voices apart."""

    @property
    def name(self) -> str:
        """The model and which version of it, for reports."""

    def embed(self, samples: Samples, sample_rate: int) -> Embedding | None:
        """The voice in a recording (D,), of unit length; None where there is none.

        Args:
            samples: (S,).
            sample_rate: of the samples, in Hz; they are resampled.
        """


def load_speaker_encoder(
    name: str = "resemblyzer", device: torch.device | str = "cpu"
) -> SpeakerEncoder:
    """Load an encoder by its name, as this module's text lists them.

    Raises:
        ConfigError: unknown name.
        MissingExtraError: its package, or one that it needs, is not installed.
        ArtifactError: its model is not there or cannot be loaded.
        CorruptFileError: the packaged weights are not the pinned ones.
    """
    kind, _, model = name.partition(":")
    if name == "resemblyzer":
        return ResemblyzerEncoder(torch.device(device))
    if kind == "hf" and model:
        return XVectorEncoder(model, torch.device(device))
    raise ConfigError(f"There is no speaker encoder {name!r}. {did_you_mean(name, ENCODERS)}")


class ResemblyzerEncoder:
    """The LSTM of Resemblyzer (Wan et al. 2018), D = 256, behind its own preprocessing.

    Args:
        device: where it runs.

    Raises:
        LatentLMError: as ``load_speaker_encoder``.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = _import_resemblyzer()
        weights = Path(self._library.__file__).with_name("pretrained.pt")
        if sha256_file(weights) != RESEMBLYZER_SHA256:
            raise CorruptFileError(f"{weights} is not the file of Resemblyzer 0.1.4.")
        self._encoder = self._library.VoiceEncoder(device, verbose=False, weights_fpath=weights)
        self.name = f"resemblyzer-{version('resemblyzer')}@{RESEMBLYZER_SHA256[:8]} -30 dBFS"

    def embed(self, samples: Samples, sample_rate: int) -> Embedding | None:
        """See ``SpeakerEncoder``."""
        audio = self._library.audio
        if not _has_voice(samples, sample_rate):
            return None
        heard = resample(samples, sample_rate, audio.sampling_rate)
        heard = audio.normalize_volume(heard, audio.audio_norm_target_dBFS)
        voiced = audio.trim_long_silences(np.clip(heard, -1.0, 1.0))
        if len(voiced) < MIN_VOICE_SECONDS * audio.sampling_rate:
            return None
        return _unit(self._encoder.embed_utterance(voiced.astype(np.float32)))


class XVectorEncoder:
    """A model of transformers with an x-vector head, on the whole recording.

    Args:
        model: ORG/NAME on the hub, or a folder.
        device: where it runs.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: the model is not there, or has no x-vector head.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("transformers", f"The speaker encoder hf:{model}") from None
        transformers.utils.logging.disable_progress_bar()
        try:
            self._extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(model)
            network = transformers.AutoModelForAudioXVector.from_pretrained(model)
        except Exception as error:  # the library, the hub and the transport share no base class
            reason = " ".join(str(error).split())[:160].rstrip(".")
            raise ArtifactError(f"{model} cannot be loaded as x-vectors ({reason}).") from error
        if type(network).__name__ not in (network.config.architectures or ()):
            raise ArtifactError(f"{model} was not trained to tell speakers apart.")
        self._device = device
        self._network: Any = network.to(device).eval()
        commit = getattr(network.config, "_commit_hash", None)
        self.name = f"hf:{model}" + (f"@{commit[:8]}" if commit else "")

    @torch.inference_mode()
    def embed(self, samples: Samples, sample_rate: int) -> Embedding | None:
        """See ``SpeakerEncoder``."""
        if not _has_voice(samples, sample_rate):
            return None
        to_rate = int(self._extractor.sampling_rate)
        heard = resample(samples, sample_rate, to_rate)
        inputs = self._extractor(heard, sampling_rate=to_rate, return_tensors="pt")
        found = self._network(**{name: value.to(self._device) for name, value in inputs.items()})
        return _unit(found.embeddings[0].float().cpu().numpy())


def _import_resemblyzer() -> Any:
    """Import it silently: it still uses old names of SciPy, and pkg_resources."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import resemblyzer
    except ImportError as error:
        if error.name == "pkg_resources":
            raise MissingExtraError('"setuptools<82"', "Resemblyzer's voice detector") from None
        raise MissingExtraError("resemblyzer", "Speaker similarity", "sim") from None
    return resemblyzer


def _has_voice(samples: Samples, sample_rate: int) -> bool:
    """Whether a recording is long and loud enough to hold a voice."""
    return len(samples) >= MIN_VOICE_SECONDS * sample_rate and not is_silent(samples)


def _unit(vector: npt.NDArray[np.float32]) -> Embedding | None:
    """The vector at unit length; None where it has none."""
    length = float(np.linalg.norm(vector))
    return (vector / length).astype(np.float32) if length > 0 else None
