"""How the next token is chosen.

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
    scores = scores.float().cpu()
    scores[:, [marks.bos, marks.eod, marks.go_on, marks.null]] = -torch.inf
    scores[[not may for may in may_draw], marks.bod] = -torch.inf
    if not config.temperature:
        return scores.argmax(-1).tolist()
    return [_draw(row, config, source) for row, source in zip(scores, sources, strict=True)]


def _draw(scores: Tensor, config: TextSamplerConfig, source: torch.Generator) -> int:
    chances, order = (scores / config.temperature).softmax(-1).sort(descending=True)
    within = chances.cumsum(-1) - chances < config.top_p
    summed = (chances * within).double().cumsum(-1)
    drawn = torch.rand((), generator=source, dtype=torch.float64) * summed[-1]
    return int(order[torch.searchsorted(summed, drawn, right=True).clamp(max=len(order) - 1)])
