"""What the training of every sigma-VAE shares: the KL term, the watch on its noise, the judges.

Axes: B examples, T latent positions, C latent channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentlm_core.tokenizers.base import LatentPosterior, LatentPosteriorConfig, PosteriorKind
from latentlm_core.training.tasks import Term, Terms

MIN_NOISE_TO_SIGNAL = 0.1
"""Below this share of the latents' std, the noise no longer shapes the latent space. The speech
latents published with VibeVoice sit at about this value; a fresh sigma-VAE starts near 1."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A loss on media as its value and its gradient there; its own graph is freed already."""

    value: Tensor
    gradient: Tensor
    count: int

    @classmethod
    def of(cls, term: Term, media: Tensor) -> "Judgement":
        """Differentiate ``term`` with respect to ``media``, a leaf, and nothing else."""
        with torch.autocast(media.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(term.total, media)
        return cls(term.total.detach(), gradient, term.count)

    def term(self, reconstruction: Tensor, factor: Tensor | float = 1.0) -> Term:
        """The loss, times ``factor``, as a function of the reconstruction that it judged."""
        linear = (reconstruction * self.gradient).sum()
        return Term(factor * (self.value + linear - linear.detach()), self.count)


def latent_terms(posterior: LatentPosterior) -> Terms:
    """The KL term, and how much noise the latents carry for their spread.

    kl counts latent values. Logged only: std_mean = std(mu), std_latent = std(z),
    noise_to_signal = RMS sigma / std(z). std(z)^2 is var(mu) + E[sigma^2], its expectation over
    draws, as in the latents' statistics. Where a batch is shared, spreads are of the own share.
    """
    mean = posterior.mean.detach()
    if posterior.log_variance is None:
        noise = mean.new_full((), posterior.rule.noise_variance())
    else:
        noise = posterior.log_variance.detach().exp().mean()
    signal = mean.var(correction=0)
    count = mean.numel()
    return {
        "kl": Term(posterior.kl().sum(), count),
        "std_mean": figure(signal.sqrt(), count),
        "std_latent": figure((signal + noise).sqrt(), count),
        "noise_to_signal": figure((noise / (signal + noise).clamp_min(1e-12)).sqrt(), count),
    }


def figure(value: Tensor, count: int) -> Term:
    """A log-only figure as a Term: ``total / count`` gives it back."""
    return Term(value.detach() * count, count)


def noise_warnings(
    posterior: LatentPosteriorConfig, figures: Mapping[str, float], beta: float
) -> Sequence[str]:
    """One warning where the encoder inflates mu to escape the noise.

    Args:
        posterior: how latents are drawn; a learned sigma or none is not watched.
        figures: logged means by term name.
        beta: weight of the KL term.
    """
    if posterior.kind not in (PosteriorKind.GAUSSIAN, PosteriorKind.FIXED):
        return []
    ratio = figures.get("noise_to_signal", math.inf)
    if ratio >= MIN_NOISE_TO_SIGNAL:
        return []
    return [
        f"The encoder inflates mu to escape the noise: sigma is only {ratio:.3f} of std(z), "
        f"below {MIN_NOISE_TO_SIGNAL}; raise loss.beta (now {beta:g})."
    ]
