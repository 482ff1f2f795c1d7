"""What differs between training on images of classes and on speech: the sequences.

A job has the batches (``stream``, which know the normalisation), the network for them (``size``),
the text tokenizer where there is text (``text``), sizes to show before anything runs (``plan``) and
the fields of the export that are of its kind alone (``facts``).
"""

from typing import Any

from latentlm_core.artifacts import SpeechBounds
from latentlm_core.data.packing import LatentDataConfig, LatentStream
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.utterances import SpeechDataConfig, SpeechSequences, transcripts
from latentlm_core.errors import ConfigError
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.recipes import LMRecipe
from latentlm_core.tokenizers.text import TextTokenizer, make_tokenizer


def make_job(latents: LatentSet, config: LMRecipe, read_ahead: int) -> "ClassJob | SpeechJob":
    """Sequences of a latent set for a recipe.

    Raises:
        ConfigError: the recipe is for other latents.
        DataError: the set lacks what the sequences need.
    """
    if isinstance(config.data, SpeechDataConfig):
        return SpeechJob(latents, config, config.data, read_ahead)
    return ClassJob(latents, config, config.data, read_ahead)


class ClassJob:
    """Images of classes."""

    def __init__(
        self, latents: LatentSet, config: LMRecipe, data: LatentDataConfig, read_ahead: int
    ) -> None:
        manifest = latents.manifest
        if latents.is_ragged:
            raise ConfigError(
                f"{manifest.name} holds speech, and this recipe is for images of classes.",
                hint="Name a recipe of speech, such as --recipe digit-strings.",
            )
        self._latents, self._config = latents, config
        self.stream = LatentStream(latents, data, config.trainer.seed, read_ahead)
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
    def facts(self) -> dict[str, Any]:
        """Fields of the export."""
        return {"grid": self._latents.manifest.fixed_grid}


class SpeechJob:
    """Text to speech."""

    def __init__(
        self, latents: LatentSet, config: LMRecipe, data: SpeechDataConfig, read_ahead: int
    ) -> None:
        manifest = latents.manifest
        if not latents.is_ragged:
            raise ConfigError(
                f"{manifest.name} holds images, and this recipe is for speech.",
                hint="Leave --recipe out, or see --list-recipes.",
            )
        if not isinstance(config.model, LatentLMSize):
            raise ConfigError("A DiT takes images; text-to-speech needs model.kind = latent-lm.")
        if config.sampler.guidance_schedule != "constant":
            raise ConfigError("Text-to-speech needs sampler.guidance_schedule = constant.")
        self._latents, self._config = latents, config
        self._texts = transcripts(latents)
        self.text = make_tokenizer(data.text, self._texts)
        self.stream = SpeechSequences(latents, self.text, data, config.trainer.seed, read_ahead)
        self.size = config.model.with_text(manifest.latent_channels, self.text.vocab_size)
        self._num_sequences = data.batch_size * config.trainer.accumulate

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
            "text_sha256": self.text.sha256,
            "speech": SpeechBounds(
                latents_per_character=average,
                slack=max(0.0, *beyond),
                longest=max(lengths),
                pace=self.stream.pace,
            ),
        }


def _epochs(config: LMRecipe, num_sequences: int, num_examples: int) -> float:
    return round(config.trainer.total_steps * num_sequences / num_examples, 2)
