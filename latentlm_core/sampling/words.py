"""How the next token is chosen.

Notable: a draw is a race of exponential times, one for each token, that are divided by the chances
(Gumbel-max). Scores that are rounded otherwise, as in another batch, change few draws; along summed
chances they would change many.

Axes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from latentlm_core.config import Config
from latentlm_core.tokenizers.text import Marks


class TextSamplerConfig(Config):
    """How tokens are chosen."""

    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """Scores are divided by it; 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Only the likeliest tokens that make up this share are chosen from."""


def choose_tokens(
    scores: Tensor,
    may_draw: Sequence[bool],
    marks: Marks,
    config: TextSamplerConfig,
    sources: Sequence[torch.Generator],
) -> list[int]:
    """The next token of every row: text, the end, or the beginning of an image.

    Args:
        scores: (B, V) of the model.
        may_draw: of each row, whether an image may begin.
        marks: ids that are no text.
        config: how tokens are chosen.
        sources: of each row, asked once where the choice is drawn.
    """
    never = torch.tensor([marks.bos, marks.eod, marks.go_on, marks.null], device=scores.device)
    scores = scores.float().index_fill(1, never, -torch.inf)
    scores[[not may for may in may_draw], marks.bod] = -torch.inf
    if not config.temperature:
        return scores.argmax(-1).tolist()
    return [_draw(row, config, source) for row, source in zip(scores.cpu(), sources, strict=True)]


def _draw(scores: Tensor, config: TextSamplerConfig, source: torch.Generator) -> int:
    relative = (scores.double() - scores.max()) / config.temperature
    chances, order = relative.softmax(-1).sort(descending=True, stable=True)
    within = chances.cumsum(-1) - chances < config.top_p
    times = torch.empty_like(chances).exponential_(generator=source)
    return int(order[(chances * within / times[order]).argmax()])
