"""What differs between training a tokenizer of images and one of speech: batches, losses, pictures.

Axes: B examples, S audio samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from latentlm_core.data.audio import prepare, write_wav
from latentlm_core.data.base import SkippedItem, Source, SpeechSource
from latentlm_core.data.media import to_tensor
from latentlm_core.data.sources import open_with_held_out, spread
from latentlm_core.data.speech_sources import open_speech_with_held_out
from latentlm_core.data.speech_stream import SpeechStream
from latentlm_core.data.stream import MediaStream
from latentlm_core.errors import DataError
from latentlm_core.evaluation.image_sets import image_source
from latentlm_core.figures import comparison_grid, spectrogram_pairs
from latentlm_core.progress import Progress
from latentlm_core.recipes import VAERecipe
from latentlm_core.recipes.schema import ImageDataConfig, SegmentDataConfig
from latentlm_core.runtime import evaluating
from latentlm_core.tokenizers.lpips import load_lpips
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.training.speech_task import SpeechLossConfig, SpeechVAETask
from latentlm_core.training.vae_task import VAELossConfig, VAETask

NUM_PICTURED = 32
"""Held-out images that are shown beside their reconstructions."""
NUM_HEARD = 6
"""Held-out recordings that are shown and written beside their reconstructions."""


class VAEJob(Protocol):
    """One modality's share of ``train_vae``."""

    @property
    def plan(self) -> dict[str, Any]:
        """Sizes, before anything runs."""

    def task(self, device: torch.device, progress: Progress) -> VAETask | SpeechVAETask:
        """The losses.

        Raises:
            LatentLMError: they need something that is not there.
        """

    def stream(self, progress: Progress) -> MediaStream | SpeechStream:
        """The batches."""

    def show(self, vae: SigmaVAE, folder: Path, device: torch.device) -> dict[str, str]:
        """Put held-out examples beside their reconstructions, into files; their paths by name."""


