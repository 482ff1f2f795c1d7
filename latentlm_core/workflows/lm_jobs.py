"""What differs between training on images of classes, on speech, and on text with images.

A job has the batches (``stream``, which know the normalisation), the network for them (``size``),
the text tokenizer where there is text (``text``), sizes to show before anything runs (``plan``),
what a resumed run must have in common with its start (``origin``) and the fields of the export that
are of its kind alone (``facts``).
"""

from pathlib import Path
from typing import Any

from latentlm_core.data.mixture import MultimodalDataConfig
from latentlm_core.data.packing import LatentDataConfig, LatentStream
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.streamed_tables import STREAM
from latentlm_core.data.utterances import SpeechDataConfig, SpeechSequences, transcripts
from latentlm_core.errors import ConfigError
from latentlm_core.export_config import SpeechBounds
from latentlm_core.models.dit import DiTSize
from latentlm_core.models.latent_lm import LatentLMConfig, LatentLMSize
from latentlm_core.models.transfusion import TransfusionConfig, TransfusionSize
from latentlm_core.recipes import LMRecipe
from latentlm_core.tokenizers.text import TextTokenizer, make_tokenizer
from latentlm_core.workflows.training_data import OpenedMix, TrainingData


def make_job(data: TrainingData, config: LMRecipe) -> "ClassJob | SpeechJob | MultimodalJob":
    """Sequences of some data for a recipe.

    Raises:
        ConfigError: the recipe is for other data.
        DataError: the data lacks what the sequences need.
    """
    if isinstance(config.data, MultimodalDataConfig):
        return MultimodalJob(data, config, config.data)
    if isinstance(config.data, SpeechDataConfig):
        return SpeechJob(data.single, config, config.data)
    return ClassJob(data.single, config, config.data)


class ClassJob:
    """Images of classes."""

    def __init__(self, latents: LatentSet, config: LMRecipe, data: LatentDataConfig) -> None:
        manifest = latents.manifest
        if latents.is_ragged:
            raise ConfigError(
                f"{manifest.name} holds speech, and this recipe is for images of classes.",
                hint="Name a recipe of speech, such as --recipe digit-strings.",
            )
        if isinstance(config.model, TransfusionSize):
            raise ConfigError(_TRANSFUSION)
        self._latents, self._config = latents, config
        self.stream = LatentStream(latents, data, config.trainer.seed)
        self.size = config.model.complete(
            manifest.fixed_grid, manifest.latent_channels, self.stream.null_id + 1
        )
        self.text: TextTokenizer | None = None
        self._num_sequences = data.batch_size * config.trainer.accumulate

    @property
    def plan(self) -> dict[str, Any]:
        """Sizes."""
        return {
            "classes": len(self._latents.manifest.classes),
            "positions_per_step": self._num_sequences * self._latents.manifest.num_positions,
            "epochs": _epochs(self._config, self._num_sequences, len(self._latents)),
        }

    @property
    def origin(self) -> dict[str, Any]:
        """What the run learns from."""
        return _origin(self._latents, None)

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the export."""
        return {
            "grid": self._latents.manifest.fixed_grid,
            "classes": self._latents.manifest.classes,
        }


class SpeechJob:
    """Text to speech."""

    def __init__(self, latents: LatentSet, config: LMRecipe, data: SpeechDataConfig) -> None:
        manifest = latents.manifest
        if not latents.is_ragged:
            raise ConfigError(
                f"{manifest.name} holds images, and this recipe is for speech.",
                hint="Leave --recipe out, or see --list-recipes.",
            )
        if not isinstance(config.model, LatentLMSize):
            raise ConfigError("Text-to-speech needs model.kind = latent-lm; others take images.")
        if config.sampler.guidance_schedule != "constant":
            raise ConfigError("Text-to-speech needs sampler.guidance_schedule = constant.")
        self._latents, self._config = latents, config
        self._texts = transcripts(latents)
        self.text = make_tokenizer(data.text, self._texts)
        self.stream = SpeechSequences(latents, self.text, data, config.trainer.seed)
        self.size = config.model.with_text(manifest.latent_channels, self.text.vocab_size)
        self._num_sequences = data.batch_size * config.trainer.accumulate

    @property
    def origin(self) -> dict[str, Any]:
        """What the run learns from."""
        return _origin(self._latents, self.text)

    @property
    def plan(self) -> dict[str, Any]:
        """Sizes."""
        return {
            "speakers": len(self._latents.manifest.classes),
            "text_ids": self.text.num_text_ids,
            "utterances_per_step": self._num_sequences,
            "epochs": _epochs(self._config, self._num_sequences, len(self._latents)),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the export."""
        lengths = self._latents.lengths.tolist()
        sizes = [len(text.strip()) for text in self._texts]
        average = sum(lengths) / sum(sizes)
        beyond = (length - average * size for length, size in zip(lengths, sizes, strict=True))
        return {
            "grid": None,
            "classes": self._latents.manifest.classes,
            "text_sha256": self.text.sha256,
            "speech": SpeechBounds(
                latents_per_character=average,
                slack=max(0.0, *beyond),
                longest=max(lengths),
                pace=self.stream.pace,
            ),
        }


