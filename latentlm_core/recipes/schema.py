"""What a recipe holds: everything that decides a run."""

from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.data.packing import LatentDataConfig
from latentlm_core.models.dit import DiTSize
from latentlm_core.models.latent_lm import LatentLMSize
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
