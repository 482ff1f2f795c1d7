"""The Transfusion baseline (Zhou et al. 2024) in the flavour that the paper compares with.

One Transformer reads tokens and images. It is causal, but the latents of an image see one another,
and an image that is to be learned is fed with noise: the state at a latent's own position predicts
that latent (in a LatentLM the state before it does). It takes the batches that a LatentLM takes.

Notable choices:
- an image has one timestep, embedded and added to its latents; an image that is only read, because
  text is to answer to it, is fed clean at timestep 0; text after an image that is learned sees the
  noisy one, as in Transfusion;
- the head is a small ViT over the states of one image: a DiT's blocks, modulated by the timestep,
  with learned positions. Every image has the same number of latents, so it needs no mask;
- one noise for each image and reading: another one would cost another pass of the backbone.

Axes: B rows, L fed positions (inputs have L + 1, see ``latentlm_core.layout``), C latent channels,
D hidden, I images to learn, T latents of an image, N = I * T.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from latentlm_core.config import Config, Depth, Width
from latentlm_core.diffusion import DiffusionConfig, NoiseSchedule
from latentlm_core.draws import Draws
from latentlm_core.layout import Kind, MaskRule, SequenceLayout
from latentlm_core.models.dit import DiTBlock, DiTSize
from latentlm_core.models.heads import FinalLayer
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig, Losses
from latentlm_core.models.transformer import Transformer, TransformerConfig
from latentlm_core.nn.attention import KVCache
from latentlm_core.nn.layers import RMSNorm, TimestepEmbedding


class TransfusionSize(Config):
    """A Transfusion before its latents and tokens are known."""

    kind: Literal["transfusion"] = "transfusion"
    """Which network this configures."""
    backbone: TransformerConfig
    """The Transformer."""
    head_layers: Depth
    """Number of blocks of the head, which are as wide as the backbone's."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The noise law."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        hidden, heads = self.backbone.hidden_size, self.backbone.num_heads
        if hidden % 4 or hidden % heads:
            raise ValueError(
                f"backbone.hidden_size {hidden} must be a multiple of 4 and of num_heads {heads}"
            )
        return self

    @property
    def head(self) -> DiTSize:
        """The DiT whose blocks the head has."""
        return DiTSize(
            hidden_size=self.backbone.hidden_size,
            num_layers=self.head_layers,
            num_heads=self.backbone.num_heads,
            intermediate_size=self.backbone.intermediate_size,
            norm_eps=self.backbone.norm_eps,
            diffusion=self.diffusion,
        )

    def with_text(self, channels: int, vocab_size: int, num_latents: int) -> "TransfusionConfig":
        """The model for images of T latents of C channels among text."""
        return TransfusionConfig(
            **dict(self), latent_channels=channels, vocab_size=vocab_size, num_latents=num_latents
        )


class TransfusionConfig(TransfusionSize):
    """A Transfusion."""

    latent_channels: Width
    """C."""
    vocab_size: Width
    """Token ids: text and marks."""
    num_latents: Width
    """T, of every image."""


