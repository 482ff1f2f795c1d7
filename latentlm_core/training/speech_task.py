"""Training a speech sigma-VAE: mel distance, discriminators with feature matching, the KL term.

    loss = w_m mel(x, x') + w_w |x - x'| + w_g sum_k (1 - D_k(x'))^2 + w_f features(x, x') + beta kl

with x' decoded from a sampled z (sigma is drawn for each utterance) and kl = mu^2. The weights of
the first and the last two comparisons are those of the Descript Audio Codec (Kumar et al. 2023),
whose losses the paper's tokenizer has; the paper gives none, nor a beta.

Notable choices:
    networks may run under autocast, every loss is computed in float32;
    no adaptive weight: unlike pixels', these distances keep their scale over a training;
    the mel distance is freed before the critics are asked, whose weights are frozen meanwhile, so
    they get no gradient of the generator's and one backward pass serves both of their terms;
    without a waveform loss nothing asks for the recording's phase, so no figure compares samples.

Axes: B segments, S samples, T latent positions, C latent channels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.data.stream import MediaBatch
from latentlm_core.draws import Draws
from latentlm_core.runtime import seeded_init
from latentlm_core.tokenizers.mel import MelConfig, MelDistance
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.tokenizers.speech_critics import (
    SpeechCritic,
    SpeechCriticConfig,
    critic_loss,
    feature_distance,
    generator_loss,
    mean_logit,
)
from latentlm_core.training.tasks import Term, Terms, Turn
from latentlm_core.training.vae_terms import Judgement, latent_terms, noise_warnings

SILENCE = 1e-8
"""Added to energies, so that the SI-SNR of silence is a number."""


class SpeechLossConfig(Config):
    """The objective of a speech tokenizer."""

    kind: Literal["speech"] = "speech"
    """Speech: mel distance, multi-period and multi-scale-STFT discriminators."""
    mel_weight: NonNegativeFloat = 15.0
    """Factor of the mel distance, a sum over its scales, a mean over segments."""
    waveform_weight: NonNegativeFloat = 0.0
    """Factor of the absolute difference of samples; 0 is off, as it must be where the decoder finds
    a phase of its own (`spectral`)."""
    gan_weight: NonNegativeFloat = 1.0
    """Factor of the discriminators' verdict; 0 is off, feature matching with it."""
    feature_weight: NonNegativeFloat = 2.0
    """Factor of feature matching, the distance of the discriminators' activations."""
    gan_start_step: NonNegativeInt = 0
    """First step of the discriminators. Their learning rate warms up and decays from there on."""
    beta: NonNegativeFloat = 0.1
    """Factor of the KL term, a mean over all latent values (mu^2 for the sigma-VAE)."""
    mel: MelConfig = MelConfig()
    """Scales of the mel distance."""
    critic: SpeechCriticConfig = SpeechCriticConfig()
    """The discriminators' size and loss."""


