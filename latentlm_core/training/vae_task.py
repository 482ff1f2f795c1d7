"""Training an image sigma-VAE: reconstruction, perceptual distance, discriminator and the KL term.

    loss = w_r |x - x'|^p + w_p LPIPS(x, x') + w_g a (-D(x')) + beta kl,   p = 1 or 2

with x' decoded from a sampled z, kl = mu^2 for the sigma-VAE (paper, Eq. 6) and a the adaptive
weight of VQGAN. The noise only matters relative to the latents' spread, and the encoder is free to
inflate mu, so every step logs the two; ``VAETask.health`` speaks up when the noise is escaped.

Notable choices:
    networks may run under autocast, every loss is computed in float32;
    each judge of the pixels (distance, LPIPS, critic) is differentiated down to the pixels on its
    own and freed before the next, so their activations never lie in memory together, the adaptive
    weight costs no second pass through them, and the critic gets no gradient of the generator's.

Axes: B images, T latent positions, C latent channels, H W image.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from latentlm_core.config import Config
from latentlm_core.data.stream import MediaBatch
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.processes import current
from latentlm_core.tokenizers.build import build_critic
from latentlm_core.tokenizers.critics import (
    CriticConfig,
    adaptive_gan_weight,
    hinge_critic_loss,
    hinge_generator_loss,
)
from latentlm_core.tokenizers.lpips import LPIPS, PerceptualNet
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.training.tasks import Term, Terms, Turn
from latentlm_core.training.vae_terms import Judgement, figure, latent_terms, noise_warnings

PEAK = 2.0
"""Distance between black and white in [-1, 1], the peak of the PSNR."""


class VAELossConfig(Config):
    """The objective of an image tokenizer; the paper gives no weights but beta's (its code)."""

    kind: Literal["image"] = "image"
    """Images: pixels, LPIPS and a patch discriminator."""
    reconstruction: Literal["l1", "l2"] = "l2"
    """Distance of pixels: absolute or squared, a mean over all values."""
    reconstruction_weight: NonNegativeFloat = 1.0
    """Factor of the pixels' distance."""
    perceptual_weight: NonNegativeFloat = 0.0
    """Factor of LPIPS; 0 is off, 1 is usual. Needs the extra `lpips`."""
    perceptual_net: PerceptualNet = "vgg"
    """Backbone of LPIPS: `vgg` (usual as a loss) or `alex`."""
    gan_weight: NonNegativeFloat = 0.0
    """Factor of the discriminator's verdict, times the adaptive weight; 0 is off, 0.5 is usual."""
    gan_start_step: NonNegativeInt = 20_000
    """First step of the discriminator: reconstructions should be good by then. Its learning rate
    warms up and decays from there on."""
    adaptive_gan_weight: bool = True
    """Scale the verdict so that its gradient is as long as the reconstruction's (VQGAN)."""
    critic: CriticConfig = CriticConfig()
    """The discriminator's size."""
    beta: NonNegativeFloat = 1e-2
    """Factor of the KL term, a mean over all latent values (mu^2 for the sigma-VAE)."""


