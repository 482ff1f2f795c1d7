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
from latentlm_core.draws import Draws
from latentlm_core.models.cost import training_flops
from latentlm_core.models.dit import DiT
from latentlm_core.models.latent_lm import LatentLM, Losses
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.training.tasks import ElementErrors, Term, Terms, Turn, Work

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
        losses = self._errors(batch, generator)
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

    def element_errors(
        self, batch: SequenceBatch, generator: torch.Generator
    ) -> dict[str, ElementErrors]:
        """The errors of latents and of tokens."""
        losses, layout = self._errors(batch, generator), batch.layout
        length = layout.kind.shape[1]
        latent_rows = (layout.latent_targets // length).expand_as(losses.latent)
        errors = {
            "latent": ElementErrors(
                losses.latent.flatten(),
                latent_rows.flatten(),
                losses.timesteps.flatten(),
                band_edges(self.model.schedule.config.num_train_timesteps),
            )
        }
        if self.model.predicts_text:
            errors["text"] = ElementErrors(losses.text, layout.text_targets // length)
        return errors

    def work(self, batch: SequenceBatch) -> Work:
        """By the batch's layout."""
        return _work(self.model, batch)

    def _losses(self, batch: SequenceBatch, generator: torch.Generator) -> Terms:
        losses = self._errors(batch, generator)
        return self._terms(losses.latent, losses.text)

    def _errors(self, batch: SequenceBatch, generator: torch.Generator) -> Losses:
        draws = Draws(generator, batch.targets)
        return self.model(batch.ids, batch.latents, batch.layout, draws)  # type: ignore[no-any-return]

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
        error, t = self._errors(batch, generator)
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

    def element_errors(
        self, batch: SequenceBatch, generator: torch.Generator
    ) -> dict[str, ElementErrors]:
        """The errors of latents."""
        error, t = self._errors(batch, generator)
        rows = torch.arange(len(error), device=error.device)
        edges = band_edges(self.model.config.diffusion.num_train_timesteps)
        each_row, each_t = (part.unsqueeze(1).expand_as(error).flatten() for part in (rows, t))
        return {"latent": ElementErrors(error.flatten(), each_row, each_t, edges)}

    def work(self, batch: SequenceBatch) -> Work:
        """By the batch's layout."""
        return _work(self.model, batch)

    def _losses(self, batch: SequenceBatch, generator: torch.Generator) -> Terms:
        error, _ = self._errors(batch, generator)
        return self._terms(error)

    def _errors(self, batch: SequenceBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draws = Draws(generator, batch.rows)
        return self.model.loss(batch.latents[:, 1:], batch.ids[:, 0], draws)

    def _counts(self, batch: SequenceBatch) -> dict[str, int]:
        return {"latent": batch.latents[:, 1:].numel()}

    def _terms(self, error: Tensor) -> Terms:
        return {"latent": Term(error.sum(), error.numel() * self.model.config.latent_channels)}


def _work(model: LatentLM | Transfusion | DiT, batch: SequenceBatch) -> Work:
    layout = batch.layout
    return Work(layout.extent.positions, training_flops(model.config, layout))


def band_edges(num_timesteps: int) -> tuple[int, ...]:
    """Where the bands of timesteps begin, and T, where the last one ends."""
    return tuple(num_timesteps * band // NUM_BANDS for band in range(NUM_BANDS + 1))


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
    terms = {}
    for low, high in pairwise(band_edges(num_timesteps)):
        inside = (timesteps >= low) & (timesteps < high)
        count = int(inside.sum())
        if count:
            terms[f"latent/t{low}-{high - 1}"] = Term(error[inside].sum(), count * channels)
    return terms
