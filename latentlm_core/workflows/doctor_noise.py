"""Whether the noise of a sigma-VAE still shapes its latents."""

from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.training.vae_terms import MIN_NOISE_TO_SIGNAL
from latentlm_core.workflows.findings import Finding, ok, warning

MAX_NOISE_TO_SIGNAL = 0.95
"""Above this share of the latents' std the means are lost in the noise: std(mu) is then less than
a third of sigma. Runs that reconstruct end at 0.15 to 0.6; a fresh sigma-VAE starts near 1."""

WATCHED = (PosteriorKind.GAUSSIAN, PosteriorKind.FIXED)


def check_noise(kind: str | None, ratio: float) -> list[Finding]:
    """A line about RMS sigma / std(z), where sigma is not learned.

    Args:
        kind: of the posterior; None where it is not known.
        ratio: RMS sigma / std(z).
    """
    if kind is not None and kind not in WATCHED:
        return []
    what, told = "noise", f"sigma is {ratio:.3f} of std(z)"
    if ratio < MIN_NOISE_TO_SIGNAL:
        return [
            warning(
                what,
                f"{told}, below {MIN_NOISE_TO_SIGNAL}: the encoder inflates mu to escape the "
                "noise. Train again with a higher loss.beta.",
            )
        ]
    if ratio > MAX_NOISE_TO_SIGNAL:
        return [
            warning(
                what,
                f"{told}, above {MAX_NOISE_TO_SIGNAL}: the means are lost in the noise. "
                "Train longer, or with a lower loss.beta.",
            )
        ]
    return [ok(what, f"{told}, between {MIN_NOISE_TO_SIGNAL} and {MAX_NOISE_TO_SIGNAL}")]