class VAETask:
    """A ``Task`` that trains a sigma-VAE on ``MediaBatch``es of images.

    Terms of the generator's turn:
        reconstruction (a value of a pixel), perceptual (an image), kl (a latent value) and, from
        the start step on, gan (a logit, already scaled by the adaptive weight);
        logged only: std_mean = std(mu), std_latent = std(z), noise_to_signal = RMS sigma / std(z),
        gan_pull = the adaptive weight. These are figures of one batch, written as Terms whose
        ``total / count`` is the figure; over several batches they average. So do the first three
        over the shares of a batch, while the adaptive weight is that of the whole batch in each.
    Terms of the critic's turn: critic (a logit); logged only: critic_real, critic_fake, the mean
    logits. The critic sees reconstructions from a z of its own draw.

    Args:
        vae: the tokenizer.
        config: the objective.
        perceptual: LPIPS, on the device of the training; wanted where its weight is not 0.
        seed: of the critic's initial weights.

    Raises:
        ConfigError: ``perceptual_weight`` is set and there is no ``perceptual``, or the images
            are too small for the critic.
    """

    name = "vae"

    def __init__(
        self,
        vae: SigmaVAE,
        config: VAELossConfig,
        perceptual: LPIPS | None = None,
        seed: int = 0,
    ) -> None:
        if config.perceptual_weight and perceptual is None:
            raise ConfigError(
                f"loss.perceptual_weight = {config.perceptual_weight} needs the weights of LPIPS; "
                "set it to 0 to train without."
            )
        self.vae = vae
        self.config = config
        self.perceptual = perceptual if config.perceptual_weight else None
        self._likeness = {"reconstruction": config.reconstruction_weight}
        if config.perceptual_weight:
            self._likeness["perceptual"] = config.perceptual_weight
        self.critic = build_critic(config.critic, seed) if config.gan_weight else None
        if self.critic is not None:
            self.critic.num_logits((vae.image_size, vae.image_size))

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The tokenizer and, where there is one, the critic."""
        return {"vae": self.vae} | ({"critic": self.critic} if self.critic else {})

    @property
    def exported(self) -> nn.Module:
        """The tokenizer."""
        return self.vae

    def turns(self, step: int) -> Sequence[Turn]:
        """The generator's turn and, from ``gan_start_step`` on, the critic's."""
        critic = self.critic if step >= self.config.gan_start_step else None
        weights = self._likeness | {"kl": self.config.beta}
        loss = partial(self._generator_loss, critic)
        if critic is None:
            return [Turn("generator", self.vae, loss, weights, self._counts)]
        weights["gan"] = self.config.gan_weight
        verdict, start = partial(self._critic_loss, critic), self.config.gan_start_step
        return [
            Turn("generator", self.vae, loss, weights, self._counts),
            Turn("critic", critic, verdict, {"critic": 1.0}, self._counts, start),
        ]

    def validate(self, batch: MediaBatch, generator: torch.Generator) -> Terms:
        """Terms of the reconstruction from the posterior's mean; psnr is in dB, an image.

        Images are clamped to [-1, 1] for the PSNR, which is at most 100 dB. Nothing is drawn, so
        ``generator`` is not used.
        """
        media = batch.media
        posterior = self.vae.encode(media)
        reconstruction = self._decode(posterior.mode(), media)
        error = (reconstruction.clamp(-1.0, 1.0) - media).square().mean(dim=(1, 2, 3))
        psnr = 10.0 * torch.log10(PEAK**2 / error.clamp_min(PEAK**2 * 1e-10))
        terms = self._distances(media, reconstruction) | latent_terms(posterior)
        return terms | {"psnr": Term(psnr.sum(), len(media))}

    def health(self, figures: Mapping[str, float]) -> Sequence[str]:
        """One warning where the encoder inflates mu to escape the noise.

        Args:
            figures: logged means by term name.
        """
        return noise_warnings(self.vae.config.posterior, figures, self.config.beta)

    def _counts(self, batch: MediaBatch) -> dict[str, int]:
        shape, num_images = batch.media.shape, len(batch.media)
        num_latents = num_images * math.prod(self.vae.grid(shape))
        counts = {
            "reconstruction": batch.media.numel(),
            "perceptual": num_images,
            "kl": num_latents * self.vae.latent_channels,
        }
        if self.critic is not None:
            counts["gan"] = counts["critic"] = num_images * self.critic.num_logits(shape)
        return counts

    def _generator_loss(
        self, critic: nn.Module | None, batch: MediaBatch, generator: torch.Generator
    ) -> Terms:
        media = batch.media
        posterior = self.vae.encode(media)
        reconstruction = self._decode(posterior.sample(Draws(generator, batch.rows)), media)
        pixels = reconstruction.detach().requires_grad_()
        likeness = {
            name: Judgement.of(term, pixels)
            for name, term in self._distances(media, pixels).items()
        }
        terms = {name: part.term(reconstruction) for name, part in likeness.items()}
        if critic is not None:
            logits = critic(pixels).float()
            verdict = Term(hinge_generator_loss(logits), logits.numel())
            gan = Judgement.of(verdict, pixels)
            terms |= self._gan_terms(gan, likeness, reconstruction, batch)
        return terms | latent_terms(posterior)

    def _critic_loss(
        self, critic: nn.Module, batch: MediaBatch, generator: torch.Generator
    ) -> Terms:
        media = batch.media
        with torch.no_grad():
            latents = self.vae.encode(media).sample(Draws(generator, batch.rows))
            fake = self._decode(latents, media)
        real_logits, fake_logits = critic(torch.cat([media, fake])).float().chunk(2)
        count = real_logits.numel()
        return {
            "critic": Term(hinge_critic_loss(real_logits, fake_logits), count),
            "critic_real": Term(real_logits.detach().sum(), count),
            "critic_fake": Term(fake_logits.detach().sum(), count),
        }

    def _decode(self, latents: Tensor, media: Tensor) -> Tensor:
        return self.vae.decode(latents, self.vae.grid(media.shape)).float()

    def _distances(self, media: Tensor, reconstruction: Tensor) -> Terms:
        distance = F.l1_loss if self.config.reconstruction == "l1" else F.mse_loss
        pixels = distance(reconstruction, media, reduction="sum")
        terms = {"reconstruction": Term(pixels, media.numel())}
        if self.perceptual is not None:
            terms["perceptual"] = Term(self.perceptual(reconstruction, media).sum(), len(media))
        return terms

    def _gan_terms(
        self,
        gan: Judgement,
        likeness: Mapping[str, Judgement],
        reconstruction: Tensor,
        batch: MediaBatch,
    ) -> Terms:
        if not self.config.adaptive_gan_weight:
            return {"gan": gan.term(reconstruction)}
        times = (batch.rows.total if batch.rows else len(batch)) / len(batch)  # whole / own share
        parts = [
            self._likeness[name] / (part.count * times) * part.gradient
            for name, part in likeness.items()
        ]
        pull = adaptive_gan_weight(
            reconstruction,
            torch.stack(parts).sum(0),
            gan.gradient / (gan.count * times),
            self.vae.decoder.last_weight,
            current().sharing(batch.num_sharers),
        )
        return {"gan": gan.term(reconstruction, pull), "gan_pull": figure(pull, gan.count)}
