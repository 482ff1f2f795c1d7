"""LatentLM: one causal Transformer over tokens and continuous latents.

It knows layouts, not modalities: a position is a token or a latent, and a state predicts a token
(softmax), a latent (diffusion) or both: where latents may end, the token says whether they go on.
A class-conditional image model is a LatentLM whose vocabulary is the classes and one null class,
with no text to predict.

Axes: B rows, L fed positions (inputs have L + 1, see ``latentlm_core.layout``), C latent
channels, D hidden, N latents to predict.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentlm_core.config import Config, Width
from latentlm_core.diffusion import NoiseSchedule
from latentlm_core.draws import Draws
from latentlm_core.layout import Kind, SequenceLayout
from latentlm_core.models.few_step import FewStepConfig, FewStepHead
from latentlm_core.models.heads import DiffusionHead, DiffusionHeadConfig
from latentlm_core.models.transformer import Transformer, TransformerConfig
from latentlm_core.nn.attention import KVCache
from latentlm_core.nn.layers import RMSNorm


class LatentLMSize(Config):
    """A LatentLM before its latents and tokens are known."""

    kind: Literal["latent-lm"] = "latent-lm"
    """Which network this configures."""
    backbone: TransformerConfig
    """The causal Transformer."""
    head: DiffusionHeadConfig
    """The diffusion head."""

    def complete(self, grid: tuple[int, ...], channels: int, vocab_size: int) -> "LatentLMConfig":
        """The model for latents of C channels; a sequence takes any ``grid``."""
        return LatentLMConfig(**dict(self), latent_channels=channels, vocab_size=vocab_size)

    def with_text(self, channels: int, vocab_size: int) -> "LatentLMConfig":
        """The model for latents of C channels among text, with a softmax head."""
        return LatentLMConfig(
            **dict(self), latent_channels=channels, vocab_size=vocab_size, predicts_text=True
        )


class LatentLMConfig(LatentLMSize):
    """A LatentLM."""

    latent_channels: Width
    """C."""
    vocab_size: Width
    """Token ids: text, marks, or classes with one null class."""
    predicts_text: bool = False
    """Whether a softmax head over the vocabulary is there."""
    few_step: FewStepConfig | None = None
    """Of a model whose head was distilled to draw in a few steps."""


class Losses(NamedTuple):
    """Unreduced errors of a batch.

    Attributes:
        latent: (R, N) squared error of each noise repeat, summed over channels.
        timesteps: (R, N) of these errors.
        text: (M,) cross-entropy of each token, in nats; empty without a text head.
    """

    latent: Tensor
    timesteps: Tensor
    text: Tensor


class LatentLM(nn.Module):
    """Embeddings, backbone and heads."""

    def __init__(self, config: LatentLMConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.backbone.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, hidden)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.latent_embedding = nn.Linear(config.latent_channels, hidden)
        self.backbone = Transformer(config.backbone)
        head = DiffusionHead if config.few_step is None else FewStepHead
        self.head: DiffusionHead = head(config.head, hidden, config.latent_channels)
        if config.predicts_text:
            self.text_norm = RMSNorm(hidden, config.backbone.norm_eps, affine=True)
            self.text_head = nn.Linear(hidden, config.vocab_size, bias=False)
            nn.init.normal_(self.text_head.weight, std=0.02)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise law of the latents."""
        return self.head.schedule

    @property
    def noise_repeats(self) -> int:
        """R: errors of each latent in ``forward``."""
        return self.config.head.noise_repeats

    @property
    def predicts_text(self) -> bool:
        """Whether a softmax head is there."""
        return self.config.predicts_text

    def embed(self, ids: Tensor, latents: Tensor, kind: Tensor) -> Tensor:
        """Vectors to feed in.

        Args:
            ids: (B, L) token ids, anything valid where there is no token.
            latents: (B, L, C) latents, anything finite where there is none.
            kind: (B, L) which of the two stands there.

        Returns:
            (B, L, D).
        """
        is_latent = (kind == Kind.LATENT).unsqueeze(-1)
        tokens = self.token_embedding(ids)
        embedded = self.latent_embedding(latents.to(self.latent_embedding.weight.dtype))
        return torch.where(is_latent, embedded, tokens.to(embedded.dtype))

    def states(self, ids: Tensor, latents: Tensor, layout: SequenceLayout) -> Tensor:
        """Backbone states (B, L, D) of ids (B, L) and latents (B, L, C)."""
        x = self.embed(ids, latents, layout.kind)
        return self.backbone(x, layout.position, layout.mask())  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, latents: Tensor, layout: SequenceLayout, draws: Draws) -> Losses:
        """Errors of every prediction that the layout asks for.

        Args:
            ids: (B, L + 1).
            latents: (B, L + 1, C) float32; the same draw is fed in and predicted.
            layout: of the L fed positions.
            draws: source of timesteps and noise, a row for each latent to predict.

        Returns:
            the unreduced errors.
        """
        states = self.states(ids[:, :-1], latents[:, :-1], layout).flatten(0, 1)
        x0 = latents[:, 1:].flatten(0, 1)[layout.latent_targets]
        error, t = self.head.loss(x0, self.head.condition(states[layout.latent_targets]), draws)
        if not self.config.predicts_text:
            return Losses(error, t, error.new_zeros(0))
        logits = self.logits(states[layout.text_targets]).float()
        targets = ids[:, 1:].flatten()[layout.text_targets]
        return Losses(error, t, F.cross_entropy(logits, targets, reduction="none"))

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) => scores of the next token (..., V)."""
        return self.text_head(self.text_norm(states))  # type: ignore[no-any-return]

    def step(self, x: Tensor, cache: KVCache, position: Tensor | None = None) -> Tensor:
        """Feed embedded positions (B, L, D) after the cache's; the last state, (B, D).

        ``position`` (B, L) are their rotary positions where the cache does not know them.
        """
        length = x.shape[1]
        if position is None:
            position = cache.positions(length)
        states = self.backbone(x, position, cache.mask(length), cache)
        return states[:, -1]  # type: ignore[no-any-return]
