"""Training a LatentLM or a baseline on sequences: the same batches, the same names of losses.

Axes: B rows, L fed positions, R noise repeats, N latents to predict, C latent channels.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.training.tasks import Term, Terms, Turn

NUM_BANDS = 4
"""Validation splits the diffusion loss into this many equal bands of timesteps."""


class LMLossConfig(Config):
    """The joint objective L = L_LM + alpha * L_Diff."""

    latent_weight: float = Field(default=5.0, gt=0.0)
    """alpha (the paper: about 5). With no text in the model it scales the whole gradient: AdamW
    evens that out, clipping sees it."""


class LMTask:
    """Cross-entropy and diffusion loss of text and latents (a ``training.tasks.Task``)."""

    name = "train-lm"

    def __init__(self, model: LatentLM | Transfusion, config: LMLossConfig) -> None:
        self.model = model
        self.modules: Mapping[str, nn.Module] = {"model": model}
        self.exported = model
        weights = {"latent": config.latent_weight, "text": 1.0}
        self._turn = Turn("model", model, self._losses, weights, self._counts)

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn, always the same."""
        return (self._turn,)

    def validate(self, batch: SequenceBatch, generator: torch.Generator) -> Terms:
        """The losses, and the diffusion loss by band of timesteps."""
        losses = self.model(batch.ids, batch.latents, batch.layout, generator)
        terms = self._terms(losses.latent, losses.text)
        return terms | loss_bands(
            losses.latent,
            losses.timesteps,
            self.model.schedule.config.num_train_timesteps,
            self.model.config.latent_channels,
        )

    def health(self, figures: Mapping[str, float]) -> Sequence[str]:
        """Nothing of this model calls for a warning yet."""
        return ()

    def _losses(self, batch: SequenceBatch, generator: torch.Generator) -> Terms:
        losses = self.model(batch.ids, batch.latents, batch.layout, generator)
        return self._terms(losses.latent, losses.text)

    def _counts(self, batch: SequenceBatch) -> dict[str, int]:
        config = self.model.config
        values = self.model.noise_repeats * config.latent_channels
        counts = {"latent": batch.layout.latent_targets.numel() * values}
        if self.model.predicts_text:
            counts["text"] = batch.layout.text_targets.numel()
        return counts

    def _terms(self, latent: Tensor, text: Tensor) -> Terms:
        channels = self.model.config.latent_channels
        terms = {"latent": Term(latent.sum(), latent.numel() * channels)}
        if self.model.predicts_text:
            terms["text"] = Term(text.sum(), text.numel())
        return terms


class DiTTask:
    """Diffusion loss of a DiT on the latents of class-conditional images."""

    name = "train-lm"

    def __init__(self, model: DiT, config: LMLossConfig) -> None:
        self.model = model
        self.modules: Mapping[str, nn.Module] = {"model": model}
        self.exported = model
        weights = {"latent": config.latent_weight}
        self._turn = Turn("model", model, self._losses, weights, self._counts)

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn, always the same."""
        return (self._turn,)

    def validate(self, batch: SequenceBatch, generator: torch.Generator) -> Terms:
        """The loss, and the loss by band of timesteps."""
        error, t = self.model.loss(batch.latents[:, 1:], batch.ids[:, 0], generator)
        config = self.model.config
        return self._terms(error) | loss_bands(
            error,
            t.unsqueeze(1).expand_as(error),
            config.diffusion.num_train_timesteps,
            config.latent_channels,
        )

    def health(self, figures: Mapping[str, float]) -> Sequence[str]:
        """Nothing of this model calls for a warning yet."""
        return ()

    def _losses(self, batch: SequenceBatch, generator: torch.Generator) -> Terms:
        error, _ = self.model.loss(batch.latents[:, 1:], batch.ids[:, 0], generator)
        return self._terms(error)

    def _counts(self, batch: SequenceBatch) -> dict[str, int]:
        return {"latent": batch.latents[:, 1:].numel()}

    def _terms(self, error: Tensor) -> Terms:
        return {"latent": Term(error.sum(), error.numel() * self.model.config.latent_channels)}


def loss_bands(error: Tensor, timesteps: Tensor, num_timesteps: int, channels: int) -> Terms:
    """The diffusion loss in equal bands of timesteps, 0 being almost clean.

    Args:
        error: any shape, squared error summed over channels.
        timesteps: of the same shape.
        num_timesteps: T of the noise law.
        channels: C.

    Returns:
        one term a band that has errors in it, named ``latent/t0-249`` and so on.
    """
    edges = [num_timesteps * band // NUM_BANDS for band in range(NUM_BANDS + 1)]
    terms = {}
    for low, high in pairwise(edges):
        inside = (timesteps >= low) & (timesteps < high)
        count = int(inside.sum())
        if count:
            terms[f"latent/t{low}-{high - 1}"] = Term(error[inside].sum(), count * channels)
    return terms