class Transfusion(nn.Module):
    """Embeddings, backbone and heads."""

    noise_repeats = 1
    """R: errors of each latent in ``forward``."""
    predicts_text = True
    """A softmax head is always there."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.config = config
        hidden, norm_eps = config.backbone.hidden_size, config.backbone.norm_eps
        self.schedule = NoiseSchedule(config.diffusion)
        self.token_embedding = nn.Embedding(config.vocab_size, hidden)
        self.latent_embedding = nn.Linear(config.latent_channels, hidden)
        self.timestep_embedding = TimestepEmbedding(hidden)
        self.backbone = Transformer(config.backbone)
        self.latent_norm = RMSNorm(hidden, norm_eps, affine=True)
        self.latent_position = nn.Parameter(torch.empty(config.num_latents, hidden))
        self.head = nn.ModuleList(DiTBlock(config.head) for _ in range(config.head_layers))
        self.final = FinalLayer(hidden, config.latent_channels, norm_eps)
        self.text_norm = RMSNorm(hidden, norm_eps, affine=True)
        self.text_head = nn.Linear(hidden, config.vocab_size, bias=False)
        for weight in (self.token_embedding.weight, self.latent_position, self.text_head.weight):
            nn.init.normal_(weight, std=0.02)

    def embed(self, ids: Tensor, latents: Tensor, kind: Tensor, times: Tensor) -> Tensor:
        """Vectors to feed in.

        Args:
            ids: (B, L) token ids, anything valid where there is no token.
            latents: (B, L, C) latents, anything finite where there is none.
            kind: (B, L) which of the two stands there.
            times: (B, L, D) or (D,) embedded timesteps of the latents.

        Returns:
            (B, L, D).
        """
        is_latent = (kind == Kind.LATENT).unsqueeze(-1)
        embedded = self._embed_latents(latents, times)
        return torch.where(is_latent, embedded, self.token_embedding(ids).to(embedded.dtype))

    def states(self, ids: Tensor, latents: Tensor, layout: SequenceLayout) -> Tensor:
        """Backbone states (B, L, D) of ids (B, L) and clean latents (B, L, C)."""
        clean = self.timestep_embedding(torch.zeros((), device=ids.device))
        x = self.embed(ids, latents, layout.kind, clean)
        return self.backbone(x, layout.position, layout.mask(MaskRule.FREE_SPANS))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, latents: Tensor, layout: SequenceLayout, draws: Draws) -> Losses:
        """Errors of every prediction that the layout asks for, at timesteps drawn anew.

        Args:
            ids: (B, L + 1).
            latents: (B, L + 1, C) float32.
            layout: of the L fed positions; every image that it has learned is there as a whole.
            draws: source of timesteps and noise, a row for each latent to predict.

        Returns:
            the unreduced errors, with R = 1.
        """
        num_latents = self.config.num_latents
        shape = (layout.latent_targets.numel() // num_latents, num_latents, latents.shape[2])
        draws = draws.groups(num_latents)
        t = draws.integers(self.config.diffusion.num_train_timesteps, shape[:1])
        return self.errors(ids, latents, layout, t, draws.normal(shape))

    def errors(
        self, ids: Tensor, latents: Tensor, layout: SequenceLayout, t: Tensor, noise: Tensor
    ) -> Losses:
        """``forward`` with the timesteps (I,) and the noise (I, T, C) at hand."""
        clean = latents[:, :-1].flatten(0, 1)
        own = layout.latent_targets + 1
        x0 = clean[own].view_as(noise)
        each_t = t.unsqueeze(1).expand(noise.shape[:2])
        x_t = self.schedule.add_noise(x0, noise, each_t)
        fed = clean.index_copy(0, own, x_t.flatten(0, 1)).view_as(latents[:, :-1])
        times = self.timestep_embedding(torch.cat([t.new_zeros(1), t]))
        image = torch.arange(1, len(times), device=t.device).unsqueeze(1).expand_as(each_t)
        which = own.new_zeros(len(clean)).index_copy(0, own, image.flatten())
        x = self.embed(ids[:, :-1], fed, layout.kind, times[which].unflatten(0, fed.shape[:2]))
        states = self.backbone(x, layout.position, layout.mask(MaskRule.FREE_SPANS)).flatten(0, 1)
        output = self.denoise(states[own].unflatten(0, noise.shape[:2]), times[1:])
        error = (output.float() - self.schedule.target(x0, noise, each_t)).square().sum(dim=-1)
        logits = self.logits(states[layout.text_targets]).float()
        targets = ids[:, 1:].flatten()[layout.text_targets]
        return Losses(
            error.view(1, -1),
            each_t.reshape(1, -1),
            F.cross_entropy(logits, targets, reduction="none"),
        )

    def denoise(self, states: Tensor, times: Tensor) -> Tensor:
        """Predict the target of the noise law.

        Args:
            states: (I, T, D) of whole noisy images.
            times: (I, D) or (1, D) their embedded timesteps.

        Returns:
            (I, T, C) the network's output (v, epsilon or x0).
        """
        activated = F.silu(times).unsqueeze(1)
        x = self.latent_norm(states) + self.latent_position.to(states.dtype)
        for block in self.head:
            x = block(x, activated)
        return self.final(x, activated)  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) => scores of the next token (..., V)."""
        return self.text_head(self.text_norm(states))  # type: ignore[no-any-return]

    def read_token(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Feed one token a row, (B,), after the cache's; its state, (B, D)."""
        x = self.token_embedding(ids).unsqueeze(1)
        return self.backbone(x, cache.positions(1), cache.mask(1), cache)[:, 0]  # type: ignore[no-any-return]

    def read_image(self, x_t: Tensor, times: Tensor, cache: KVCache) -> Tensor:
        """Feed an image a row, (B, T, C), after the cache's; its states, (B, T, D).

        ``times`` (D,) is the embedded timestep of all.
        """
        x, length = self._embed_latents(x_t, times), x_t.shape[1]
        return self.backbone(x, cache.positions(length), cache.free_mask(length), cache)  # type: ignore[no-any-return]

    def _embed_latents(self, latents: Tensor, times: Tensor) -> Tensor:
        return self.latent_embedding(latents.to(self.latent_embedding.weight.dtype)) + times  # type: ignore[no-any-return]


def matching(reference: LatentLMConfig, num_latents: int) -> TransfusionConfig:
    """The Transfusion to set against a LatentLM: its backbone, its noise law, its size.

    The head's depth is the one that comes nearest to the LatentLM's number of parameters.
    """
    size = TransfusionSize(
        backbone=reference.backbone, head_layers=1, diffusion=reference.head.diffusion
    )
    shallow, deeper = (
        size.model_copy(update={"head_layers": layers}).with_text(
            reference.latent_channels, reference.vocab_size, num_latents
        )
        for layers in (1, 2)
    )
    missing = num_parameters(reference) - num_parameters(shallow)
    layers = 1 + round(missing / (num_parameters(deeper) - num_parameters(shallow)))
    return shallow.model_copy(update={"head_layers": max(1, layers)})


def num_parameters(config: LatentLMConfig | TransfusionConfig) -> int:
    """How many weights a model of this configuration has; none of them is allocated."""
    with torch.device("meta"):
        model = LatentLM(config) if isinstance(config, LatentLMConfig) else Transfusion(config)
    return sum(parameter.numel() for parameter in model.parameters())
