"""What a recipe holds: everything that decides a run."""

from typing import Literal

from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.data.packing import LatentDataConfig
from latentlm_core.diffusion import DiffusionConfig
from latentlm_core.errors import ConfigError
from latentlm_core.models.dit import DiTConfig
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.training.lm_task import LMLossConfig
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.trainer import TrainerConfig
from latentlm_core.training.vae_task import VAELossConfig


class ImageDataConfig(Config):
    """How batches are made of images."""

    batch_size: int = Field(default=64, ge=1)
    """Images a batch (a micro-batch, where gradients are accumulated)."""
    flip: bool = True
    """Mirror half of the images."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0 decodes in the trainer's own."""


class VAERecipe(Config):
    """A whole run of ``train-vae``."""

    tokenizer: SigmaVAEConfig
    """What is trained."""
    loss: VAELossConfig = VAELossConfig()
    """Its objective."""
    data: ImageDataConfig = ImageDataConfig()
    """Its batches."""
    trainer: TrainerConfig
    """How long and how."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    """Of encoder and decoder."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, betas=(0.5, 0.9))
    """Of the discriminator."""


class LatentLMSize(Config):
    """A LatentLM before its latents and classes are known."""

    kind: Literal["latent-lm"] = "latent-lm"
    """Which network."""
    backbone: TransformerConfig
    """The causal Transformer."""
    head: DiffusionHeadConfig
    """The diffusion head."""

    def complete(self, grid: tuple[int, ...], channels: int, vocab_size: int) -> LatentLMConfig:
        """The model for latents of a grid (unused: a sequence has no grid) and C channels."""
        return LatentLMConfig(
            backbone=self.backbone,
            head=self.head,
            latent_channels=channels,
            vocab_size=vocab_size,
        )


class DiTSize(Config):
    """A DiT before its latents and classes are known."""

    kind: Literal["dit"] = "dit"
    """Which network."""
    hidden_size: int
    """D."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Attention heads."""
    intermediate_size: int
    """Width of the gated feed-forward."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The noise law."""

    def complete(self, grid: tuple[int, ...], channels: int, vocab_size: int) -> DiTConfig:
        """The model for latents of a grid (height, width) and C channels."""
        if len(grid) != 2:
            raise ConfigError("A DiT takes images, whose latents have a height and a width.")
        return DiTConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            grid=(grid[0], grid[1]),
            latent_channels=channels,
            vocab_size=vocab_size,
            diffusion=self.diffusion,
        )


class LMRecipe(Config):
    """A whole run of ``train-lm``."""

    model: LatentLMSize | DiTSize = Field(discriminator="kind")
    """What is trained."""
    loss: LMLossConfig = LMLossConfig()
    """Its objective."""
    data: LatentDataConfig = LatentDataConfig()
    """Its batches."""
    trainer: TrainerConfig
    """How long and how."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the model."""
    sampler: SamplerConfig = SamplerConfig(guidance_scale=1.65)
    """What sampling uses where the user says nothing."""
