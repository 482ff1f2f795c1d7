"""How well a model predicts text: perplexity per token, and bits per byte.

Notable choices:
- Perplexity per token depends on the tokenizer; bits per byte do not, so only they compare models
  whose text tokenizers differ.
- Means are over tokens and bytes, not over documents. Their standard errors are those of a ratio of
  sums over independent documents, linearised (Cochran 1977, 6.8): no draws, no seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from latentlm_core.config import Config
from latentlm_core.errors import DataError

MAX_NATS = 700.0
"""Per token, of which a perplexity is told."""


@dataclass(frozen=True, slots=True)
class TextLoss:
    """What one document cost.

    Attributes:
        nats: sum of its tokens' negative log-likelihoods.
        num_tokens: that were predicted, the end of the text included where it is.
        num_bytes: of the document in UTF-8.
    """

    nats: float
    num_tokens: int
    num_bytes: int


class PerplexityScore(Config):
    """How well documents were predicted."""

    num_documents: int
    """How many there were."""
    num_tokens: int
    """That were predicted in all."""
    num_bytes: int
    """Of the documents in UTF-8."""
    perplexity: float
    """exp(nats per token)."""
    bits_per_token: float
    """Depends on the tokenizer, as the perplexity does."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    perplexity_error: float | None
    """Standard error over documents; None where there is one."""
    bits_per_token_error: float | None
    """Likewise."""
    bits_per_byte_error: float | None
    """Likewise."""


def score_text(losses: Sequence[TextLoss]) -> PerplexityScore:
    """Sum up what documents cost.

    Raises:
        DataError: no tokens or no bytes, a loss that is not finite, or one too large for exp.
    """
    nats = [loss.nats for loss in losses]
    tokens = [loss.num_tokens for loss in losses]
    sizes = [loss.num_bytes for loss in losses]
    if sum(tokens) == 0 or sum(sizes) == 0:
        raise DataError("There is no text whose perplexity could be measured.")
    if not all(map(math.isfinite, nats)):
        worst = list(map(math.isfinite, nats)).index(False)
        raise DataError(f"The loss of document {worst} is not finite: {nats[worst]}.")
    per_token, token_error = _ratio(nats, tokens)
    if per_token > MAX_NATS:
        raise DataError(f"No number holds the perplexity of {per_token:.0f} nats a token.")
    per_byte, byte_error = _ratio(nats, sizes)
    perplexity = math.exp(per_token)
    return PerplexityScore(
        num_documents=len(losses),
        num_tokens=sum(tokens),
        num_bytes=sum(sizes),
        perplexity=perplexity,
        bits_per_token=per_token / math.log(2),
        bits_per_byte=per_byte / math.log(2),
        perplexity_error=None if token_error is None else perplexity * token_error,
        bits_per_token_error=None if token_error is None else token_error / math.log(2),
        bits_per_byte_error=None if byte_error is None else byte_error / math.log(2),
    )


def _ratio(costs: Sequence[float], sizes: Sequence[int]) -> tuple[float, float | None]:
    """Sum of costs over sum of sizes, and its standard error."""
    count, size = len(costs), sum(sizes)
    ratio = math.fsum(costs) / size
    if count < 2:
        return ratio, None
    residuals = (cost - ratio * own for cost, own in zip(costs, sizes, strict=True))
    spread = math.fsum(residual**2 for residual in residuals)
    return ratio, math.sqrt(count / (count - 1) * spread) / size