def make_job(data: str, config: VAERecipe, vae: SigmaVAE) -> VAEJob:
    """Open a data set for a recipe.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(config.data, ImageDataConfig):
        return ImageJob(*open_with_held_out(data), config, config.data, vae)
    return SpeechJob(*open_speech_with_held_out(data), config, config.data, vae)


class ImageJob:
    """Training on images (a ``VAEJob``)."""

    def __init__(
        self,
        train: Source,
        held_out: Source,
        config: VAERecipe,
        data: ImageDataConfig,
        vae: SigmaVAE,
    ) -> None:
        self._train, self._held_out = train, held_out
        self._config, self._data, self._vae = config, data, vae

    @property
    def plan(self) -> dict[str, Any]:
        """See ``VAEJob``."""
        side = self._vae.image_size
        return {
            "parameters": _num_parameters(self._vae),
            "latents": f"{'x'.join(map(str, self._vae.grid((3, side, side))))} "
            f"of {self._vae.latent_channels}",
            "training_images": len(self._train),
            "held_out_images": len(self._held_out),
            "epochs": _epochs(self._config, self._data.batch_size, len(self._train)),
        }

    def task(self, device: torch.device, progress: Progress) -> VAETask:
        """See ``VAEJob``."""
        loss = self._config.loss
        assert isinstance(loss, VAELossConfig)
        perceptual = (
            load_lpips(loss.perceptual_net, progress=progress).to(device)
            if loss.perceptual_weight
            else None
        )
        return VAETask(self._vae, loss, perceptual, self._config.trainer.seed)

    def stream(self, progress: Progress) -> MediaStream:
        """See ``VAEJob``."""
        return MediaStream(
            self._train,
            self._vae.image_size,
            self._data.batch_size,
            self._config.trainer.seed,
            flip=self._data.flip,
            num_workers=self._data.num_workers,
            held_out=self._held_out,
            progress=progress,
        )

    def show(self, vae: SigmaVAE, folder: Path, device: torch.device) -> dict[str, str]:
        """Images from all over the held-out part."""
        shown = image_source(spread(self._held_out, NUM_PICTURED), self._vae.image_size)
        media = to_tensor(next(shown.batches(NUM_PICTURED))).to(device)
        path = folder / "reconstructions.png"
        comparison_grid(media.cpu(), rebuild(vae, media).cpu(), path)
        return {"reconstructions": str(path)}


class SpeechJob:
    """Training on recordings (a ``VAEJob``)."""

    def __init__(
        self,
        train: SpeechSource,
        held_out: SpeechSource,
        config: VAERecipe,
        data: SegmentDataConfig,
        vae: SigmaVAE,
    ) -> None:
        self._train, self._held_out = train, held_out
        self._config, self._data, self._vae = config, data, vae

    @property
    def plan(self) -> dict[str, Any]:
        """See ``VAEJob``."""
        network = self._vae.speech
        return {
            "parameters": _num_parameters(self._vae),
            "latents": f"{network.sample_rate / network.hop_length:g} a second "
            f"of {self._vae.latent_channels}",
            "segment_seconds": round(self._segment_samples / network.sample_rate, 3),
            "training_clips": len(self._train),
            "held_out_clips": len(self._held_out),
            "speakers": len(self._train.classes),
        }

    def task(self, device: torch.device, progress: Progress) -> SpeechVAETask:
        """See ``VAEJob``."""
        loss = self._config.loss
        assert isinstance(loss, SpeechLossConfig)
        return SpeechVAETask(self._vae, loss, self._config.trainer.seed)

    def stream(self, progress: Progress) -> SpeechStream:
        """See ``VAEJob``."""
        return SpeechStream(
            self._train,
            self._vae.speech.sample_rate,
            self._segment_samples,
            self._data.batch_size,
            self._config.trainer.seed,
            self._held_out,
            self._data.limits,
            progress,
        )

    def show(self, vae: SigmaVAE, folder: Path, device: torch.device) -> dict[str, str]:
        """Spectrograms and wav files of recordings from all over the held-out part."""
        rate = self._vae.speech.sample_rate
        heard = _readable(spread(self._held_out, 2 * NUM_HEARD), NUM_HEARD)
        recordings = [torch.from_numpy(prepare(clip, rate)) for clip in heard]
        rebuilt = [
            rebuild(vae, recording.to(device)[None, None])[0, 0, : len(recording)].cpu()
            for recording in recordings
        ]
        path = folder / "reconstructions.png"
        titles = [clip.text or clip.key for clip in heard]
        spectrogram_pairs(recordings, rebuilt, rate, titles, path)
        for number, pair in enumerate(zip(recordings, rebuilt, strict=True)):
            for name, samples in zip(("recording", "reconstruction"), pair, strict=True):
                write_wav(folder / "heard" / f"{number}-{name}.wav", samples.numpy(), rate)
        return {"reconstructions": str(path), "heard": str(folder / "heard")}

    @property
    def _segment_samples(self) -> int:
        network = self._vae.speech
        hops = round(self._data.segment_seconds * network.sample_rate / network.hop_length)
        return max(1, hops) * network.hop_length


def rebuild(vae: SigmaVAE, media: Tensor) -> Tensor:
    """Media from the mean of its posterior, of the same shape but for a partial last latent."""
    with evaluating(vae):
        return vae.decode(vae.encode(media).mode(), vae.grid(media.shape))


def skipped_items(stream: MediaStream | SpeechStream) -> Sequence[SkippedItem]:
    """Everything that a stream left out."""
    return (*stream.skipped, *stream.skipped_held_out)


def _readable(source: SpeechSource, count: int) -> list[Any]:
    """The first clips of a source that are not broken."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index])
        except DataError:
            continue
        if len(found) == count:
            break
    return found


def _num_parameters(vae: SigmaVAE) -> int:
    return sum(parameter.numel() for parameter in vae.parameters())


def _epochs(config: VAERecipe, batch_size: int, num_examples: int) -> float:
    samples = config.trainer.total_steps * config.trainer.accumulate * batch_size
    return round(samples / num_examples, 2)