class SpeechVAETask:
    """A ``Task`` that trains a sigma-VAE on ``MediaBatch``es of recordings (B, 1, S).

    Terms of the generator's turn:
        mel_distance (a segment), waveform (a sample; where it has a weight), kl (a latent value)
        and, from the start step on, gan and feature (a segment);
        logged only: std_mean, std_latent, noise_to_signal, as ``latent_terms`` says.
    Terms of the critic's turn: critic (a segment); logged only: critic_real, critic_fake, the mean
    logits. The critics hear reconstructions from a z of its own draw.

    Args:
        vae: the tokenizer.
        config: the objective.
        seed: of the critics' initial weights.

    Raises:
        ConfigError: a mel band is empty at the tokenizer's sample rate. Segments too short for the
            critics are refused with the first batch, not at the start step.
        ArtifactError: it is a tokenizer of images.
    """

    name = "vae"

    def __init__(self, vae: SigmaVAE, config: SpeechLossConfig, seed: int = 0) -> None:
        self.vae = vae
        self.config = config
        self.mel = MelDistance(vae.speech.sample_rate, config.mel)
        self.critic: SpeechCritic | None = None
        if config.gan_weight:
            with seeded_init("critic", seed):
                self.critic = SpeechCritic(config.critic)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The tokenizer and, where there are any, the critics."""
        return {"vae": self.vae} | ({"critic": self.critic} if self.critic else {})

    @property
    def exported(self) -> nn.Module:
        """The tokenizer."""
        return self.vae

    def turns(self, step: int) -> Sequence[Turn]:
        """The generator's turn and, from ``gan_start_step`` on, the critics'."""
        config = self.config
        critic = self.critic if step >= config.gan_start_step else None
        weights = {"mel_distance": config.mel_weight, "kl": config.beta}
        if config.waveform_weight:
            weights["waveform"] = config.waveform_weight
        loss = partial(self._generator_loss, critic)
        if critic is None:
            return [Turn("generator", self.vae, loss, weights, self._counts)]
        weights |= {"gan": config.gan_weight, "feature": config.feature_weight}
        verdict = partial(self._critic_loss, critic)
        return [
            Turn("generator", self.vae, loss, weights, self._counts),
            Turn("critic", critic, verdict, {"critic": 1.0}, self._counts, config.gan_start_step),
        ]

    def validate(self, batch: MediaBatch, generator: torch.Generator) -> Terms:
        """Terms of the reconstruction from the posterior's mean.

        Where samples are compared, si_snr is in dB, a segment. Nothing is drawn, so ``generator``
        is not used.
        """
        posterior = self.vae.encode(batch.media)
        reconstruction = self._decode(posterior.mode(), batch.media)
        terms = self._distances(batch.media, reconstruction) | latent_terms(posterior)
        if self.config.waveform_weight:
            ratios = si_snr(reconstruction, batch.media)
            terms["si_snr"] = Term(ratios.sum(), len(ratios))
        return terms

    def health(self, figures: Mapping[str, float]) -> Sequence[str]:
        """One warning where the encoder inflates mu to escape the noise.

        Args:
            figures: logged means by term name.
        """
        return noise_warnings(self.vae.config.posterior, figures, self.config.beta)

    def _counts(self, batch: MediaBatch) -> dict[str, int]:
        shape = batch.media.shape
        if self.critic is not None:
            self.critic.check(shape)
        num_latents = len(batch) * math.prod(self.vae.grid(shape))
        return {
            **dict.fromkeys(("mel_distance", "gan", "feature", "critic"), len(batch)),
            "waveform": batch.media.numel(),
            "kl": num_latents * self.vae.latent_channels,
        }

    def _generator_loss(
        self, critic: SpeechCritic | None, batch: MediaBatch, generator: torch.Generator
    ) -> Terms:
        media = batch.media
        posterior = self.vae.encode(media)
        reconstruction = self._decode(posterior.sample(Draws(generator, batch.rows)), media)
        samples = reconstruction.detach().requires_grad_()
        terms = {
            name: Judgement.of(term, samples).term(reconstruction)
            for name, term in self._distances(media, samples).items()
        }
        if critic is not None:
            terms |= self._gan_terms(critic, media, reconstruction)
        return terms | latent_terms(posterior)

    def _critic_loss(
        self, critic: SpeechCritic, batch: MediaBatch, generator: torch.Generator
    ) -> Terms:
        media, count = batch.media, len(batch)
        with torch.no_grad():
            latents = self.vae.encode(media).sample(Draws(generator, batch.rows))
            fake = self._decode(latents, media)
        real_verdicts, fake_verdicts = critic(media), critic(fake)
        loss = critic_loss(self.config.critic.loss, real_verdicts, fake_verdicts)
        return {
            "critic": Term(loss, count),
            "critic_real": Term(mean_logit(real_verdicts), count),
            "critic_fake": Term(mean_logit(fake_verdicts), count),
        }

    def _gan_terms(self, critic: SpeechCritic, media: Tensor, reconstruction: Tensor) -> Terms:
        count = len(media)
        with _frozen(critic):
            real, fake = critic(media), critic(reconstruction)
        return {
            "gan": Term(generator_loss(self.config.critic.loss, fake), count),
            "feature": Term(feature_distance(real, fake), count),
        }

    def _decode(self, latents: Tensor, media: Tensor) -> Tensor:
        """The reconstruction of ``media``, without what completes its last frame."""
        decoded = self.vae.decode(latents, self.vae.grid(media.shape))
        return decoded.float()[..., : media.shape[-1]]

    def _distances(self, media: Tensor, reconstruction: Tensor) -> Terms:
        distances = self.mel.to(media.device)(reconstruction, media)
        terms = {"mel_distance": Term(distances.sum(), len(media))}
        if self.config.waveform_weight:
            difference = F.l1_loss(reconstruction, media, reduction="sum")
            terms["waveform"] = Term(difference, media.numel())
        return terms


def si_snr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio (B,) in dB of recordings (B, 1, S)."""
    x, y = (
        audio.flatten(1) - audio.flatten(1).mean(1, keepdim=True) for audio in (estimate, reference)
    )
    scale = (x * y).sum(1, keepdim=True) / (y.square().sum(1, keepdim=True) + SILENCE)
    signal, noise = (scale * y).square().sum(1), (x - scale * y).square().sum(1)
    return 10.0 * torch.log10((signal + SILENCE) / (noise + SILENCE))


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Inside the block no weight of ``network`` enters a graph."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