class MultimodalJob:
    """Text and images."""

    def __init__(
        self,
        data: TrainingData,
        config: LMRecipe,
        batches: MultimodalDataConfig,
    ) -> None:
        if isinstance(config.model, DiTSize):
            raise ConfigError("A DiT takes images of classes; text needs another model.kind.")
        latents = data.latents
        if latents is not None and latents.is_ragged:
            raise ConfigError(
                f"{latents.manifest.name} holds speech, and this recipe is of images."
            )
        self._data, self._config = data, config
        library = OpenedMix(data, batches, config.trainer.seed)
        channels = 1 if latents is None else latents.manifest.latent_channels
        self.text = library.text
        self.stream = library.mixture(channels)
        self.size = self._complete(config.model, channels)

    @property
    def origin(self) -> dict[str, Any]:
        """What the run learns from."""
        sets = self._data.sets
        parts = [
            {
                "kind": part.kind,
                "source": part.source if part.kind == "text" else sets[part.source].manifest.name,
                "documents": part.documents,
                "weight": part.weight,
            }
            for part in self._data.parts
        ]
        return {
            "mix": parts,
            "sets": {str(place): _origin(each, None) for place, each in enumerate(sets.values())},
            "text_sha256": self.text.sha256,
        }

    @property
    def plan(self) -> dict[str, Any]:
        """Sizes."""
        names = [
            f"{part.kind} {Path(part.documents or part.source).name}" for part in self._data.parts
        ]
        rates = self.stream.rates
        too_long = {
            name: round(share, 3)
            for name, share in zip(names, self.stream.left_out, strict=True)
            if share
        }
        return {
            "text_ids": self.text.num_text_ids,
            "elements_per_step": self.stream.config.batch_elements
            * self._config.trainer.accumulate,
            "documents_per_step": {
                name: round(rate * self._config.trainer.accumulate, 1)
                for name, rate in zip(names, rates, strict=True)
            },
            **({"too_long_share": too_long} if too_long else {}),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the export."""
        latents = self._data.latents
        return {
            "grid": None if latents is None else latents.manifest.fixed_grid,
            "classes": (),
            "text_sha256": self.text.sha256,
            "max_length": self.stream.config.row_length,
        }

    def _complete(
        self, size: LatentLMSize | TransfusionSize, channels: int
    ) -> LatentLMConfig | TransfusionConfig:
        if isinstance(size, LatentLMSize):
            return size.with_text(channels, self.text.vocab_size)
        latents = self._data.latents
        if latents is None:
            raise ConfigError("A Transfusion learns from images; text alone needs latent-lm.")
        return size.with_text(channels, self.text.vocab_size, latents.manifest.num_positions)


_TRANSFUSION = "A Transfusion learns from text and images; name a recipe whose data are a mix."


def _origin(latents: LatentSet, text: TextTokenizer | None) -> dict[str, Any]:
    manifest = latents.manifest
    return {
        "latents": manifest.name if latents.blocks is None else f"{STREAM}{manifest.name}",
        "data": manifest.data,
        "statistics": manifest.statistics.to_dict(),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "text_sha256": None if text is None else text.sha256,
    }


def _epochs(config: LMRecipe, num_sequences: int, num_examples: int) -> float:
    return round(config.trainer.total_steps * num_sequences / num_examples, 2)
